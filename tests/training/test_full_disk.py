"""A disk that is full, at any write: one line, the last good state, and a run that goes on to the same bits."""

import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from tests.latents import encode_noise

from jlt import files
from jlt.cli import main
from jlt.nn import checkpoint
from jlt.training import TrainConfig, train

CONFIG = TrainConfig(
    size="1x16x2", steps=6, batch_size=4, warmup_steps=2, ema_decays=(0.5,), save_every=2, held_out_every=3, keep_last=2
)


@pytest.fixture(scope="module")
def latents(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return encode_noise(tmp_path_factory.mktemp("latents") / "latents", 20, "ab", stride=4, num_held_out=4)


def outcome(run: Path) -> dict[str, str]:
    found = {}
    for path in sorted(run.rglob("*")):
        if path.name == "checkpoint.json":
            found[str(path.relative_to(run))] = json.dumps({**json.loads(path.read_text()), "seconds": 0})
        elif path.is_file() and path.name != "lock":
            found[str(path.relative_to(run))] = files.sha256(path)
    return found


class Disk:
    """Refuses the write with the number `fails`, counted from 0, and counts all."""

    def __init__(self, fails: int | None) -> None:
        self.fails, self.writes, self.sync = fails, 0, files.sync

    def __call__(self, path: Path) -> None:
        self.writes += 1
        if self.writes - 1 == self.fails:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        self.sync(path)


@pytest.mark.parametrize("share", [0.0, 0.3, 0.6, 0.95, pytest.param(None, marks=pytest.mark.slow)])
def test_a_full_disk_leaves_the_last_good_state(
    latents: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, share: float | None
) -> None:
    disk = Disk(None)
    with monkeypatch.context() as patched:
        patched.setattr(files, "sync", disk)
        train(CONFIG, latents, tmp_path / "whole")
    assert disk.writes > 20
    for fails in range(disk.writes) if share is None else [int(share * disk.writes)]:
        run = tmp_path / f"run-{fails}"
        with monkeypatch.context() as patched:
            patched.setattr(files, "sync", Disk(fails))
            with pytest.raises(OSError, match="No space left on device"):
                train(CONFIG, latents, run)
        for step in checkpoint.list_steps(run):  # whatever is there is whole
            opened = checkpoint.read(checkpoint.folder_of(run, step))
            assert all(opened.tensors(name.removesuffix(".safetensors")) for name in opened.header["files"])
        train(CONFIG, latents, run)
        assert outcome(run) == outcome(tmp_path / "whole"), f"after write {fails} failed"


def test_a_file_that_the_system_will_not_write_is_one_line_and_exit_code_2(latents: Path, tmp_path: Path) -> None:
    """A limit of the operating system on a file's size stands for the disk: the error comes from the kernel."""
    program = (
        "import resource, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (9000, 9000)); "
        "from jlt.cli import main; sys.exit(main(sys.argv[1:]))"
    )
    arguments = ["train", "small", str(latents), str(tmp_path / "run"), "--size", "2x64x2", "--steps", "2"]
    done = subprocess.run([sys.executable, "-c", program, *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 2, done.stderr
    assert done.stderr.startswith("jlt: ")
    assert done.stderr.count("\n") == 1
    assert "safetensors" in done.stderr
    assert not list((tmp_path / "run").rglob("step-*"))
    assert not list((tmp_path / "run").rglob(".tmp-*"))
    assert main(arguments) == 0  # there is room again
