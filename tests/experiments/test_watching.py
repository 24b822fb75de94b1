"""Looking at a training: what is seen is right, and what is learnt does not depend on it."""

import contextlib
import dataclasses
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tests.latents import encode_noise

from jlt import files
from jlt.cli import main
from jlt.data import open_latents
from jlt.evaluation.records import Value
from jlt.experiments.curves import PATH, Curve, known_curve
from jlt.experiments.presets import DIGITS
from jlt.experiments.watching import Distances, Drawing, Grids, Neighbours
from jlt.nn import EMA, Transformer, checkpoint
from jlt.processes import Processes
from jlt.training import Stopped, TrainConfig, View, draw_batch, make_optimizer, read_metrics, train, training_step
from jlt.training.metrics import SINKS, Line, Sink
from jlt.training.watching import Pace, gradient_norms

CONFIG = TrainConfig(
    size="1x16x2", steps=8, batch_size=6, learning_rate=1e-2, warmup_steps=3, ema_decays=(0.9, 0.5), save_every=3,
    held_out_every=5, loss_space="x", keep_last=1,
)  # fmt: skip
DRAW = Drawing(steps=2, batch_size=7)


@pytest.fixture(scope="module")
def latents(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return encode_noise(tmp_path_factory.mktemp("latents") / "latents", 80, num_held_out=20)


@pytest.fixture(scope="module")
def plain(latents: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("plain") / "run"
    train(CONFIG, latents, run)
    return run


class Judged:
    """A judge that gives scores from a list in turn."""

    def __init__(self, scores: list[float]) -> None:
        self.scores = iter(scores)

    def see(self, samples: Any, name: str) -> None:
        assert samples.images.dtype == torch.uint8

    def values(self, seen: None, samples: Any) -> dict[str, Value]:
        return {"FD (pixels)": Value(next(self.scores))}


def losses(run: Path) -> list[Line]:
    """Return what an unwatched run would have in its metrics."""
    kept = ("step", "loss", "gradient_norm", "learning_rate", "held_out")
    lines = ({k: v for k, v in line.items() if k in kept} for line in read_metrics(run))
    return [line for line in lines if len(line) > 1]


def test_what_is_learnt_does_not_depend_on_who_looks(latents: Path, plain: Path, tmp_path: Path) -> None:
    run, seen = tmp_path / "run", list[Line]()

    @contextlib.contextmanager
    def sink(run: Path, header: Mapping[str, Any], step: int) -> Iterator[Sink]:
        yield seen.append

    watchers = [
        Grids(2, DRAW), Distances(4, DRAW, Judged([5, 9, 8, 7]), 8), Neighbours(3, DRAW, 9),  # type: ignore[arg-type]
    ]  # fmt: skip
    train(CONFIG, latents, run, watchers=watchers, sinks={"test": sink}, gradient_norms_every=2, peak_flops=1e12)
    assert losses(run) == losses(plain)
    last = "checkpoints/step-00000008/checkpoint.json"
    assert files.read_json(run / last)["files"] == files.read_json(plain / last)["files"]
    assert seen == read_metrics(run)
    # two averages at steps 4 and 8: the least of all came at step 4, whose checkpoint stays beside the last
    assert [line["score"] for line in seen if "score" in line] == [5, 7]
    assert sorted(checkpoint.list_steps(run)) == [4, 8]
    found = [line["distances"] for line in seen if "distances" in line]
    assert found[0] == {"ema-0.9": {"FD (pixels)": 5.0}, "ema-0.5": {"FD (pixels)": 9.0}}
    assert sorted(p.name for p in (run / "samples").iterdir()) == [f"step-{k:08d}.png" for k in (2, 4, 6, 8)]
    assert sorted(p.name for p in (run / "neighbours").iterdir()) == [f"step-{k:08d}.png" for k in (3, 6, 8)]


def test_the_best_checkpoint_is_remembered_over_a_stop(latents: Path, tmp_path: Path) -> None:
    def interrupt(step: int, loss: float) -> None:
        if step == 5:
            os.kill(os.getpid(), signal.SIGTERM)

    for scores, how in (([3, 4], contextlib.suppress(Stopped)), ([6, 5, 7, 8], contextlib.nullcontext())):
        watcher = Distances(4, DRAW, Judged(list(map(float, scores))), 8)  # type: ignore[arg-type]
        with how:
            train(
                CONFIG, latents, tmp_path / "run", watchers=[watcher], progress=interrupt if len(scores) == 2 else None
            )
    assert sorted(checkpoint.list_steps(tmp_path / "run")) == [4, 8]


def test_the_squares_of_the_parts_norms_add_up_to_the_gradients(latents: Path) -> None:
    data = open_latents(latents)
    model = Transformer(CONFIG.model(data.shape, data.num_classes))
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1)
    found: dict[str, torch.Tensor] = {}
    _, norm = training_step(
        model, EMA(model, []), make_optimizer(model, CONFIG), draw_batch(data, CONFIG, 0, torch.arange(6)), CONFIG, 5,
        look=lambda: found.update(gradient_norms(model, Processes())),
    )  # fmt: skip
    assert {"gradient_norm/blocks.0", "gradient_norm/embed", "gradient_norm/output"} <= found.keys()
    assert sum(part.square() for part in found.values()) ** 0.5 == pytest.approx(norm.item(), rel=1e-6)


def test_a_sink_that_fails_is_told_of_once_and_stops_nothing(
    latents: Path, plain: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    @contextlib.contextmanager
    def absent(run: Path, header: Mapping[str, Any], step: int) -> Iterator[Sink]:
        raise RuntimeError("no network")
        yield

    @contextlib.contextmanager
    def fails(run: Path, header: Mapping[str, Any], step: int) -> Iterator[Sink]:
        def sink(line: Line) -> None:
            raise OSError("gone away")

        yield sink

    train(CONFIG, latents, tmp_path / "run", sinks={"absent": absent, "fails": fails})
    said = capfd.readouterr().err
    assert said.count("--log absent failed and is left alone: RuntimeError: no network") == 1
    assert said.count("--log fails failed and is left alone: OSError: gone away") == 1
    assert (tmp_path / "run" / "metrics.jsonl").read_bytes() == (plain / "metrics.jsonl").read_bytes()


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_tensorboard_gets_the_lines_and_the_pictures(latents: Path, tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    train(
        CONFIG, latents, tmp_path / "run", watchers=[Grids(4, DRAW)], sinks={"tensorboard": SINKS["tensorboard"]},
        gradient_norms_every=4,
    )  # fmt: skip
    events = EventAccumulator(str(tmp_path / "run" / "tensorboard")).Reload()
    logged = [(event.step, event.value) for event in events.Scalars("loss")]
    expected = [(line["step"], line["loss"]) for line in read_metrics(tmp_path / "run") if "loss" in line]
    assert [step for step, _ in logged] == [step for step, _ in expected]
    np.testing.assert_allclose([v for _, v in logged], [v for _, v in expected], rtol=1e-6)  # float32
    assert [event.step for event in events.Images("samples")] == [4, 8]
    assert {"held_out/x/0", "gradient_norm/blocks.0"} <= set(events.Tags()["scalars"])


@pytest.mark.slow
def test_wandb_works_without_a_network(latents: Path, tmp_path: Path) -> None:
    command = ["train", "small", str(latents), str(tmp_path / "run"), "--size", "1x16x2", "--steps", "3"]
    program = "import sys; from jlt.cli import main; sys.exit(main(sys.argv[1:]))"
    done = subprocess.run(
        [sys.executable, "-c", program, *command, "--log", "wandb", "--samples-every", "2", "--watch-steps", "2"],
        env={**os.environ, "WANDB_MODE": "offline"}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "left alone" not in done.stderr
    assert list((tmp_path / "run" / "wandb").glob("offline-run-*/*.wandb"))


def view(latents: Path, run: Path) -> View:
    data = open_latents(latents)
    model = Transformer(CONFIG.model(data.shape, data.num_classes))
    header = {"name": "test", "floor": 0.05, "step": 0}
    return View(
        run, 1, model, EMA(model, [0.5]), latents, data, open_latents(latents, "held-out"), CONFIG, header, Processes()
    )


@dataclasses.dataclass(frozen=True)
class Fixed:
    """Gives the same latents whatever is asked."""

    latents: torch.Tensor

    def __call__(self, view: View, labels: torch.Tensor, weights: str | None = None) -> Any:
        samples = DRAW(view, labels)
        return dataclasses.replace(samples, latents=self.latents)


def test_copies_of_training_latents_raise_the_alarm_once_and_fresh_ones_do_not(
    latents: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    seen = view(latents, tmp_path)
    assert seen.held_out is not None
    copies = seen.data.gather(range(20)) + 0.01 * torch.randn(20, *seen.data.shape)
    fresh, middle = seen.held_out.gather(range(20)), seen.data.gather(range(60)).mean(0).expand(20, -1, -1, -1)
    for drawn, copied in ((fresh, 0.0), (middle, 0.0), (copies, 1.0)):
        alarm = Neighbours(1, Fixed(drawn), 20)  # type: ignore[arg-type]
        for _ in range(2):
            assert alarm(seen)["neighbours"]["copied"] == copied
        said = capfd.readouterr().err
        assert said.count("the run memorises") == bool(copied)
    assert (tmp_path / "neighbours" / "step-00000001.png").is_file()


def test_the_bar_tells_images_a_second_and_the_share_of_the_peak() -> None:
    pace = Pace(batch_size=100, flop=2e9, peak=1e12, device=torch.device("cpu"))
    assert re.fullmatch(r"250 images/s, 50.0% of 1 TFLOP/s, \d+\.\d\d GB", pace(2.5))
    assert re.fullmatch(r"\d+\.\d\d GB", pace(None))


CURVE = Curve("test", {}, "", 0, (), 2, (1.0, 0.8, 0.6, 0.5, 0.4), 0.1, {})


@pytest.mark.parametrize(("factor", "begins", "tells"), [(1.05, 1, 0), (1.2, 1, 1), (0.8, 1, 1), (1.2, 8, 0)])
def test_a_run_that_stays_outside_the_band_is_told_of_once(
    factor: float, begins: int, tells: int, capfd: pytest.CaptureFixture[str]
) -> None:
    with CURVE.sink(Path(), {}, 0) as sink:
        for step in range(begins, 13):
            sink({"step": step, "held_out": {}})
            sink({"step": step, "loss": factor * (CURVE.mean[(step - 1) // 2] if step <= 10 else 0.4)})
    assert capfd.readouterr().err.count("in the recorded runs of test it was") == tells


def test_each_recorded_run_of_a_preset_is_inside_the_band_and_another_target_is_not() -> None:
    """The recorded means themselves are inside; target v's curve, read in the same space, leaves the band of x."""
    curves = {curve["name"]: Curve(**curve) for curve in files.read_json(PATH)}
    for name, line in (("digits", "JLT-4x128/1"), ("digits with target v", "DiT-4x128/1")):
        curve = curves[name]
        for seed in range(3):
            record = json.loads((Path(__file__).parents[2] / f"docs/records/quickstart-seed-{seed}.json").read_text())
            seen = record["figures"]["training loss"]["lines"][line][1]
            assert all(abs(a - b) < curve.width * b for a, b in zip(seen, curve.mean, strict=True))
    assert len(curves) == 2


def test_a_curve_is_for_its_recipe_and_its_images_alone(latents: Path) -> None:
    entry = files.read_json(PATH)[0]
    data = open_latents(latents)
    manifest = dataclasses.replace(
        data.manifest, source={"source_fingerprint": entry["source"]}, num_images=4500, shape=(64, 4, 4)
    )
    data.manifest = manifest
    known = known_curve(dataclasses.replace(DIGITS, seed=9, save_every=7), data)
    assert known is not None
    assert known.name == "digits"
    assert known_curve(dataclasses.replace(DIGITS, target="eps"), data) is None
    assert known_curve(DIGITS, open_latents(latents)) is None


RANKS = """
import json
from pathlib import Path
import torch._dynamo, torch.distributed.fsdp, torch.distributed.tensor
from jlt.experiments.watching import Drawing, Grids, Neighbours
from jlt.training import TrainConfig, train

def work(rank, parallel, latents, run, settings):
    draw = Drawing(steps=2, batch_size=7)
    train(TrainConfig(**settings), Path(latents), Path(run), parallel=parallel, gradient_norms_every=4,
          watchers=[Grids(4, draw), Neighbours(8, draw, 9)])

print(json.dumps([forked(2, lambda rank: work(rank, *job)) for job in json.loads(sys.argv[1])]))
"""


def test_watchers_make_images_by_as_many_even_steps_of_heun_as_asked(latents: Path, tmp_path: Path) -> None:
    made = []

    class Look:
        every = 8

        def __call__(self, view: View) -> Line:
            made.append(Drawing(steps=3)(view, torch.zeros(2, dtype=torch.int64)))
            return {}

    train(CONFIG, latents, tmp_path / "run", watchers=[Look()])
    (samples,) = made
    assert samples.evaluations == 5  # the last step is Euler's
    assert (samples.settings["solver"], samples.settings["grid"]) == ("heun", "uniform")


def test_several_processes_see_what_one_sees(
    latents: Path, tmp_path: Path, fork: Callable[..., subprocess.CompletedProcess[str]]
) -> None:
    config = dataclasses.replace(CONFIG, ema_lengths=(0.1,))
    watchers = [Grids(4, DRAW), Neighbours(8, DRAW, 9)]
    train(config, latents, tmp_path / "one", gradient_norms_every=4, watchers=watchers)
    settings = {name: value for name, value in dataclasses.asdict(config).items() if name != "times"}
    jobs = [[parallel, str(latents), str(tmp_path / parallel), settings] for parallel in ("ddp", "fsdp")]
    done = fork(RANKS, json.dumps(jobs))
    assert json.loads(done.stdout.splitlines()[-1]) == [[0, 0]] * 2, done.stderr
    for parallel in ("ddp", "fsdp"):
        for ours, theirs in zip(read_metrics(tmp_path / parallel), read_metrics(tmp_path / "one"), strict=True):
            assert ours.keys() == theirs.keys()
            for name, value in theirs.items():
                if isinstance(value, float):
                    assert ours[name] == pytest.approx(value, rel=1e-5), name
        pictures = [
            np.asarray(Image.open(tmp_path / p / "samples/step-00000008.png")).astype(int) for p in (parallel, "one")
        ]
        assert np.abs(pictures[0] - pictures[1]).max() <= 1  # rounded to 8 bits
        powers = [checkpoint.read(tmp_path / name).tensors("power-0.1") for name in (parallel, "one")]
        for name, tensor in powers[1].items():
            torch.testing.assert_close(powers[0][name], tensor, rtol=1e-4, atol=1e-6)  # reduction order


def test_the_command_line_refuses_what_it_cannot_watch(
    latents: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny = ["train", "small", str(latents), str(tmp_path / "run"), "--size", "1x16x2", "--steps", "2"]
    for options, message in (
        (["--log", "tensorbored"], "unknown log 'tensorbored', did you mean 'tensorboard'"),
        (["--samples-every", "-1"], "samples_every must be at least 0, got -1"),
        (["--samples-every", "1", "--watch-steps", "0"], "watch_steps must be at least 1, got 0"),
        (["--peak-tflops", "0"], "peak_tflops must be above 0, got 0.0"),
        (["--ema-lengths", "0.5"], "must be in [1e-09, 0.2887], got 0.5"),
    ):
        assert main([*tiny, *options]) == 2
        assert message in capsys.readouterr().err
    assert main([*tiny, "--samples-every", "1", "--neighbours-every", "2", "--watch-steps", "2"]) == 0
    assert (tmp_path / "run" / "samples" / "step-00000002.png").is_file()
