"""What `jlt.load` opens besides a folder: a repository of the Hub, imitated at its client, and an authors' file."""

import json
import os
import shutil
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import jlt
from jlt.cli import main
from jlt.data import Pixels, encode
from jlt.data.authors_checkpoint import import_checkpoint
from jlt.data.idx import Arrays
from jlt.nn import EMA, Transformer, TransformerConfig, checkpoint

CONFIG = TransformerConfig(4, 3, 2, 8, 1, 1, num_classes=2)
REVISION = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A checkpoint with an optimizer's file and a file of code that no one asked for."""
    affine = {"shift": [0.0] * 3, "scale": [1.0] * 3}
    header = {
        "name": "small",
        "target": "x",
        "floor": 0.05,
        "step": 3,
        "seconds": 0.0,
        "latents": {
            "affine": affine,
            "class_names": ["a", "b"],
            "representation_fingerprint": Pixels(3).fingerprint,
        },
    }
    model = Transformer(CONFIG)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.zeros(1, 3, 4, 4), torch.zeros(1), torch.zeros(1, dtype=torch.int64)).sum().backward()
    optimizer.step()
    folder = tmp_path / "uploaded"
    extra = lambda inner: Pixels(3).save(inner / "representation")  # noqa: E731
    checkpoint.save(folder, model, EMA(model, [0.5], [0.1]), optimizer, header, extra)
    (folder / "evil.py").write_text("raise SystemExit")
    return folder


@pytest.fixture
def hub(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Put a folder in the place of the Hub, laid out as the client's cache; yields what it was asked for."""
    import huggingface_hub
    from huggingface_hub.errors import LocalEntryNotFoundError

    asked: list[str] = []
    kept = tmp_path / "cache" / "snapshots" / REVISION

    class Session:
        def head(self, url: str, timeout: float) -> None:
            asked.append(url)
            if os.environ.get("NO_NETWORK"):
                raise OSError("no route\nto host")

    def snapshot_download(
        repository: str, *, revision: str | None, allow_patterns: list[str], local_files_only: bool
    ) -> str:
        if local_files_only:
            if not kept.is_dir():
                raise LocalEntryNotFoundError("not in the cache")
            return str(kept)
        asked.append(f"{repository}@{revision}")
        for path in folder.rglob("*"):
            name = str(path.relative_to(folder))
            if path.is_file() and any(fnmatch(name, pattern) for pattern in allow_patterns):
                (kept / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(path, kept / name)
        return str(kept)

    monkeypatch.setattr(huggingface_hub, "get_session", Session)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    return asked


def test_a_repository_is_opened_as_the_folder_that_was_uploaded(folder: Path, hub: list[str], tmp_path: Path) -> None:
    there, here = jlt.load("org/small"), jlt.load(folder)
    assert there.fingerprint == here.fingerprint
    assert jlt.load("org/small", "power=0.1").weights == "power-0.1"
    assert hub[1] == "org/small@None"
    fetched = {path.name for path in (tmp_path / "cache").rglob("*") if path.is_file()}
    assert not fetched & {"optimizer.safetensors", "evil.py"}
    assert {"checkpoint.json", "representation.json"} <= fetched


def test_a_pinned_revision_is_fetched_once_and_an_unpinned_one_is_never_taken_from_the_cache_in_silence(
    hub: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    jlt.load(f"org/small@{REVISION}")
    assert hub[1] == f"org/small@{REVISION}"
    monkeypatch.setenv("NO_NETWORK", "1")
    hub.clear()
    jlt.load(f"org/small@{REVISION}", "model")
    assert hub == []
    with pytest.raises(ValueError, match=r"^org/small is neither .* nor to be had from the Hub: no route to host$"):
        jlt.load("org/small")


def test_a_path_that_does_not_exist_is_no_repository_where_its_folder_does(
    hub: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    for path in ("runs/x", "x", "a/b/c", tmp_path / "x"):
        with pytest.raises(ValueError, match="does not exist"):
            jlt.load(path)
    assert hub == []


def test_a_repository_without_all_its_weights_is_refused(folder: Path, hub: list[str]) -> None:
    (folder / "ema-0.5.safetensors").unlink()
    with pytest.raises(ValueError, match=r"is missing; checkpoint\.json names it"):
        jlt.load("org/small")


LATENTS = {"affine": {"shift": [0.0] * 3, "scale": [1.0] * 3}, "class_names": ["a", "b"]}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"name": None}, "lacks name"),
        ({"floor": "low"}, "has a malformed entry: could not convert string to float: 'low'"),
        ({"target": "y"}, "has a malformed entry: unknown target 'y'"),
        ({"latents": 5}, "has a malformed entry: 'int' object"),
        ({"latents": {**LATENTS, "affine": {"shift": [0.0] * 3}}}, "has a malformed entry: 'scale'"),
        ({"latents": {**LATENTS, "class_names": ["a"]}}, "names 1 classes, its model has 2"),
    ],
)
def test_a_checkpoint_that_states_what_cannot_be_sampled_is_refused(
    change: dict[str, Any], message: str, folder: Path
) -> None:
    header = {**json.loads((folder / "checkpoint.json").read_text()), **change}
    (folder / "checkpoint.json").write_text(json.dumps({key: value for key, value in header.items() if value}))
    with pytest.raises(ValueError, match=rf"checkpoint\.json {message}"):
        jlt.load(folder)


