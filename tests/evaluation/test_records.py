import dataclasses
import math
import platform
import statistics
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jlt import files
from jlt.evaluation import records
from jlt.evaluation.records import Figure, Record, Value


def example(**changes):
    record = Record(
        kind="compare",
        name="x against v",
        values={"FD": Value(7.25, 0.5, 3), "time": Value(12.0, unit="s")},
        settings={"target": "x", "decays": [0.99, 0.999], "nested": {"steps": 10, "floor": None}},
        fingerprints={"data": "00ff"},
        figures={"loss": Figure("Loss", "step", "loss", {"x": ([0, 1], [2.0, 1.5])}, y_scale="log")},
        pictures={"Samples": "samples.png"},
        parts=(Record("train", "x", {"loss": Value(0.1)}, {"target": "x"}),),
    )
    return dataclasses.replace(record, **changes)


def test_a_record_comes_back_as_it_was_written(tmp_path):
    records.write(example(), tmp_path / "record.json")
    assert records.read(tmp_path / "record.json") == example(created=records.read(tmp_path / "record.json").created)


def test_a_figure_written_without_spreads_and_level_has_none(tmp_path):
    written = dataclasses.asdict(example())
    del written["figures"]["loss"]["spreads"], written["figures"]["loss"]["level"]
    files.write_json(tmp_path / "record.json", written)
    assert records.read(tmp_path / "record.json").figures == example().figures


def test_a_record_states_where_it_came_from():
    record = example()
    assert record.versions["python"] == platform.python_version()
    assert {"jlt", "torch", "numpy"} <= set(record.versions)
    assert "core" in record.hardware
    assert record.command.startswith("jlt")
    assert record.created.endswith("+00:00")
    assert record.commit


def test_the_command_can_be_pasted_into_a_shell(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["/bin/jlt", "train", "--data", "my pictures"])
    assert example().command == "jlt train --data 'my pictures'"


def test_the_commit_is_gits_and_marks_changes(monkeypatch, tmp_path):
    package = tmp_path / "src" / "jlt" / "evaluation"
    package.mkdir(parents=True)
    (package / "records.py").write_text("first")
    git = ["git", "-c", "user.name=n", "-c", "user.email=e@example.org"]
    for arguments in (["init", "-q"], ["add", "."], ["commit", "-qm", "First"]):
        subprocess.run([*git, *arguments], cwd=tmp_path, check=True)
    head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=tmp_path, capture_output=True, text=True).stdout.strip()
    monkeypatch.setattr(records, "__file__", str(package / "records.py"))
    assert records.current_commit.__wrapped__() == head[:12]
    (package / "records.py").write_text("second")
    assert records.current_commit.__wrapped__() == head[:12] + "+changes"


def test_an_installation_without_checkout_states_its_release(monkeypatch, tmp_path):
    monkeypatch.setattr(records, "__file__", str(tmp_path / "a" / "b" / "c" / "records.py"))
    assert records.current_commit.__wrapped__() == f"release {records.package_versions()['jlt']}"


@pytest.mark.parametrize("version", [0, 2, "1", None])
def test_a_record_of_another_version_is_refused_with_both(tmp_path, version):
    path = tmp_path / "record.json"
    files.write_json(path, {**dataclasses.asdict(example()), "format_version": version})
    with pytest.raises(ValueError, match=rf"record\.json is a record of format version {version}, this jlt reads 1"):
        records.read(path)


DAMAGES = {
    **{f"without {key}": {key: ...} for key in ("kind", "values", "settings", "figures", "parts")},
    "surplus key": {"color": 1},
    "value is a number": {"values": {"FD": 3}},
    "values is a list": {"values": [3]},
    "half a line": {"figures": {"loss": {"caption": "", "x_label": "", "y_label": "", "lines": {"x": [[0, 1]]}}}},
    "incomplete part": {"parts": [{"kind": "train"}]},
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_an_incomplete_record_is_refused_by_name(tmp_path, damage):
    data = {**dataclasses.asdict(example()), **DAMAGES[damage]}
    files.write_json(tmp_path / "record.json", {key: value for key, value in data.items() if value is not ...})
    with pytest.raises(ValueError, match=r"record\.json is not a complete record"):
        records.read(tmp_path / "record.json")


@pytest.mark.parametrize("data", [[], 3, "text", None])
def test_json_that_is_no_record_is_refused(tmp_path, data):
    files.write_json(tmp_path / "record.json", data)
    with pytest.raises(ValueError, match=r"record\.json is a record of format version None"):
        records.read(tmp_path / "record.json")


def test_a_value_that_is_not_finite_is_not_written(tmp_path):
    with pytest.raises(ValueError, match="JSON"):
        records.write(example(values={"FD": Value(math.nan)}), tmp_path / "record.json")
    assert list(tmp_path.iterdir()) == []


@given(st.lists(st.floats(-1e6, 1e6), min_size=2, max_size=20))
def test_mean_and_spread_are_those_of_the_statistics_module(values):
    found = records.mean_and_spread(values)
    assert found.value == pytest.approx(statistics.fmean(values), rel=1e-12, abs=1e-9)
    assert found.spread == pytest.approx(statistics.stdev(values), rel=1e-9, abs=1e-9)  # cancellation at 1e6
    assert found.count == len(values)


def test_one_repetition_has_no_spread_and_none_no_value():
    assert records.mean_and_spread([3.0]) == Value(3.0, None, 1)
    with pytest.raises(ValueError, match="at least 1 repetition, got 0"):
        records.mean_and_spread([])


def test_a_value_reads_as_a_person_writes_it():
    assert str(Value(7.25391, 0.5123, 3)) == "7.254 ± 0.51"
    assert str(Value(12.0, unit="s")) == "12 s"


def test_reading_records_imports_no_pytorch():
    code = (
        "import sys; from jlt.evaluation import records; records.describe_hardware(); sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
