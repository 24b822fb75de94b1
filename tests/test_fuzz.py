"""Configurations, headers and records of any content: a result, or a ValueError, and never another error."""

import contextlib
import dataclasses
import io
import json
import tarfile
import tempfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jlt.data import tar
from jlt.data.remote import File
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


blocks = st.binary(min_size=512, max_size=512) | st.builds(
    lambda name, size, kind, prefix: header_block(name, size, kind, prefix),
    st.binary(max_size=100), st.binary(min_size=12, max_size=12) | st.integers(0, 4096).map(lambda n: b"%011o\0" % n),
    st.sampled_from([bytes([kind]) for kind in b"\x000123456789LKSxgXVZ"]), st.binary(max_size=155),
)  # fmt: skip


def header_block(name: bytes, size: bytes, kind: bytes, prefix: bytes) -> bytes:
    """A tar header of any content with a checksum that is right."""
    parts = (name.ljust(100, b"\0"), bytes(24), size, bytes(12), b" " * 8, kind, bytes(100), b"ustar\x0000", bytes(80))
    block = (b"".join(parts) + prefix).ljust(512, b"\0")
    return block[:148] + b"%06o\0 " % sum(block) + block[156:]


@given(st.lists(blocks, max_size=6), st.binary(max_size=600))
def test_a_tar_shard_of_any_blocks(parts: list[bytes], tail: bytes) -> None:
    data = b"".join(parts) + tail
    with tempfile.NamedTemporaryFile(suffix=".tar") as file:
        file.write(data)
        file.flush()
        with contextlib.suppress(ValueError):
            for member, label in tar.index(File(file.name, len(data))):
                assert 512 <= member.offset <= member.offset + member.size <= len(data)
                assert label >= -1


@given(st.dictionaries(st.integers(0, 4000), st.integers(0, 255), max_size=8), st.integers(0, 6000))
def test_a_tar_shard_with_any_bytes_changed_and_cut(changes: dict[int, int], kept: int) -> None:
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w", format=tarfile.PAX_FORMAT) as archive:
        for name, content in ((f"{'a' * 120}.png", b"x"), ("b.cls", b"1"), ("b.json", b'{"label": 2}')):
            header = tarfile.TarInfo(name)
            header.size = len(content)
            archive.addfile(header, io.BytesIO(content))
    data = bytearray(packed.getvalue()[:kept])
    for place, value in changes.items():
        if place < len(data):
            data[place] = value
    with tempfile.NamedTemporaryFile(suffix=".tar") as file, contextlib.suppress(ValueError):
        file.write(data)
        file.flush()
        assert all(label in (-1, 1, 2) for _, label in tar.index(File(file.name, len(data)))) or changes
