"""Saving while training goes on."""

import dataclasses
import errno
import json
import os
import subprocess
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tests.latents import encode_noise

from jlt import files
from jlt.nn import checkpoint
from jlt.training import TrainConfig, read_metrics, train

pytestmark = pytest.mark.usefixtures("one_thread")

CONFIG = TrainConfig(
    size="1x16x2", steps=12, batch_size=6, learning_rate=1e-2, warmup_steps=3, ema_decays=(0.9,), save_every=4,
    held_out_every=5, loss_space="x", ema_lengths=(0.05, 0.1), snapshot_every=2, keep_last=9,
)  # fmt: skip


@pytest.fixture(scope="module")
def latents(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return encode_noise(tmp_path_factory.mktemp("latents") / "latents")


@pytest.fixture(scope="module")
def whole(latents: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("whole") / "run"
    train(CONFIG, latents, run)
    return run


def hashes(run: Path) -> dict[str, object]:
    """Return the hashes of all tensors by folder, and of the metrics."""
    found: dict[str, object] = {
        f"{kind}/{step}": checkpoint.read(folder).header["files"]
        for kind in ("checkpoints", "ema")
        for step, folder in checkpoint.list_steps(run, kind).items()
    }
    return found | {"metrics": files.sha256(run / "metrics.jsonl")}


def test_steps_are_taken_while_a_checkpoint_is_written_and_it_holds_the_state_of_its_own_step(
    latents: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, reached, waited = dataclasses.replace(CONFIG, snapshot_every=12), threading.Event(), list[bool]()
    sync = files.sync

    def slow(path: Path) -> None:
        if "step-00000004" in path.name:
            waited.append(reached.wait(timeout=60))
        sync(path)

    def progress(step: int, loss: float) -> None:
        if step == 7:  # three steps after the save began
            assert not (tmp_path / "run" / "checkpoints" / "step-00000004").exists()
            reached.set()

    monkeypatch.setattr(files, "sync", slow)
    train(config, latents, tmp_path / "run", progress=progress)
    assert waited
    assert all(waited)
    ours, theirs = hashes(tmp_path / "run"), hashes(whole)
    assert ours["metrics"] == theirs["metrics"]
    for step in (4, 8, 12):
        assert ours[f"checkpoints/{step}"] == theirs[f"checkpoints/{step}"]


def test_a_write_that_fails_in_the_thread_ends_the_training_with_its_error(
    latents: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*arguments: object) -> str:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(checkpoint, "write_tensors", full)
    with pytest.raises(OSError, match="No space left on device"):
        train(CONFIG, latents, tmp_path / "run")
    assert max(line["step"] for line in read_metrics(tmp_path / "run")) < 12  # no later than the next save


KILLED = """
import threading
from pathlib import Path
from jlt import files
from jlt.training import TrainConfig, train

def work(rank, latents, run, settings):
    sync, begun = files.sync, threading.Event()
    def stuck(path):
        if "step-00000008" in path.name:
            begun.set()
            threading.Event().wait()
        sync(path)
    files.sync = stuck
    def progress(step, loss):
        if step == 9:
            assert begun.wait(60)
            os.kill(os.getpid(), 9)  # in the middle of the write
    train(TrainConfig(**settings), Path(latents), Path(run), progress=progress)

import json
print(forked(1, lambda rank: work(rank, *json.loads(sys.argv[1]))))
"""


def test_a_run_killed_while_it_writes_has_the_checkpoint_before_and_goes_on_to_the_same_bits(
    latents: Path, whole: Path, tmp_path: Path, fork: Callable[..., subprocess.CompletedProcess[str]]
) -> None:
    settings = {name: value for name, value in dataclasses.asdict(CONFIG).items() if name != "times"}
    done = fork(KILLED, json.dumps([str(latents), str(tmp_path / "run"), settings]))
    assert done.stdout.strip() == "[-9]", done.stderr
    assert sorted(checkpoint.list_steps(tmp_path / "run")) == [4]
    assert list((tmp_path / "run").rglob(".tmp-*"))
    train(CONFIG, latents, tmp_path / "run")
    assert hashes(tmp_path / "run") == hashes(whole)
    assert not list((tmp_path / "run").rglob(".tmp-*"))


def test_a_length_that_was_not_kept_is_loaded_as_if_it_had_been(latents: Path, whole: Path, tmp_path: Path) -> None:
    config = dataclasses.replace(CONFIG, steps=60, snapshot_every=4, held_out_every=0, save_every=60)
    run = train(config, latents, tmp_path / "run").parent.parent
    direct = train(dataclasses.replace(config, ema_lengths=(0.07,)), latents, tmp_path / "direct")

    def weights(folder: Path, name: str) -> torch.Tensor:
        return torch.cat([p.detach().flatten() for p in checkpoint.read(folder).load_model(name).parameters()])

    kept, other = weights(direct, "power=0.07"), weights(run, "power=0.1")
    for folder in (run, checkpoint.folder_of(run, 60, "ema")):
        # far nearer to the one that was kept than the nearest that the run kept is
        assert (weights(folder, "power=0.07") - kept).norm() < 0.05 * (other - kept).norm()
    opened = checkpoint.read(whole)
    assert opened.fingerprint("power=0.07") != opened.fingerprint("power=0.08")
    with pytest.raises(ValueError, match=r"give power=0.001 at step 12 to within \d+%, 10% is wanted"):
        opened.load_model("power=0.001")
    with pytest.raises(ValueError, match="must be a number"):
        opened.load_model("power=long")
    with pytest.raises(ValueError, match=r"unknown weights 'power=0\.07'"):
        checkpoint.Checkpoint(whole, {"files": {"model.safetensors": ""}}).resolve("power=0.07")
