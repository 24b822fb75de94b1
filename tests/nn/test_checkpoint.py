"""The checkpoint format: whole, verified, free of pickle, readable without PyTorch."""

import json
import shutil
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from jlt import files
from jlt.nn import EMA, Transformer, TransformerConfig, checkpoint

CONFIG = TransformerConfig(4, 2, 1, 16, 1, 2, num_classes=3)


def saved(folder: Path, steps: int = 2) -> tuple[Path, Transformer, EMA, torch.optim.AdamW]:
    model = Transformer(CONFIG)
    ema, optimizer = EMA(model, [0.9, 0.99]), torch.optim.AdamW(model.parameters(), lr=0.1)
    for _ in range(steps):
        model(torch.randn(2, 2, 4, 4), torch.rand(2), torch.tensor([0, 3])).sub(1).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        ema.update(model)
    path = checkpoint.folder_of(folder, steps)
    checkpoint.save(path, model, ema, optimizer, {"step": steps, "note": "kept"})
    return path, model, ema, optimizer


def test_everything_comes_back_to_the_bit(tmp_path: Path) -> None:
    path, model, ema, optimizer = saved(tmp_path)
    opened = checkpoint.read(tmp_path)  # a run folder means its last checkpoint
    assert (opened.folder, opened.step, opened.header["note"], opened.config) == (path, 2, "kept", CONFIG)
    for which, expected in [
        ("model", dict(model.named_parameters())),
        ("ema", ema.averages[0.9]),
        ("0.99", ema.averages[0.99]),
    ]:
        loaded = dict(opened.load_model(which).named_parameters())
        assert all(torch.equal(loaded[name], expected[name]) for name in expected)
    fresh = Transformer(CONFIG)
    other = torch.optim.AdamW(fresh.parameters(), lr=0.1)
    checkpoint.load_optimizer(fresh, other, opened.tensors("optimizer"))
    for ours, theirs in zip(model.parameters(), fresh.parameters(), strict=True):
        for entry, value in optimizer.state[ours].items():
            assert torch.equal(value, other.state[theirs][entry])


def test_it_is_read_without_pytorch(tmp_path: Path) -> None:
    path, model, _, _ = saved(tmp_path)
    program = f"""
import json, sys
from pathlib import Path
from safetensors.numpy import load_file
folder = Path({str(path)!r})
header = json.loads((folder / "checkpoint.json").read_text())
print(sum(t.size for t in load_file(folder / "model.safetensors").values()), header["step"], "torch" in sys.modules)
"""
    out = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout.split()
    assert out == [str(sum(p.numel() for p in model.parameters())), "2", "False"]


def test_the_last_checkpoint_is_the_one_with_most_steps(tmp_path: Path) -> None:
    for steps in (3, 1):  # the file system's order is not asked
        saved(tmp_path, steps)
    assert checkpoint.read(tmp_path).step == 3


def test_a_copy_kept_beside_a_checkpoint_is_no_step_of_the_run(tmp_path: Path) -> None:
    path, *_ = saved(tmp_path)
    shutil.copytree(path, path.with_name(f"{path.name} (copy)"))
    path.with_name("step-00000009").touch()
    assert checkpoint.list_steps(tmp_path) == {2: path}
    assert checkpoint.read(tmp_path).folder == path


def damage(path: Path, how: str) -> None:
    header: dict[str, Any] = json.loads((path / "checkpoint.json").read_text())
    weights = path / "model.safetensors"
    if how == "missing file":
        weights.unlink()
    elif how == "truncated":
        weights.write_bytes(weights.read_bytes()[:-9])
    elif how == "bit flipped":
        data = bytearray(weights.read_bytes())
        data[-5] ^= 1
        weights.write_bytes(bytes(data))
    elif how == "pickle":
        torch.save({"a": torch.zeros(1)}, weights)
    elif how == "absurd header":
        weights.write_bytes(struct.pack("<Q", 2**60) + b"{}")
        header["files"]["model.safetensors"] = files.sha256(weights)
    elif how == "other version":
        header["format_version"] = 99
    elif how == "other architecture":
        header["model"]["hidden_size"] = 32
    elif how == "step of words":
        header["step"] = "two"
    elif how == "decay of words":
        header["files"]["ema-slow.safetensors"] = "0"
    elif how == "keys missing":
        del header["step"]
    elif how == "no JSON":
        (path / "checkpoint.json").write_text("{")
        return
    (path / "checkpoint.json").write_text(json.dumps(header))


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("missing file", r"model\.safetensors is missing; checkpoint\.json names it"),
        ("truncated", r"has SHA-256 .*, checkpoint\.json promises"),
        ("bit flipped", r"has SHA-256 .*, checkpoint\.json promises"),
        ("pickle", r"has SHA-256 .*, checkpoint\.json promises"),
        ("absurd header", "is not a safetensors file"),
        ("other version", "format version 99, this jlt reads 1"),
        ("other architecture", r"tensor 'embed\.weight' is \[16, 2\] in .*, the model expects \[32, 2\]"),
        ("step of words", r"checkpoint\.json has a malformed entry: invalid literal .* 'two'"),
        ("decay of words", r"checkpoint\.json has a malformed entry: could not convert string to float: 'slow'"),
        ("keys missing", r"checkpoint\.json lacks step"),
        ("no JSON", r"checkpoint\.json is not a JSON file"),
    ],
)
def test_a_damaged_checkpoint_is_refused_with_the_reason(tmp_path: Path, how: str, message: str) -> None:
    path, *_ = saved(tmp_path)
    damage(path, how)
    with pytest.raises(ValueError, match=message):
        checkpoint.read(tmp_path).load_model("model")


@pytest.mark.parametrize(
    ("name", "message"),
    [("absent", "does not exist"), ("file", "is a file"), ("empty", "is no run and no checkpoint")],
)
def test_what_is_no_checkpoint_is_refused(tmp_path: Path, name: str, message: str) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=message):
        checkpoint.read(tmp_path / name)


def test_unknown_weights_are_refused_with_the_options(tmp_path: Path) -> None:
    saved(tmp_path)
    with pytest.raises(
        ValueError, match=r"unknown weights '0\.999', did you mean '0\.99'\?; the options are ema, model"
    ):
        checkpoint.read(tmp_path).load_model("0.999")
