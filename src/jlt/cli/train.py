"""`jlt train PRESET LATENTS RUN`, and `jlt train PRESET --dry-run`."""

import os
from pathlib import Path
from typing import Annotated, Any

import torch
import tyro

from jlt import files
from jlt.cli.places import OptionalLatentsPath
from jlt.data import open_latents
from jlt.experiments.curves import known_curve
from jlt.experiments.evaluate import prepare_judge
from jlt.experiments.plan import ACCELERATORS, as_json, as_table, plan
from jlt.experiments.presets import PAPER, Expected, Preset
from jlt.experiments.presets import PRESETS as PRESETS
from jlt.experiments.watching import Distances, Drawing, Grids, Neighbours, Watching
from jlt.sampling import default_scale
from jlt.training import SINKS, TrainConfig, Watcher, train
from jlt.training.metrics import OpenSink


def defaults(preset: Preset) -> dict[str, Any]:
    """Return the arguments of `run` that a preset sets."""
    return {
        "config": preset.config,
        "expected": preset.expected,
        "watching": Watching(watch_scale=preset.guidance if preset.expected.num_classes else None),
    }


def run(
    latents: OptionalLatentsPath = None,
    out: Annotated[Path | None, tyro.conf.arg(name="run", metavar="[RUN]"), tyro.conf.Positional] = None,
    config: Annotated[TrainConfig, tyro.conf.arg(name="")] = PAPER,
    expected: Expected = Expected(),  # noqa: B008
    watching: Annotated[Watching, tyro.conf.arg(name="")] = Watching(),  # noqa: B008
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
        watching: what is looked at meanwhile, see docs/training.md; nothing of it changes what is learnt.
        expected: the latents that --dry-run assumes if none are given.
        device: where the network runs: cpu, cuda (under torchrun each process has its own), mps.
        init: a run, a checkpoint, or ORG/NAME of the Hub whose weights a new run starts from, also with other classes
            (fine-tuning).
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
        micro = 32 if micro_batch_size is None else micro_batch_size
        planned = plan(config, expected, micro_batch_size=micro, utilisation=utilisation, recompute=recompute)
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
        compile=compile, recompute=recompute, tf32=tf32, gradient_norms_every=watching.gradient_norms_every,
        peak_flops=(watching.peak_tflops and 1e12 * watching.peak_tflops) or peak(config, device),
        watchers=watchers(watching, latents), sinks=sinks(watching, config, latents),
    )  # fmt: skip
    if not int(os.environ.get("RANK", "0")):  # the first of torchrun's processes tells what all have made
        print(folder)


def watchers(watching: Watching, latents: Path) -> list[Watcher]:
    """Return the watchers asked for."""
    data = open_latents(latents)
    scale = default_scale(data.num_classes) if watching.watch_scale is None else watching.watch_scale
    draw, count, found = Drawing(watching.watch_steps, scale), watching.watch_images, list[Watcher]()
    if watching.samples_every:
        found.append(Grids(watching.samples_every, draw))
    if (watching.distances_every or watching.neighbours_every) and not (latents / "held-out").is_dir():
        raise ValueError(f"{latents} holds no held-out images to compare with; encode with --num-held-out")
    if watching.distances_every:
        first = not int(os.environ.get("RANK", "0"))
        judge = prepare_judge(latents, count, "efficientnet-lite0") if first else None
        found.append(Distances(watching.distances_every, draw, judge, count))
    if watching.neighbours_every:
        found.append(Neighbours(watching.neighbours_every, draw, count))
    return found


def sinks(watching: Watching, config: TrainConfig, latents: Path) -> dict[str, OpenSink]:
    """Return the sinks asked for, and the recorded curve of this recipe if there is one."""
    found = {name: files.choose("log", name, SINKS) for name in watching.log}
    curve = known_curve(config, open_latents(latents))
    return found if curve is None else found | {"curve": curve.sink}


def peak(config: TrainConfig, device: str) -> float | None:
    """Return the dense bfloat16 peak of a known GPU in FLOP/s, where the training is in bfloat16."""
    if not device.startswith("cuda") or config.dtype != "bfloat16" or not torch.cuda.is_available():
        return None
    name = torch.cuda.get_device_name(device)
    known = [1e12 * tflops for kind, tflops in ACCELERATORS.items() if kind.removesuffix(" SXM") in name]
    return known[0] if known and "PCIe" not in name else None
