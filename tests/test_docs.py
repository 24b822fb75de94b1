"""The pages: every command is understood, snippets run, links lead somewhere, and the API names what is public."""

import contextlib
import functools
import importlib
import inspect
import itertools
import re
import shlex
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from tests.test_package import ROOMS

from jlt import files
from jlt.cli import MODULES, main
from jlt.experiments.doctor import synthetic_latents
from jlt.experiments.presets import PRESETS, Expected
from jlt.flow import TARGETS
from jlt.training import train

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
MODULES_OF = {
    room: sorted(path.stem for path in (ROOT / "src" / "jlt" / room).glob("*.py") if path.stem != "__init__")
    for room in ROOMS
}


def commands(page: str) -> list[str]:
    """Return the jlt commands of a page's bash blocks and indented blocks, without what stands before `jlt`."""
    blocks = re.findall(r"```bash\n(.*?)```", page, re.DOTALL) + re.findall(r"(?:^ {4,}.*\n)+", page, re.MULTILINE)
    lines = re.split(r"\n|&&", "\n".join(blocks).replace("\\\n", " "))
    start = r"\s*(?:srun .*exec |torchrun .* -m |\w+=\S+ )?jlt ((?!app\b.*http)[a-z].*?)(?: > \S+)?'?$"
    return [match[1] for line in lines if (match := re.match(start, line.split("  #")[0].rstrip()))]


FOUND = list(dict.fromkeys(command for page in PAGES for command in commands(page.read_text())))


def test_commands_are_found_wherever_a_page_has_them() -> None:
    block = "A=1 jlt a b   # c\ntorchrun --x 8 -m jlt c \\\n    d"
    page = f"```bash\n{block}\n```\ntext\n\n    srun bash -c 'B=$C exec jlt e'\n"
    assert commands(page) == ["a b", "c      d", "e"]
    assert len(FOUND) > 60


