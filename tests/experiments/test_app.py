"""The page to play with: what a wish may ask for, what a real browser shows, and that no visitor sees another's."""

import base64
import dataclasses
import io
import json
import re
import signal
import subprocess
import sys
import threading
import time
import urllib.parse
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tests.chromium import PROGRAM, Chromium

import jlt
from jlt.data import Pixels
from jlt.experiments.play import EACH, PREVIEWS, Limits, Wish, check_alike, labels, sheet, solvers, watch, watch_all
from jlt.nn import EMA, Transformer, TransformerConfig, checkpoint
from jlt.sampling import Making

CONFIG = TransformerConfig(8, 3, 2, 16, 1, 1, num_classes=3)


def write(folder: Path, target: str, seed: int, config: TransformerConfig = CONFIG) -> Path:
    model = Transformer(config, seed)
    torch.nn.init.normal_(model.output.weight, std=0.2, generator=torch.Generator().manual_seed(seed))
    header = {
        "name": f"{target}-small",
        "target": target,
        "floor": 0.05,
        "step": 1,
        "latents": {"affine": {"shift": [0.0] * 3, "scale": [1.0] * 3}, "class_names": ["ant", "bee", "cat"]},
    }
    if not config.num_classes:
        header["latents"]["class_names"] = None  # type: ignore[index]
    checkpoint.save(
        folder, model, EMA(model, [0.5]), None, header, lambda inner: Pixels(3).save(inner / "representation")
    )
    return folder


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("runs")
    return {name: write(root / name, name, seed) for seed, name in enumerate(("x", "v"))}


def test_a_watched_sampling_ends_with_the_images_of_the_same_seed(runs: dict[str, Path]) -> None:
    generator = jlt.load(runs["x"])
    views = list(watch(generator, Wish("bee", 3, 7, "dpmpp-2m", 20, 1.5, 0.2, 0.9), Limits()))
    expected = generator.sample([1] * 3, seed=7, solver="dpmpp-2m", steps=20, scale=1.5, interval=(0.2, 0.9))
    assert torch.equal(views[-1].images, expected.images)
    assert [view.share for view in views] == sorted(view.share for view in views)
    assert 2 < len(views) <= PREVIEWS + 1
    assert views[-1].strip is not None
    each = list(watch(generator, Wish(EACH, 4, steps=1), Limits()))[-1]
    assert torch.equal(each.images, generator.sample([0, 1, 2, 0], steps=1, scale=2.0).images)


def test_two_runs_start_from_the_same_noise(runs: dict[str, Path]) -> None:
    opened = {name: jlt.load(path) for name, path in runs.items()}
    views = list(watch_all(lambda run, weights: opened[run], ["x", "v"], Wish("0", 2, 3, "euler", 4), Limits()))
    for name, generator in opened.items():
        expected = generator.sample([0, 0], seed=3, solver="euler", steps=4, scale=2.0).images
        assert torch.equal(views[-1][name].images, expected)
    assert not torch.equal(views[-1]["x"].images, views[-1]["v"].images)


BAD = [
    ({"num_images": 17}, "the number of images must be in [1, 16], got 17"),
    ({"num_images": None}, "the number of images must be a whole number, got None"),
    ({"steps": 101}, "steps must be in [1, 100], got 101"),
    ({"steps": 2.5}, "steps must be a whole number, got 2.5"),
    ({"steps": 100, "solver": "rk4"}, "rk4 evaluates 399 times in 100 steps, the most is 200"),
    ({"solver": "adaptive"}, "unknown solver 'adaptive'"),
    ({"solver": "adaptive=1e-9"}, "unknown solver"),
    ({"seed": -1}, "the seed must be in [0, 4294967295], got -1"),
    ({"seed": float("nan")}, "the seed must be a whole number, got nan"),
    ({"seed": float("inf")}, "the seed must be"),
    ({"seed": True}, "the seed must be a whole number, got True"),
    ({"scale": float("nan")}, "the guidance scale must be in [0, 20], got nan"),
    ({"scale": "3"}, "the guidance scale must be in [0, 20], got '3'"),
    ({"low": 0.9, "high": 0.2}, "low < high"),
    ({"high": 1.5}, "the interval's upper end must be in [0, 1], got 1.5"),
    ({"label": "dog"}, "unknown class 'dog'"),
    ({"label": "3"}, "label 3 is not below"),
]  # fmt: skip