COMMANDS = [
    "sample RUN out --num 2 --steps 2 --scale 2 --guidance auto --guide RUN",
    "interpolate RUN out --steps 2",
    "invert RUN latents out --num 2 --steps 2",
    "evaluate RUN latents --num 4 --steps 2 --extractor pixels --out out",
    "evaluate RUN --reference REFERENCE --num 4 --steps 2 --extractor pixels --out out",
    "sweep RUN latents --scale 1 2 --interval 0 1 --steps 2 --num 4 --full 4 --extractor pixels --out out",
    "geometry latents --run RUN --no-local --out out",
    "encode mnist out --representation of:RUN --num-held-out 4",
    "train small latents out --init RUN --size 1x8x1 --patch-size 2 --steps 1 --batch-size 4",
    "push RUN org/other --to out",
]


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_takes_a_repository_for_a_run(
    command: str, hub: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    images = np.random.default_rng(0).integers(0, 256, (16, 3, 4, 4), dtype=np.uint8)
    source = Arrays("mnist", images, np.arange(16) % 2, ("a", "b"), "test")
    monkeypatch.setattr("jlt.data.sources.SOURCES", {"mnist": lambda *_: source})
    encode(source, tmp_path / "latents", representation="pixels", normalise="none", num_held_out=8)
    words = command.replace("RUN", f"org/small@{REVISION}").split()
    if "REFERENCE" in words:
        assert main(["reference", "mnist", "real.npz", "--extractor", "pixels"]) == 0
    assert main([word.replace("REFERENCE", "real.npz") for word in words]) == 0
    assert f"org/small@{REVISION}" in hub
    assert any((tmp_path / "out").iterdir())
    assert not (tmp_path / "org").exists()  # nothing is written where a run's own folder would be


@pytest.mark.parametrize("command", ["evaluate", "sweep"])
def test_a_repository_has_no_folder_for_a_record(
    command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main([command, "org/small", "latents"]) == 2
    assert "org/small is no folder of a run; say with --out where its record goes" in capsys.readouterr().err


def test_an_authors_file_is_opened_with_the_target_that_it_does_not_state(
    golden: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, opened = golden / "jlt_p1" / "checkpoint-last.pth", []

    def open_autoencoder(spec: str) -> Any:
        opened.append(spec)
        return Pixels(16)  # the vectors are of 16 channels

    monkeypatch.setattr("jlt.sampling.generator.open_autoencoder", open_autoencoder)
    with pytest.raises(ValueError, match=r"give a target \(x, eps, v\), or .* jlt import"):
        jlt.load(path)
    generator = jlt.load(path, "model", target="x")
    assert opened == ["flux2"]
    made = import_checkpoint(path, tmp_path / "made", Pixels(16))
    assert (generator.target.name, generator.fingerprint) == ("x", jlt.load(made, "model").fingerprint)
    with pytest.raises(ValueError, match="a checkpoint states its own"):
        jlt.load(tmp_path, target="x")
