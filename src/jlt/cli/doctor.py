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
        steps: training steps of the rehearsal.
        micro_batch_size: images a step of the rehearsal.
        folder: where latents and checkpoints would go; the rehearsal's own are removed again.
        json: print the findings as JSON.
    """
    if steps < 2 or micro_batch_size < 1:
        raise ValueError(f"steps must be at least 2 and micro_batch_size at least 1, got {steps}, {micro_batch_size}")
    if not folder.is_dir():
        raise ValueError(f"{folder} is {'a file' if folder.exists() else 'not there'}; a folder is wanted")
    todo = checks(folder, open_device(device))
    if train is not None:
        preset = files.choose("preset", train, presets.PRESETS)
        todo |= training_checks(preset.config, preset.expected, folder, device, steps, micro_batch_size)
    findings = []
    for name, check in todo.items():
        findings.append(examine(name, check))
        if not json:
            state = {True: "ok", False: "FAILED", None: ""}[findings[-1].good]
            print(f"{name:<11}{state:<7}{findings[-1].told}", flush=True)
    if json:
        print(json_module.dumps([dataclasses.asdict(finding) for finding in findings]))
    return int(any(finding.good is False for finding in findings))
