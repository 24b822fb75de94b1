"""The matched comparison: runs that differ in declared settings and in nothing else.

Each run is trained (or resumed), sampled and measured in the same way: the same latents, data order, noise, times,
initial weights where the architecture is the same, averages, solver, guidance, and noise of image i. What a variant
does not declare is the base's, by construction. The outcome is one record with a part for each run.

    OUT/record.json, OUT/samples-<run>.png, OUT/real.png, OUT/runs/<run>/ (jlt.training.loop) with
    samples/ (jlt.sampling.storage)
"""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jlt import files
from jlt.data import open_latents
from jlt.evaluation import records
from jlt.evaluation.records import Figure, Record
from jlt.experiments.evaluate import Sampling, json_ready, measure_run, prepare_judge, save_grid
from jlt.experiments.geometry import measure_geometry
from jlt.training import TrainConfig, read_metrics, train
from jlt.training.held_out import BINS


def compare(
    latents: Path,
    out: Path,
    base: TrainConfig,
    variants: Sequence[Mapping[str, Any]],
    sampling: Sampling,
    *,
    extractor: str = "efficientnet-lite0",
    kind: str = "compare",
    title: str = "Matched comparison",
) -> Path:
    """Train, sample and measure a run for each variant of the base; return the record's path.

    Args:
        latents: folder made by `jlt encode` with a held-out split.
        out: folder for runs, pictures and record; finished steps found there are not done again.
        base: the settings that runs share.
        variants: for each run, the settings in which it differs from the base.
        sampling: how each run is sampled.
        extractor: a key of EXTRACTORS.
        kind: kind of the record.
        title: name of the record.
    """
    factors = sorted({name for variant in variants for name in variant})
    unknown = [name for name in factors if name not in TrainConfig.__dataclass_fields__]
    if unknown:
        raise ValueError(f"unknown setting {unknown[0]!r}{files.nearest(unknown[0], TrainConfig.__dataclass_fields__)}")
    if not factors:
        raise ValueError("a comparison needs at least 1 setting in which its runs differ, got 0")
    configs = [dataclasses.replace(base, **variant) for variant in variants]
    data = open_latents(latents)
    judge = prepare_judge(latents, sampling.num_images, extractor)

    parts: list[Record] = []
    curves: dict[str, tuple[list[float], list[float]]] = {}
    by_time: dict[str, dict[str, list[float]]] = {}
    for config in configs:
        run = out / "runs" / "-".join(str(getattr(config, name)) for name in factors)
        train(config, latents, run)
        differing = {name: getattr(config, name) for name in factors}
        part = measure_run(run, data, sampling, judge, differing, out / f"samples-{run.name}.png", run / "samples")
        parts.append(part)
        lines = read_metrics(run)
        curves[part.name] = smoothed([line["loss"] for line in lines if line.get("loss") is not None])
        if held_out_lines := [line["held_out"] for line in lines if "held_out" in line]:
            by_time[part.name] = held_out_lines[-1]

    shared = {name: value for name, value in dataclasses.asdict(base).items() if name not in factors}
    shared |= {"sampling": dataclasses.asdict(sampling), "training images": len(data)} | judge.settings()
    save_grid(out / "real.png", judge.images, judge.labels, data)
    record = Record(
        kind=kind,
        name=title,
        values={},
        settings=json_ready(shared),
        fingerprints=judge.fingerprints(data),
        figures=loss_figures(curves, by_time),
        pictures={"Real held-out images": "real.png"},
        parts=(
            *parts,
            judge.real_part,
            judge.ceiling_part,
            measure_geometry(data, base.patch_size, name="Geometry of the latents"),
        ),
    )
    records.write(record, out / "record.json")
    return out / "record.json"


def smoothed(losses: Sequence[float], points: int = 100) -> tuple[list[float], list[float]]:
    """Return (step, mean loss) over at most `points` equal stretches of training."""
    stretch = max(1, len(losses) // points)
    means = [float(np.mean(losses[i : i + stretch])) for i in range(0, len(losses) - stretch + 1, stretch)]
    return [stretch * (i + 1) for i in range(len(means))], means


def loss_figures(
    curves: Mapping[str, tuple[list[float], list[float]]], by_time: Mapping[str, Mapping[str, Sequence[float]]]
) -> dict[str, Figure]:
    """Return the figures of the training loss and of the held-out loss by time in x- and v-space."""
    middle = [(i + 0.5) / BINS for i in range(BINS)]
    figures = {
        "training loss": Figure(
            "Training loss, in the loss space that the runs share.", "step", "loss", curves, y_scale="log"
        )
    }
    for space, meaning in (("x", "the clean latent"), ("v", "the velocity")) if by_time else ():
        figures[f"held-out loss in {space}-space"] = Figure(
            f"Mean squared error of {meaning} on held-out images, by time, read from either model's output "
            "at the end of training: 0 is noise, 1 is data.",
            "t", f"{space}-space error", {name: (middle, list(losses[space])) for name, losses in by_time.items()},
            y_scale="log",
        )  # fmt: skip
    return figures
