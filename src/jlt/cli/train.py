"""`jlt train PRESET LATENTS RUN`, and `jlt train PRESET --dry-run`."""

import os
from pathlib import Path
from typing import Annotated, Any

import tyro

from jlt.data import open_latents
from jlt.experiments.plan import as_json, as_table, plan
from jlt.experiments.presets import PAPER, Expected, Preset
from jlt.experiments.presets import PRESETS as PRESETS
from jlt.training import TrainConfig, train


def defaults(preset: Preset) -> dict[str, Any]:
    """Return the arguments of `run` that a preset sets."""
    return {"config": preset.config, "expected": preset.expected}


def run(
    latents: Annotated[Path | None, tyro.conf.arg(metavar="LATENTS"), tyro.conf.Positional] = None,
    out: Annotated[Path | None, tyro.conf.arg(name="run", metavar="RUN"), tyro.conf.Positional] = None,
    config: Annotated[TrainConfig, tyro.conf.arg(name="")] = PAPER,
    expected: Expected = Expected(),  # noqa: B008
    *,
    device: str = "cpu",
    init: Path | None = None,
    dry_run: bool = False,
    json: bool = False,
    micro_batch_size: int | None = None,
    parallel: str = "ddp",
    compile: bool = False,
    recompute: bool = False,
    tf32: bool = False,
    utilisation: float = 0.4,
) -> None:
    """Train a Transformer on latents; the same command again resumes where it stopped.

    The first argument names a preset, whose settings are the defaults of the options below. With --dry-run nothing is
    trained: parameters, operations, disk, memory and hours are printed, for the latents given or those expected.

    On several GPUs: torchrun --nproc-per-node 8 -m jlt train ... --device cuda

    Args:
        latents: folder made by `jlt encode`.
        out: folder of the run.
        config: the recipe.
        expected: the latents that --dry-run assumes if none are given.
        device: where the network runs: cpu, cuda (under torchrun each process has its own), mps.
        init: a run or checkpoint whose weights a new run starts from, also with other classes (fine-tuning).
        dry_run: print what the run would take, and stop.
        json: with --dry-run, print it as JSON.
        micro_batch_size: most images on a device at once; by default its share of the batch, with --dry-run 32.
        parallel: with several processes, ddp (each has the whole model) or fsdp (each has a part of it).
        compile: compile the blocks of the network.
        recompute: save memory by working out the blocks again for the backward pass (activation checkpointing).
        tf32: let GPUs multiply float32 matrices in TF32.
        utilisation: with --dry-run, share of its peak that a device reaches.
    """
    if dry_run:
        if latents is not None:
            data = open_latents(latents)
            expected = Expected(data.shape, data.num_classes, len(data))
        planned = plan(config, expected, micro_batch_size=micro_batch_size or 32, utilisation=utilisation)
        print(as_json(planned) if json else as_table(planned))
        return
    if latents is None or out is None:
        raise ValueError(
            f"{'LATENTS and RUN are' if latents is None else 'RUN is'} missing; only --dry-run needs neither"
        )
    if json:
        raise ValueError("--json is for --dry-run")
    folder = train(
        config, latents, out, device=device, init=init, micro_batch_size=micro_batch_size, parallel=parallel,
        compile=compile, recompute=recompute, tf32=tf32,
    )  # fmt: skip
    if not int(os.environ.get("RANK", "0")):  # the first of torchrun's processes tells what all have made
        print(folder)