@pytest.mark.parametrize(("changes", "message"), BAD, ids=[str(changes) for changes, _ in BAD])
def test_a_wish_beyond_the_limits_is_refused_in_one_line(
    runs: dict[str, Path], changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=re.escape(message)) as refused:
        list(watch(jlt.load(runs["x"]), dataclasses.replace(Wish(), **changes), Limits()))
    assert "\n" not in str(refused.value)


def test_a_sampling_that_is_left_ends(runs: dict[str, Path]) -> None:
    before = threading.active_count()
    generator, calls = jlt.load(runs["x"]), []
    generator.model.register_forward_hook(lambda *_: (calls.append(1), time.sleep(0.01))[:0] or None)
    views = watch(generator, Wish(steps=100), Limits())
    next(views)
    views.close()  # type: ignore[attr-defined]
    while threading.active_count() > before:
        time.sleep(0.01)
    assert len(calls) < 199


def test_what_a_page_offers_is_what_a_wish_may_name(runs: dict[str, Path], tmp_path: Path) -> None:
    generator = jlt.load(runs["x"])
    assert labels(generator) == [EACH, "ant", "bee", "cat"]
    assert "adaptive" not in solvers(Limits())
    for name in solvers(Limits()):
        assert list(watch(generator, Wish(num_images=1, solver=name, steps=2), Limits()))
    plain = jlt.load(write(tmp_path / "plain", "x", 0, dataclasses.replace(CONFIG, num_classes=0)))
    assert labels(plain) == [EACH]
    assert list(watch(plain, Wish(steps=1), Limits()))
    with pytest.raises(ValueError, match="plain has num_classes 0, x has 3"):
        check_alike({"x": generator, "plain": plain})


@pytest.fixture(scope="module")
def address(runs: dict[str, Path]) -> Iterator[str]:
    """Serve the page by the command, in a process of its own: Gradio leaves sockets open, which is an error here."""
    command = [sys.executable, "-W", "ignore", "-m", "jlt", "app", *map(str, runs.values())]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as app:
        assert app.stdout is not None
        yield app.stdout.readline().strip()
        app.terminate()  # SIGINT would be ignored below a shell that starts jobs in the background
        assert app.wait(60) == -signal.SIGTERM


def expected_grid(run: Path, seed: int, **how: Any) -> np.ndarray:
    """Return the picture of eight images that a page shows for a seed, its other fields being as they are at first."""
    *_, last = watch(jlt.load(run), Wish(seed=seed, scale=2.9, **how), Limits())
    return np.asarray(sheet(last))


def call(address: str, wish: list[Any]) -> tuple[str, Any]:
    """Return how a wish to the programming interface ended, "complete" or "error", and with what."""
    body = json.dumps({"data": wish}).encode()
    asked = urllib.request.Request(f"{address}gradio_api/call/sample", body, {"Content-Type": "application/json"})
    with urllib.request.urlopen(asked) as answer:
        event = json.load(answer)["event_id"]
    with urllib.request.urlopen(f"{address}gradio_api/call/sample/{event}") as answer:
        *_, (kind, data) = re.findall(r"event: (\w+)\ndata: (.*)", answer.read().decode())
    return kind, json.loads(data)


