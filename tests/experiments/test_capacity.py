import pytest
import torch

from jlt.evaluation import records
from jlt.experiments.capacity import TARGETS, measure_capacity, ranges
from jlt.experiments.report import page

STEEP = torch.logspace(1, -3, 12, dtype=torch.float64)


def test_the_forecast_names_each_targets_judgements_and_what_it_keeps(tmp_path):
    record = measure_capacity(STEEP, 4)
    assert [part.name for part in record.parts] == list(TARGETS)
    for part in record.parts:
        assert sum(value.value for name, value in part.values.items() if name.startswith("kept")) == 4
    x, v = record.parts[0].values, record.parts[3].values
    # x keeps the 4 largest of 12 variances; the others' variance is then missing from samples, but for the floor
    assert x["kept of the 4 largest directions"].value == 4
    missing = (STEEP[4:].sum() / STEEP.sum()).item()
    assert x["Frechet distance / variance"].value == pytest.approx(missing, rel=0.1)
    ratio = v["Frechet distance / variance"].value / x["Frechet distance / variance"].value
    assert record.values["Frechet distance of v / that of x"].value == pytest.approx(ratio)
    assert record.settings["recommended"] == "x"
    records.write(record, tmp_path / "record.json")
    assert "Forecast Frechet distance" in page(records.read(tmp_path / "record.json"), tmp_path)


def test_at_rank_0_every_targets_error_is_that_of_reading_nothing():
    lines = measure_capacity(STEEP, 0, floor=0.0).figures["error"].lines
    assert lines["x"][1][0] == pytest.approx(1)  # all of the variance
    noise = 12 / STEEP.sum().item()  # v says z: (1 - t)^2 (lambda + 1), a third of it over uniform times
    assert lines["v"][1][0] == pytest.approx((1 + noise) / 3, rel=1e-5)


def test_a_rank_above_the_directions_is_refused():
    with pytest.raises(ValueError, match=r"rank must be in \[0, 12\] for 12 directions, got 13"):
        measure_capacity(STEEP, 13)


@pytest.mark.parametrize(("numbers", "text"), [([], "none"), ([3], "3"), ([0, 1, 2, 5, 7, 8], "0-2, 5, 7-8")])
def test_ranges_read_as_one_writes_them(numbers, text):
    assert ranges(numbers) == text
