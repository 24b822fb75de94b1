"""The sweep: points once each, in any order and from any process, and the best scored with other seeds."""

import json
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from jlt.cli import main
from jlt.data import encode
from jlt.data.idx import Arrays
from jlt.evaluation import records
from jlt.experiments.benchmark import make_reference
from jlt.experiments.sweep import Factors, heat, name_of, points, settled
from jlt.training import TrainConfig, train

pytestmark = pytest.mark.usefixtures("one_thread")

Fork = Callable[..., subprocess.CompletedProcess[str]]
SETTINGS = ["--extractor", "pixels", "--num", "12", "--full", "16", "--batch-size", "6"]
CONFIG = TrainConfig(
    size="1x16x2", steps=12, batch_size=6, warmup_steps=1, learning_rate=1e-2, ema_decays=(0.5,), ema_lengths=(0.1,)
)
FACTORS = ["--scale", "1", "2", "4", "--interval", "0", "1", "0.3", "1", "--steps", "2", "--weights", "ema"]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("made")
    images = np.random.default_rng(0).integers(0, 256, (40, 1, 8, 8), dtype=np.uint8)
    source = Arrays("mnist", images, np.arange(40) % 4, ("a", "b", "c", "d"), "test")
    encode(source, folder / "latents", stride=2, num_held_out=10)
    train(CONFIG, folder / "latents", folder / "run")
    np.savez(folder / "images.npz", np.random.default_rng(1).integers(0, 256, (40, 8, 8, 3), dtype=np.uint8))
    make_reference(str(folder / "images.npz"), folder / "real.npz", "pixels")
    return folder


def command(made: Path, out: Path, *more: str) -> list[str]:
    return ["sweep", str(made / "run"), "--reference", str(made / "real.npz"), "--out", str(out), *SETTINGS, *more]


def timeless(out: Path) -> dict[str, Any]:
    """Return all points and the outcome without the moments and durations, which no two sweeps share."""
    found = {path.name: json.loads(path.read_text()) for path in sorted((out / "points").glob("*.json"))}
    record = json.loads((out / "record.json").read_text())
    for each in [*found.values(), record, *record["parts"], *record["parts"][-1]["parts"]]:
        each.update(created="", command="")
        each["values"].pop("sampling time, of all processes", None)
    return {**found, "record": record}


@pytest.fixture(scope="module")
def whole(made: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("whole") / "sweep"
    assert main(command(made, out, *FACTORS)) == 0
    return out


def test_a_sweep_measures_each_point_once_and_scores_the_best_with_another_seed(whole: Path) -> None:
    found = {path.stem: records.read(path) for path in (whole / "points").glob("*.json")}
    assert len(found) == 5  # at scale 1 the interval does not matter
    assert {path.suffix for path in (whole / "points").iterdir()} == {".json"}  # the images are gone
    record = records.read(whole / "record.json")
    distances = {name: point.values["FD (pixels 8 x 8)"].value for name, point in found.items()}
    assert record.settings["chosen"] == min(distances, key=lambda name: distances[name])
    assert {point.settings["seed"] for point in found.values()} == {1}
    assert (record.settings["seed"], record.settings["num_images"]) == (0, 16)
    table = record.parts[-1].parts
    assert [part.values["FD (pixels 8 x 8)"].value for part in table] == sorted(distances.values())
    assert (whole / "heat-map.png").read_bytes()[:4] == b"\x89PNG"
    assert main(["report", str(whole)]) == 0
    assert "heat-map" not in (whole / "report.html").read_text()  # its bytes are in the page


def test_a_sweep_goes_on_with_the_points_that_are_there_and_takes_new_values(made: Path, tmp_path: Path) -> None:
    assert main(command(made, tmp_path / "s", *FACTORS)) == 0
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "s" / "points").glob("*.json")}
    list(before)[2].unlink()
    kept = {path: time for path, time in before.items() if path.exists()}
    assert main(command(made, tmp_path / "s", *FACTORS, "--solver", "ab2", "euler")) == 0
    assert {path: path.stat().st_mtime_ns for path in kept} == kept
    assert len(list((tmp_path / "s" / "points").glob("*.json"))) == 10


def test_the_jobs_of_an_array_leave_the_records_of_one_sweep(
    made: Path, whole: Path, tmp_path: Path, capsys: Any
) -> None:
    for share in ("2/2", "1/2"):
        assert main(command(made, tmp_path / "s", *FACTORS, "--share", share)) == 0
        assert "without --share scores the best" in capsys.readouterr().out
        assert not (tmp_path / "s" / "record.json").exists()
    assert main(command(made, tmp_path / "s", *FACTORS)) == 0
    assert timeless(tmp_path / "s") == timeless(whole)


