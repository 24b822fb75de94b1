"""A run killed outright at random moments ends, to the bit, as one that was never touched."""

import json
import multiprocessing
import random
from pathlib import Path

import pytest
import torch

from jlt import files
from jlt.data import encode
from jlt.data.idx import Arrays
from jlt.training import TrainConfig, read_metrics, train

CONFIG = TrainConfig(
    size="2x32x2", batch_size=8, learning_rate=1e-2, warmup_steps=3, ema_decays=(0.9, 0.5), save_every=7,
    held_out_every=40, loss_space="x", keep_last=3,
)  # fmt: skip


def outcome(run: Path) -> dict[str, str]:
    """Hash what a run leaves: every tensor file, the metrics, and the headers without their wall time."""
    found = {}
    for path in [*sorted(run.rglob("*.safetensors")), run / "metrics.jsonl"]:
        found[str(path.relative_to(run))] = files.sha256(path)
    for path in run.rglob("checkpoint.json"):
        header = json.loads(path.read_text())
        del header["seconds"]
        found[str(path.relative_to(run))] = json.dumps(header)
    return found


@pytest.mark.parametrize(
    ("kills", "steps"), [(4, 400), pytest.param(50, 5000, marks=pytest.mark.slow)], ids=["few", "fifty"]
)
def test_a_run_killed_at_random_moments_ends_to_the_bit_like_an_untouched_one(
    tmp_path: Path, kills: int, steps: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = TrainConfig(**{**CONFIG.__dict__, "steps": steps})
    images = torch.randint(0, 256, (60, 1, 8, 8), generator=torch.Generator().manual_seed(0), dtype=torch.uint8).numpy()
    source = Arrays("mnist", images, torch.arange(60).numpy() % 4, ("a", "b", "c", "d"), "test")
    encode(source, tmp_path / "latents", stride=2, num_held_out=20, shard_size=7)

    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    context = multiprocessing.get_context("forkserver")  # PyTorch is imported once, not fifty times
    context.set_forkserver_preload(["jlt.training"])

    def start(run: Path) -> multiprocessing.process.BaseProcess:
        process = context.Process(target=train, args=(config, tmp_path / "latents", run))
        process.start()
        return process

    whole = start(tmp_path / "whole")
    whole.join()
    assert whole.exitcode == 0

    generator, killed = random.Random(0), 0
    while killed < kills:
        process = start(tmp_path / "killed")
        process.join(generator.uniform(0.02, 0.3))  # opening shards, training, saving: whatever it is at
        if process.is_alive():
            process.kill()
            process.join()
            killed += 1
        else:
            pytest.fail(f"a resumed run ended by itself, exit code {process.exitcode}, after {killed} kills")
    last = start(tmp_path / "killed")
    last.join()
    assert last.exitcode == 0
    assert outcome(tmp_path / "killed") == outcome(tmp_path / "whole")
    steps_logged = [line["step"] for line in read_metrics(tmp_path / "killed") if "loss" in line]
    assert steps_logged == list(range(1, steps + 1))