@pytest.mark.slow
def test_the_programming_interface_gives_the_images_and_refuses_the_rest(address: str, runs: dict[str, Path]) -> None:
    wish = [EACH, 8, 4, Making.solver, Making.steps, 2.9, 0.1, 1.0, "ema"]
    kind, (x, _, v, _, done) = call(address, wish)
    assert (kind, done) == ("complete", "100%")
    for name, shown in (("x", x), ("v", v)):
        with urllib.request.urlopen(shown["url"]) as answer, Image.open(io.BytesIO(answer.read())) as picture:
            assert np.array_equal(np.asarray(picture), expected_grid(runs[name], 4))
    for k, bad, message in (
        (4, 101, "steps must be in"),
        (3, "adaptive=1e-12", "not in the list"),
        (1, 10**9, "number of images"),
    ):
        kind, told = call(address, [*wish[:k], bad, *wish[k + 1 :]])
        assert kind == "error"
        assert message in json.dumps(told)


@pytest.fixture(scope="module")
def chromium(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Chromium]:
    if not PROGRAM.exists():
        pytest.skip("not run: no Chromium")
    browser = Chromium(tmp_path_factory.mktemp("profile"))
    yield browser
    browser.close()


DONE = "document.querySelector('#done textarea, #done input')?.value"
READY = "!document.querySelector('#sample').disabled"
SAMPLE = "document.querySelector('#sample').click()"
GRIDS = """Promise.all([...document.querySelectorAll('.grid img')].map(async image =>
    btoa(String.fromCharCode(...new Uint8Array(await (await fetch(image.src)).arrayBuffer())))))"""


def fill(page: Any, field: str, value: int) -> None:
    page.run(f"""(() => {{
        const input = document.querySelector('#{field} input');
        input.value = '{value}'; input.dispatchEvent(new Event('input', {{bubbles: true}}));
        input.dispatchEvent(new Event('change', {{bubbles: true}})); input.blur(); }})()""")


def grids(page: Any) -> list[np.ndarray]:
    return [np.asarray(Image.open(io.BytesIO(base64.b64decode(text)))) for text in page.run(GRIDS)]


@pytest.mark.slow
def test_two_visitors_at_once_each_get_their_own_and_a_bad_wish_is_refused(
    address: str, runs: dict[str, Path], chromium: Chromium
) -> None:
    seeds = (11, 12)
    pages = [chromium.visit(address) for _ in seeds]
    for page, seed in zip(pages, seeds, strict=True):
        page.wait("document.querySelector('#seed input') && document.querySelector('#sample') !== null")
        fill(page, "seed", seed)
    for page in pages:
        page.run(SAMPLE)
    for page in pages:
        page.wait(f"{DONE} === '100%'")
    for page, seed in zip(pages, seeds, strict=True):
        page.wait("document.querySelectorAll('.grid img').length === 2")
        for shown, name in zip(grids(page), runs, strict=True):
            assert np.array_equal(shown, expected_grid(runs[name], seed))
    fill(pages[0], "steps", 101)
    pages[0].wait(READY)
    pages[0].run(SAMPLE)
    pages[0].wait("document.body.innerText.includes('steps must be in [1, 100], got 101')")
    pages[0].wait(READY)  # a refused wish leaves it, too
    assert "got 101" not in pages[1].run("document.body.innerText")
    for page in pages:
        hosts = {urllib.parse.urlsplit(asked).hostname for asked in page.requests() if asked.startswith("http")}
        assert hosts == {"127.0.0.1"}


@pytest.mark.slow
def test_a_sampling_is_stopped_from_the_page_and_the_next_click_is_heard(address: str, chromium: Chromium) -> None:
    page = chromium.visit(address)
    page.wait("document.querySelector('#seed input') && document.querySelector('#sample') !== null")
    fill(page, "steps", 100)
    page.run(SAMPLE)
    page.wait(f"/^[1-9]/.test({DONE})")  # a preview is there
    assert page.run(READY) is False
    page.run("document.querySelector('#stop').click()")
    page.wait(f"{DONE} === 'stopped'")
    fill(page, "steps", 2)
    page.wait(READY)
    assert page.run(DONE) == "stopped"
    page.run(SAMPLE)
    page.wait(f"{DONE} === '100%'")
    page.wait(READY)