RANKS = """
import torch
from jlt.cli import main

torch.set_num_threads(1)
sys.exit(max(forked(2, lambda rank: sys.exit(main(sys.argv[1:])))))
"""


def test_processes_share_the_points(made: Path, whole: Path, tmp_path: Path, fork: Fork) -> None:
    done = fork(RANKS, *command(made, tmp_path / "s", *FACTORS))
    assert done.returncode == 0, done.stderr
    assert timeless(tmp_path / "s") == timeless(whole)


def test_held_out_images_are_the_reference_where_none_is_given(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    images = np.random.default_rng(0).integers(0, 256, (40, 1, 8, 8), dtype=np.uint8)
    source = Arrays("mnist", images, np.arange(40) % 4, ("a", "b", "c", "d"), "test")
    monkeypatch.setattr("jlt.data.encoding.open_source", lambda *arguments: source)
    arguments = ["sweep", str(made / "run"), str(made / "latents"), "--out", str(tmp_path), *SETTINGS]
    assert main([*arguments, "--scale", "1", "2", "--interval", "0", "1", "--steps", "2", "--by", "KD"]) == 0
    record = records.read(tmp_path / "record.json")
    assert record.settings["reference's images"].startswith("10 of ")
    assert record.parts[1].name == "10 held-out images, encoded and decoded"
    assert record.parts[1].values["FD (pixels 8 x 8)"].value < record.parts[0].values["FD (pixels 8 x 8)"].value
    assert [part.kind for part in record.parts if part.parts] == ["by class", "points"]
    moved = shutil.copytree(made / "latents", tmp_path / "elsewhere")
    made_before = {path: path.stat().st_mtime_ns for path in (tmp_path / "points").iterdir()}
    arguments[2] = str(moved)  # the same images in another place: the points stay
    assert main([*arguments, "--scale", "1", "2", "--interval", "0", "1", "--steps", "2", "--by", "KD"]) == 0
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "points").iterdir()} == made_before


def test_a_heat_map_shows_the_best_over_the_factors_that_it_does_not_show() -> None:
    factors = Factors(
        scale=(1.0, 2.0, 3.0),
        interval=((0.0, 1.0), (0.1, 1.0)),
        weights=("model",),
        steps=(5,),
        solver=("heun", "euler"),
    )
    found = {}
    for point in points(factors):
        value = point["scale"] * 10 + point["interval"][0] + (0 if point["solver"] == "euler" else 5)
        name = name_of(settled(point, factors))
        found.setdefault(name, records.Record("point", "", {"FD (pixels)": records.Value(value)}, {}))
    rows, columns, table = heat(factors, found, "FD")
    assert (rows, columns) == ("interval", "scale")
    assert table == [[10, 20, 30], [10, 20.1, 30.1]]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--seed", "3", "--final-seeds", "0", "3"], "must be others than the points' seed 3, got [0, 3]"),
        (["--share", "3/2"], "a share is K/N with K from 1 to N, such as 3/8, got '3/2'"),
        (["--share", "two"], "a share is K/N with K from 1 to N, such as 3/8, got 'two'"),
        (["--by", "FDI"], "did you mean 'FD'"),
        (["--by", "FID"], "FID is not measured with this reference and pixels 8 x 8"),
        (["--scale", "2", "2"], "scale needs one value or several that differ, got [2.0, 2.0]"),
        (["--weights", "0.7"], "unknown weights '0.7'"),
        (["--solver", "heun", "huen"], "unknown solver 'huen'"),
        (["--guidance", "cfg", "apg:eta=x"], "eta must be a finite number"),
        (["--guidance", "auto"], "guidance 'auto' needs a guide"),
        (["--guide", "RUN"], "guidance auto takes the guide RUN, cfg none"),
        (["--full", "1"], "num_images must be at least 2, got 1"),
        (["--final-seeds", "0", "0"], "seeds must differ, got 0, 0"),
    ],
)
def test_bad_sweeps_are_one_line(made: Path, tmp_path: Path, capsys: Any, options: list[str], message: str) -> None:
    assert main(command(made, tmp_path / "s", "--steps", "2", *options)) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert (tmp_path / "s").exists() == ("FID" in message)  # which the first point tells


def test_a_sweep_takes_a_guide_and_power_averages_unguided_points_included(made: Path, tmp_path: Path) -> None:
    options = ["--guidance", "auto", "--guide", str(made / "run"), "--weights", "power=0.1", "--steps", "2"]
    assert main(command(made, tmp_path, *options, "--scale", "1", "2", "--interval", "0", "1")) == 0
    found = [records.read(path).settings for path in sorted((tmp_path / "points").glob("*.json"))]
    assert [each["guidance"] for each in found] == ["cfg", "auto"]
    assert {each["weights"] for each in found} == {"power-0.1"}
