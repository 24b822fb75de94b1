"""`jlt doctor`, and `jlt doctor --train PRESET`."""

import dataclasses
import json as json_module
from pathlib import Path

from jlt import files
from jlt.experiments import presets
from jlt.experiments.doctor import checks, examine, training_checks
from jlt.processes import open_device


def run(
    *,
    train: str | None = None,
    device: str = "cpu",
    steps: int = 100,
    micro_batch_size: int = 1,
    minutes: float = 5.0,
    dtype: str | None = None,
    folder: Path = Path("."),
    json: bool = False,
) -> int:
    """Say what this machine has, and with --train rehearse a preset's training on it before hours are spent.

    The rehearsal compiles a network, lets two processes work together, shards a network with FSDP2, and trains the
    preset's own network on noise in the shape of its latents, with a save and a resume half-way. It has run on CPUs
    only: no GPU was at hand when it was written.

    Args:
        train: the preset to rehearse, such as jlt-b-1.
        device: where it runs: cpu, cuda, mps.
        steps: training steps of the rehearsal, fewer where they would take longer than `minutes`.
        micro_batch_size: images a step of the rehearsal.
        minutes: time for the rehearsal's steps; four are taken in any case.
        dtype: bfloat16 or float32 instead of the preset's own.
        folder: where latents and checkpoints would go; the rehearsal's own are removed again.
        json: print the findings as JSON.
    """
    if steps < 4 or micro_batch_size < 1:
        raise ValueError(f"steps must be at least 4 and micro_batch_size at least 1, got {steps}, {micro_batch_size}")
    if not folder.is_dir():
        raise ValueError(f"{folder} is {'a file' if folder.exists() else 'not there'}; a folder is wanted")
    if train is None and dtype is not None:
        raise ValueError(f"--dtype {dtype} is of the rehearsal that --train asks for, which was not given")
    todo = checks(folder, open_device(device))
    if train is not None:
        preset = files.choose("preset", train, presets.PRESETS)
        config = preset.config if dtype is None else dataclasses.replace(preset.config, dtype=dtype)
        todo |= training_checks(config, preset.expected, folder, device, steps, micro_batch_size, minutes)
    findings = []
    for name, check in todo.items():
        findings.append(examine(name, check))
        if not json:
            state = {True: "ok", False: "FAILED", None: ""}[findings[-1].good]
            print(f"{name:<11}{state:<7}{findings[-1].told}", flush=True)
    if json:
        print(json_module.dumps([dataclasses.asdict(finding) for finding in findings]))
    return int(any(finding.good is False for finding in findings))
