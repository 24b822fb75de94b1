import errno
import hashlib
import math
import os
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jlt import files


def test_a_file_is_written_with_its_parents(tmp_path):
    files.write_bytes(tmp_path / "a" / "b" / "file", b"new")
    assert (tmp_path / "a" / "b" / "file").read_bytes() == b"new"
    assert [p.name for p in (tmp_path / "a" / "b").iterdir()] == ["file"]


def no_space(*args, **kwargs):
    raise OSError(errno.ENOSPC, "No space left on device")


def half_then_no_space(path, data):
    with path.open("wb") as file:
        file.write(data[: len(data) // 2])
    no_space()


def interrupt(*args, **kwargs):
    raise KeyboardInterrupt


FAULTS = {
    "writing nothing": (Path, "write_bytes", no_space),
    "writing half": (Path, "write_bytes", half_then_no_space),
    "flushing": (os, "fsync", no_space),
    "opening to flush": (os, "open", no_space),
    "renaming": (Path, "replace", no_space),
    "Ctrl-C before renaming": (Path, "replace", interrupt),
}


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("old", [b"old", None], ids=["over a file", "new file"])
def test_an_error_at_any_point_leaves_the_old_file_and_no_temporary(tmp_path, monkeypatch, fault, old):
    path = tmp_path / "file"
    if old is not None:
        path.write_bytes(old)
    with monkeypatch.context() as patch:
        patch.setattr(*FAULTS[fault])
        with pytest.raises((OSError, KeyboardInterrupt)):
            files.write_bytes(path, b"something new")
    assert [p.name for p in tmp_path.iterdir()] == ([] if old is None else ["file"])
    if old is not None:
        assert path.read_bytes() == old


def test_an_error_after_the_rename_leaves_the_new_file_whole(tmp_path, monkeypatch):
    path = tmp_path / "file"
    path.write_bytes(b"old")
    fsync = os.fsync
    calls = []

    def second_fails(descriptor):
        calls.append(descriptor)
        no_space() if len(calls) > 1 else fsync(descriptor)

    monkeypatch.setattr(os, "fsync", second_fails)
    with pytest.raises(OSError, match="No space"):
        files.write_bytes(path, b"new")
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == {"file": b"new"}


@pytest.mark.parametrize("point", ["filling", "renaming"])
def test_an_error_while_a_folder_is_filled_leaves_nothing(tmp_path, monkeypatch, point):
    if point == "renaming":
        monkeypatch.setattr(Path, "replace", no_space)

    def fill():
        with files.replaced(tmp_path / "folder") as temporary:
            temporary.mkdir()
            (temporary / "first").write_bytes(b"1")
            if point == "filling":
                no_space()

    with pytest.raises(OSError, match="No space"):
        fill()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("error", [no_space, interrupt])
def test_an_error_while_a_folder_takes_anothers_place_leaves_the_old_one(tmp_path, monkeypatch, error):
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "old").write_bytes(b"1")
    monkeypatch.setattr(Path, "replace", error)

    def fill():
        with files.replaced(tmp_path / "folder") as temporary:
            temporary.mkdir()

    with pytest.raises((OSError, KeyboardInterrupt)):
        fill()
    assert [str(p.relative_to(tmp_path)) for p in sorted(tmp_path.rglob("*"))] == ["folder", "folder/old"]


def test_a_folder_appears_whole(tmp_path):
    with files.replaced(tmp_path / "folder") as temporary:
        temporary.mkdir()
        (temporary / "first").write_bytes(b"1")
        assert not (tmp_path / "folder").exists()
    assert (tmp_path / "folder" / "first").read_bytes() == b"1"


def test_every_byte_reaches_the_disk_before_the_new_name(tmp_path, monkeypatch):
    order = []
    fsync, replace = os.fsync, Path.replace
    monkeypatch.setattr(os, "fsync", lambda d: (order.append("flush"), fsync(d))[1])
    monkeypatch.setattr(Path, "replace", lambda self, target: (order.append("rename"), replace(self, target))[1])
    files.write_bytes(tmp_path / "file", b"new")
    assert order[:2] == ["flush", "rename"]
    assert set(order[2:]) == {"flush"}  # the folder that holds the name


def test_leftovers_are_removed_and_nothing_else(tmp_path):
    (tmp_path / f"{files.TEMPORARY}1-file").write_bytes(b"half")
    (tmp_path / f"{files.TEMPORARY}2-folder").mkdir()
    (tmp_path / f"{files.TEMPORARY}2-folder" / "x").write_bytes(b"half")
    (tmp_path / "file").write_bytes(b"whole")
    files.remove_temporaries(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


@settings(deadline=None, max_examples=30)
@given(json_values)
def test_json_comes_back_as_it_was_written(tmp_path_factory, value):
    path = tmp_path_factory.getbasetemp() / "value.json"
    files.write_json(path, value)
    assert files.read_json(path) == value


@given(json_values)
def test_settings_do_not_differ_from_themselves(value):
    assert list(files.differences(value, value)) == []


def test_settings_that_differ_are_named_with_both_their_values_however_deep_they_lie():
    there = {"base": {"rate": 0.1, "flip": True, "size": "4x64x2"}, "steps": 5, "runs": [{"seed": 0}, {"seed": 1}]}
    here = {"base": {"rate": 0.5, "flip": True, "size": "4x64x2"}, "steps": [5], "runs": [{"seed": 1}, {"seed": 2}]}
    assert list(files.differences(there, here)) == [
        "base.rate is 0.1 there and 0.5 here",
        "steps is 5 there and [5] here",
        "runs has {'seed': 0} there alone",
        "runs has {'seed': 2} here alone",
    ]
    assert list(files.differences([{"a": 1}, {"a": 2}], [{"a": 2}, {"a": 1}], "runs")) == ["runs are in another order"]


@pytest.mark.parametrize("number", [math.nan, math.inf])
def test_numbers_that_are_not_finite_are_not_written(tmp_path, number):
    with pytest.raises(ValueError, match="JSON"):
        files.write_json(tmp_path / "file.json", {"loss": number})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("data", [b"", b"{", b"\xff\xfe", b"{'a': 1}"])
def test_a_file_that_is_no_json_is_refused_by_name(tmp_path, data):
    (tmp_path / "file.json").write_bytes(data)
    with pytest.raises(ValueError, match=r"file\.json is not a JSON file"):
        files.read_json(tmp_path / "file.json")


def test_sha256_is_that_of_the_bytes(tmp_path):
    (tmp_path / "file").write_bytes(b"abc" * 100_000)
    assert files.sha256(tmp_path / "file") == hashlib.sha256(b"abc" * 100_000).hexdigest()


def test_a_fingerprint_ignores_the_order_of_keys_and_nothing_else():
    assert files.fingerprint({"a": 1, "b": 2}) == files.fingerprint({"b": 2, "a": 1})
    assert len({files.fingerprint(v) for v in ({"a": 1}, {"a": 2}, {"b": 1}, {"a": "1"}, [1], None)}) == 6
    assert len(files.fingerprint(None)) == 16


def test_choose_names_the_nearest_option_and_all_of_them():
    table = {"heun": 1, "euler": 2}
    assert files.choose("solver", "heun", table) == 1
    with pytest.raises(ValueError, match=r"unknown solver 'huen', did you mean 'heun'\?; the options are heun, euler"):
        files.choose("solver", "huen", table)
    with pytest.raises(ValueError, match=r"unknown solver 'dpm'; the options"):
        files.choose("solver", "dpm", table)
