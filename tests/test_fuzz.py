"""Configurations, headers and records of any content: a result, or a ValueError, and never another error."""

import contextlib
import dataclasses
import json
import tempfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jlt.evaluation import records
from jlt.evaluation.records import Record, Value
from jlt.flow import TimeDensity, target
from jlt.nn import TransformerConfig, checkpoint
from jlt.training import TrainConfig

numbers = st.integers(-(2**70), 2**70) | st.floats()
texts = st.text(max_size=12)
anything = st.recursive(
    st.none() | st.booleans() | numbers | texts,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3),
    max_leaves=8,
)
HEADER = {
    "format_version": 1, "step": 1, "files": {"model.safetensors": "0", "ema-0.9.safetensors": "1"},
    "model": dataclasses.asdict(TransformerConfig(4, 2, 1, 16, 1, 2, 3)),
}  # fmt: skip
RECORD = dataclasses.asdict(Record("evaluate", "a", {"FD": Value(1.0)}, {"steps": 1}, commit="c", hardware="h"))


@given(texts)
def test_a_targets_name_of_any_text(name: str) -> None:
    with contextlib.suppress(ValueError):
        assert target(name).name


@given(st.fixed_dictionaries({}, optional={f.name: numbers for f in dataclasses.fields(TrainConfig) if f.type is int}))
def test_a_recipe_with_any_numbers(changes: dict[str, Any]) -> None:
    with contextlib.suppress(ValueError):
        TrainConfig(**changes)


@given(texts | st.from_regex(r"\d{1,6}x\d{1,6}x\d{1,6}", fullmatch=True))
def test_a_size_of_any_text(size: str) -> None:
    with contextlib.suppress(ValueError):
        TrainConfig(size=size).model((2, 4, 4), 3)


@given(texts, st.floats(), st.floats(), st.floats())
def test_a_time_density_of_any_numbers(name: str, mean: float, std: float, shift: float) -> None:
    with contextlib.suppress(ValueError):
        TimeDensity(name, mean, std, shift)


@given(st.dictionaries(st.sampled_from(sorted(HEADER)), anything) | anything)
def test_a_checkpoints_header_of_any_content(changes: Any) -> None:
    header = {**HEADER, **changes} if isinstance(changes, dict) else changes
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / checkpoint.HEADER).write_text(json.dumps(header))
        with contextlib.suppress(ValueError):
            checkpoint.read(Path(folder)).load_model("model")
            pytest.fail("there is no weight to load")


@given(st.dictionaries(st.sampled_from(sorted(RECORD)), anything) | anything)
def test_a_record_of_any_content(changes: Any) -> None:
    content = {**RECORD, **changes} if isinstance(changes, dict) else changes
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "record.json"
        path.write_text(json.dumps(content))
        with contextlib.suppress(ValueError):
            assert isinstance(records.read(path), Record)
