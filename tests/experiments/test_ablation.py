"""The page of the ablation says what the records say."""

import collections
import dataclasses
import re
import runpy
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from jlt.cli import main
from jlt.cli.compare import variants
from jlt.evaluation import records
from jlt.experiments.presets import PRESETS

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def ablation() -> dict[str, Any]:
    return runpy.run_path(str(ROOT / "benchmarks" / "ablation.py"))


def test_the_tables_of_the_page_are_those_of_the_records(ablation: dict[str, Any]) -> None:
    page = (ROOT / "docs" / "ablation.md").read_text()
    assert ablation["filled"](page, *ablation["read"](ROOT / "docs" / "records")) == page
    assert all(f"<!-- table {study} -->" in page for study in ablation["STUDIES"])


def test_the_commands_of_the_page_make_the_rows_of_its_tables_and_no_others(ablation: dict[str, Any]) -> None:
    page = (ROOT / "docs" / "ablation.md").read_text().replace("\\\n", " ")
    Row, seeds = ablation["Row"], collections.Counter[Any]()
    for command in (line for line in page.splitlines() if line.startswith("jlt compare fashion fm/kept-32 ")):
        base = dict(re.findall(r"--base\.(\S+) (\S+)", command))
        shared = {
            "loss_space": PRESETS["fashion"].config.loss_space,
            **{k.replace("-", "_"): v for k, v in base.items()},
        }
        for run in variants(command.split("--vary ")[1].split(" --")[0].split()):
            settings = {**shared, **run, "latents": Path(run.get("latents", "kept-32")).name}
            seed, patch_size = settings.pop("seed"), int(settings.pop("patch_size", 1))
            seeds[Row(**settings, patch_size=patch_size)] += seed in (0, 1, 2)
    assert seeds == {row: 3 for study in ablation["STUDIES"].values() for row in study.rows}
    config = PRESETS["fashion"].config
    assert (config.size, config.patch_size) == (Row("x").size, Row("x").patch_size)


def test_a_comparison_fills_its_table_with_means_and_paired_differences(
    ablation: dict[str, Any], tmp_path: Path
) -> None:
    generator = np.random.default_rng(0)
    for name, array in {
        "images-idx3": generator.integers(0, 256, (60, 28, 28), dtype=np.uint8),
        "labels-idx1": np.arange(60, dtype=np.uint8) % 10,
    }.items():
        header = bytes([0, 0, 8, array.ndim]) + b"".join(size.to_bytes(4, "big") for size in array.shape)
        (tmp_path / f"train-{name}-ubyte").write_bytes(header + array.tobytes())
    latents, out = tmp_path / "kept-32", tmp_path / "out"
    encode = ["encode", f"idx:{tmp_path}", str(latents), "--stride", "8", "--channels", "32", "--num-held-out", "20"]
    assert main(encode) == 0
    tiny = [
        "--base.size",
        "1x32x2",
        "--base.steps",
        "4",
        "--base.warmup-steps",
        "1",
        "--base.batch-size",
        "4",
        "--base.held-out-every",
        "0",
    ]
    sampling = ["--sampling.num-images", "10", "--sampling.steps", "2", "--extractor", "pixels"]
    vary = ["--vary", "target+loss_space=x+v,x+x,v+v,eps+v", "seed=0,1"]
    assert main(["compare", "fashion", str(latents), str(out), *tiny, *sampling, *vary]) == 0
    record = records.read(out / "record.json")
    assert ablation["record_of"]([record], ablation["Row"]("x")) is None  # of another size
    record = dataclasses.replace(record, settings={**record.settings, "size": "4x128x4"})
    study = ablation["STUDIES"]["patch-1"]
    forecasts = records.Record("forecasts", "", {}, {}, parts=(ablation["forecast"](latents, 1, 128),))
    *_, x, x_own, v, eps = ablation["table"](study, [record], forecasts).splitlines()
    columns = [part for part in record.parts if part.kind == "evaluate"]
    for line, column in zip((x, x_own, v, eps), columns, strict=True):
        assert f" {column.values['FD (pixels 8 x 8)']} |" in line
    assert x.startswith("| x | v |")
    (runs,) = [part for part in record.parts if part.kind == "runs"]
    found = {tuple(run.settings.values()): run.values["FD (pixels 8 x 8)"].value for run in runs.parts}
    assert list(runs.parts[0].settings) == ["loss_space", "seed", "target"]
    difference = sum(found["v", seed, "v"] - found["v", seed, "x"] for seed in (0, 1)) / 2
    assert f" {difference:.3g} (" in v
    least, most = (forecasts.parts[0].values[name].value for name in ("v", "v, at most"))
    assert f" {least:.3f} to {most:.3f} |" in v
    decoded = next(part for part in record.parts if part.name == "20 held-out images, encoded and decoded")
    assert ablation["ceiling"](record, ablation["Row"]("v")) == decoded.values["FD (pixels 8 x 8)"]
    assert ablation["table"](study, [], None).count(ablation["NOT_RUN"]) == 4 * 5
    assert ablation["curves"]([record]) == {}  # a curve along patch sizes needs both
    other = dataclasses.replace(record, settings={**record.settings, "patch_size": 2})
    (figure,) = ablation["curves"]([record, other]).values()
    distances = [column.values["FD (pixels 8 x 8)"].value for column in columns]
    assert list(figure.lines) == ["x", "x, x-loss", "v", "eps"]
    assert list(figure.lines.values()) == [([1, 2], [distance] * 2) for distance in distances]
    spreads = [column.values["FD (pixels 8 x 8)"].spread or 0 for column in columns]  # none where seeds agree
    assert list(figure.spreads.values()) == [[spread] * 2 for spread in spreads]