def understood(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Parse a command without running it."""
    arguments, called = shlex.split(command.replace("$SLURM_ARRAY_TASK_ID", "1")), []
    module = importlib.import_module(f"jlt.cli.{MODULES.get(arguments[0], arguments[0])}")
    with monkeypatch.context() as patch:
        patch.setattr(module, "run", functools.wraps(module.run)(lambda *given, **named: called.append(named)))
        assert main(arguments) == 0
    assert len(called) == 1


@pytest.mark.parametrize("command", FOUND)
def test_a_command_of_the_pages_is_understood(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    understood(command, monkeypatch)


NOT_RUN = {  # what a command holds: why it is not run here
    "doctor --train jlt-b-1": "a rehearsal of the full size on a GPU",
    "--minutes": "a minute's training; tests/experiments/test_doctor.py has a shorter one",
    "--representation flux2": "the weights of FLUX.2 come in no package",
    "dinov2": "nor do those of DINOv2",
    "cuda:3": "four GPUs; tests/experiments/test_compare.py has two processes",
    "$SLURM": "the jobs of an array; tests/experiments/test_compare.py has their shares",
    "app": "a page that is served until it is stopped; tests/experiments/test_app.py has a browser",
    "--license": "an upload to the Hub; --to writes the same folder",
    "--compile": "minutes of compiling; tests/sampling/test_compiled.py",
    " fm/": "the ablation's data set may not be installed; tests/experiments/test_ablation.py has a small one",
}
TRAINING = {"size": "4x32x2", "steps": "4", "batch-size": "4", "warmup-steps": "1", "save-every": "4"}
FEW = ["--num", "4", "--steps", "2"]
SMALLER = {  # a later option goes before an earlier one
    "encode": ["--num-held-out", "10"],
    "train": [f"--{name}={value}" for name, value in {**TRAINING, "decay-steps": "0", "held-out-every": "4"}.items()],
    "compare": [f"--base.{name}={value}" for name, value in TRAINING.items()]
    + ["--sampling.num-images", "10", "--sampling.steps", "2", "--extractor", "pixels"],
    "evaluate": [*FEW, "--extractor", "pixels"],
    "reference": ["--extractor", "pixels"],
    "sweep": [*FEW, "--full", "4", "--scale", "1", "2", "--interval", "0", "1", "--extractor", "pixels"],
    "sample": FEW,
    "interpolate": ["--steps", "2"],
    "invert": FEW,
}
WORDS = {
    "cuda": "cpu", "256": "64", "5000": "2", "seed=0,1,2": "seed=0,1", "VIRTUAL_imagenet256_labeled.npz": "REF.npz",
    "step-00001000": "step-00000004", "step-00000400": "step-00000004", "step-00200000": "step-00000002",
}  # fmt: skip
MADE = {  # what a command makes, by its words; it is not there before
    "encode": "{1}", "reference": "{1}", "train": "{2}", "compare": "{2}", "export": "{1}", "sample": "{1}",
    "evaluate": "{0}/evaluation", "sweep": "{0}/sweep",
}  # fmt: skip


def smaller(command: str) -> str:
    """Return a command that does the same with small numbers."""
    name, *words = command.split()
    words = ["/".join(WORDS.get(part, part) for part in word.split("/")) for word in words]
    less = SMALLER.get(name, [])
    if name == "evaluate" and not words[0].lower().startswith("run"):
        less = SMALLER["reference"]  # images are measured as they are
    return " ".join([name, *words, *([] if "--dry-run" in words else less)])


RUN_HERE = list(dict.fromkeys(smaller(command) for command in FOUND if not any(part in command for part in NOT_RUN)))


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with pictures, and all that the pages have made in earlier commands, small."""
    world = tmp_path_factory.mktemp("world")
    generator = np.random.default_rng(0)
    photographs = ("imagenet/train/tench", "imagenet/train/goldfish")
    for folder in (*(f"photos/{k}" for k in range(10)), "emoji/faces", "emoji/flags", *photographs):
        (world / folder).mkdir(parents=True)
        for i in range(40 if "emoji" in folder else 4):
            side = 256 if folder in photographs else 64
            pixels = generator.integers(0, 256, (side, side, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(world / folder / f"{i}.png")
    for name in ("mine", "pictures"):
        (world / name).symlink_to(world / "photos")
    with contextlib.chdir(world):
        small = "--image-size 64 --stride 16 --channels 16 --mirrored --num-held-out 20"
        averages = "--ema-decays 0.9996 0.9 --ema-lengths 0.05 0.1 --snapshot-every 2"
        for command in (
            f"encode photos latents {small}",
            smaller(f"train small latents run {averages}"),
            smaller("sample run samples --format tar"),
            "reference latents REF.npz --extractor pixels",
            smaller("evaluate run latents"),
        ):
            assert main(command.split()) == 0
        Path("samples", "images.tar").rename("samples.tar")
        np.savez("samples.npz", arr_0=generator.integers(0, 256, (12, 64, 64, 3), dtype=np.uint8))
        files.remove(Path("samples"))
        shutil.copy("REF.npz", "reference.npz")
        for name in ("RUN", "runs/jlt-b-1", "qs/runs/x", "qs/runs/v"):
            shutil.copytree("run", name)
        for name in ("RUN/sweep", "out", "geo"):
            shutil.copytree("run/evaluation", name)
        for seed, target in itertools.product(range(3), ("x", "k=0.25", "v")):
            shutil.copytree("run", f"out/runs/{seed}-{target}")
        for name in ("qs/latents", "mine-latents", "flags", "white"):
            Path(name).symlink_to(world / "latents")
    return world


@pytest.mark.slow
@pytest.mark.parametrize("command", RUN_HERE)
def test_a_command_of_the_pages_does_its_work(
    command: str, world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(world, tmp_path / "here", symlinks=True)
    monkeypatch.chdir(tmp_path / "here")
    name, *words = command.split()
    if name in MADE and "--dry-run" not in words and (made := Path(MADE[name].format(*words))).exists():
        files.remove(made)
    assert main([name, *words]) == 0


def snippets(path: Path) -> list[str]:
    return re.findall(r"```python\n(.*?)```", path.read_text(), re.DOTALL)


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_snippets_are_python(path: Path) -> None:
    for snippet in snippets(path):
        compile(snippet, path.name, "exec")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `latents` and a tiny `run`, as the snippets name them."""
    folder = tmp_path_factory.mktemp("pages")
    synthetic_latents(folder / "latents", Expected((4, 4, 4), 3, 8), 8)
    config = replace(PRESETS["digits"].config, size="1x32x2", steps=2, batch_size=2, held_out_every=0)
    train(config, folder / "latents", folder / "run", progress=lambda step, loss: None)
    return folder


def run_snippets(name: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    monkeypatch.chdir(folder)
    names: dict[str, Any] = {}
    for snippet in snippets(ROOT / name):
        exec(snippet, names)
    return names


def test_the_readmes_snippet_makes_what_it_says(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    samples = run_snippets("README.md", folder, monkeypatch)["samples"]
    assert samples.images.shape == (3, 4, 4, 4)
    assert (samples.evaluations, samples.network_passes) == (25, 45)


def test_the_snippet_about_formats_reads_what_was_written(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = run_snippets("docs/formats.md", folder, monkeypatch)
    assert names["shard"]["latents"].shape == (8, 4, 4, 4)
    assert names["manifest"]["num_images"] == 8


def test_the_target_of_the_snippet_can_be_read_inside_the_path(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = set(TARGETS)
    try:
        run_snippets("docs/targets.md", folder, monkeypatch)
        assert all(TARGETS["late-v"].det(k / 10) for k in range(1, 10))
    finally:
        for name in set(TARGETS) - before:
            del TARGETS[name]


@pytest.mark.parametrize("path", [*PAGES, ROOT / "CONTRIBUTING.md"], ids=lambda path: path.name)
def test_links_between_pages_lead_somewhere(path: Path) -> None:
    for link in re.findall(r"\]\(([^)#]+?)(?:#[^)]*)?\)", path.read_text()):
        assert re.match("https?:", link) or (path.parent / link).exists(), link


def test_every_page_is_in_the_index() -> None:
    index = (ROOT / "docs" / "index.md").read_text()
    for page in (ROOT / "docs").rglob("*.md"):
        name = str(page.relative_to(ROOT / "docs"))
        assert name == "index.md" or (f"({name})" in index and f"\n{name[:-3]}\n" in index), name


@pytest.mark.parametrize("room", ROOMS)
def test_the_api_names_all_that_is_public_and_documents_it(room: str) -> None:
    page = (ROOT / "docs" / "api" / f"{room}.md").read_text()
    assert re.findall(r"automodule:: (\S+)", page) == [f"jlt.{room}", *(f"jlt.{room}.{m}" for m in MODULES_OF[room])]
    package = importlib.import_module(f"jlt.{room}")
    tables = re.findall(r"autodata:: (\S+)", page)
    for name in getattr(package, "__all__", []):
        thing = getattr(package, name)
        if inspect.isclass(thing) or inspect.isfunction(thing):
            assert inspect.getdoc(thing), name
            assert thing.__module__.startswith(f"jlt.{room}.")  # a module of the page, with all that it defines
        else:
            assert f"jlt.{room}.{name}" in tables


@pytest.mark.slow
def test_the_site_builds_without_a_warning_and_asks_no_other_host(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "sphinx", "--quiet", "--fail-on-warning", str(ROOT / "docs"), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    asked = re.compile(r"""<(?:script|img|iframe)[^>]*\bsrc="(?:https?:)?//|<link[^>]*\bhref="(?:https?:)?//""")
    for page in tmp_path.rglob("*.html"):
        assert not asked.search(page.read_text()), page
    for style in tmp_path.rglob("*.css"):
        assert not re.search(r"(?:url\(|@import)\s*['\"]?(?:https?:)?//", style.read_text()), style
    assert "jlt.flow.targets.residual" in (tmp_path / "api" / "flow.html").read_text()
