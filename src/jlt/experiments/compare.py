"""The matched comparison: runs that differ in declared settings and in nothing else.

Each run is trained (or resumed), sampled and measured in the same way: the same latents, data order, noise, times,
initial weights where the architecture is the same, averages, solver, guidance, and noise of image i. What a variant
does not declare is the base's, by construction. The outcome is one record with a part for each run.

    OUT/record.json, OUT/samples-<run>.png, OUT/real.png, OUT/runs/<run>/ (jlt.training.loop) with
    samples/ (jlt.sampling.storage)
"""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Int, UInt8
from torch import Tensor

from jlt import files
from jlt.data import Latents, Source, open_latents, real_images
from jlt.evaluation import records
from jlt.evaluation.agreement import Classifier, class_agreement, fit_classifier
from jlt.evaluation.features import EXTRACTORS, Extractor
from jlt.evaluation.protocol import Reference, measure, real_against_real, reference
from jlt.evaluation.records import Figure, Record, Value
from jlt.experiments.geometry import measure_geometry
from jlt.experiments.plots import grid
from jlt.sampling import Samples, default_scale, generate, load
from jlt.training import TrainConfig, read_metrics, train
from jlt.training.held_out import BINS


@dataclass(frozen=True)
class Sampling:
    """How every run of a comparison is sampled.

    Attributes:
        num_images: images a run, their labels in turn over the classes.
        solver: euler or heun.
        steps: steps of the time grid.
        scale: guidance scale, 1 is none; by default the paper's 2.9, or 1 for an unconditional model.
        interval: guidance applies where low < t < high.
        seed: of the noise, together with the image's index.
        weights: "ema", "model", or the decay of an average.
        batch_size: images at once.
    """

    num_images: int = 500
    solver: str = "heun"
    steps: int = 50
    scale: float | None = None
    interval: tuple[float, float] = (0.1, 1.0)
    seed: int = 0
    weights: str = "ema"
    batch_size: int = 100

    def __post_init__(self) -> None:
        if self.num_images < 2:
            raise ValueError(f"num_images must be at least 2, got {self.num_images}")

    def guidance(self, num_classes: int) -> float:
        """Return the scale to use; one asked for on an unconditional model is refused where it is used."""
        return default_scale(num_classes) if self.scale is None else self.scale


@dataclass(frozen=True)
class Judge:
    """What images are measured with: an extractor, the held-out images' features, and a classifier of real images."""

    extractor: Extractor
    held_out: Reference
    classifier: Classifier | None

    def __call__(self, samples: Samples, name: str) -> dict[str, Value]:
        """Return the values of generated images."""
        values = measure(samples.images, self.held_out, self.extractor, name=f"measuring {name}")
        if self.classifier is not None:
            values["class agreement"] = Value(
                100 * class_agreement(self.classifier, samples.images, samples.labels), unit="%"
            )
        return values

    def fingerprints(self, data: Latents) -> dict[str, str]:
        """Return what identifies the latents, their images and the features."""
        return {
            "representation": data.manifest.representation_fingerprint,
            "source": str(data.manifest.source["source_fingerprint"]),
            "extractor": self.extractor.fingerprint,
        }


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
    configs = [dataclasses.replace(base, **variant) for variant in variants]
    data = open_latents(latents)
    training, held_out = (stack_images(real_images(latents, split)) for split in ("train", "held-out"))
    judge, real = prepare_judge(
        training, held_out, sampling.num_images, files.choose("extractor", extractor, EXTRACTORS)()
    )

    parts: list[Record] = []
    curves: dict[str, tuple[list[float], list[float]]] = {}
    by_time: dict[str, dict[str, list[float]]] = {}
    for config in configs:
        run = out / "runs" / "-".join(str(getattr(config, name)) for name in factors)
        part = run_one(config, latents, run, data, sampling, judge, factors, out)
        parts.append(part)
        lines = read_metrics(run)
        curves[part.name] = smoothed([line["loss"] for line in lines if line.get("loss") is not None])
        if held_out_lines := [line["held_out"] for line in lines if "held_out" in line]:
            by_time[part.name] = held_out_lines[-1]

    shared = {name: value for name, value in dataclasses.asdict(base).items() if name not in factors}
    shared |= {f"sampling {name}": value for name, value in dataclasses.asdict(sampling).items()}
    shared |= {"extractor": judge.extractor.name, "training images": len(data), "held-out images": len(held_out[1])}
    save_grid(out / "real.png", held_out[0], held_out[1], data)
    record = Record(
        kind=kind,
        name=title,
        values={},
        settings=json_ready(shared),
        fingerprints=judge.fingerprints(data),
        figures=loss_figures(curves, by_time),
        pictures={"Real held-out images": "real.png"},
        parts=(*parts, real_part(real), measure_geometry(data, base.patch_size, name="Geometry of the latents")),
    )
    records.write(record, out / "record.json")
    return out / "record.json"


def run_one(
    config: TrainConfig, latents: Path, run: Path, data: Latents, sampling: Sampling, judge: Judge,
    factors: Sequence[str], out: Path,
) -> Record:  # fmt: skip
    """Train, sample and measure one run."""
    train(config, latents, run)
    settings = {factor: getattr(config, factor) for factor in factors}
    return measure_run(run, data, sampling, judge, settings, out / f"samples-{run.name}.png", run / "samples")


def measure_run(
    run: Path,
    data: Latents,
    sampling: Sampling,
    judge: Judge,
    settings: Mapping[str, Any],
    picture: Path,
    storage: Path,
) -> Record:
    """Sample a trained run, draw a grid of its images, and measure them."""
    generator = load(run, sampling.weights)
    check_fit(generator.header, data)
    # the model's name tells target, size and patch size; other settings that runs differ in are appended
    told = {"target", "size", "patch_size"}
    name = ", ".join([str(generator.header["name"]), *(f"{k} {v}" for k, v in settings.items() if k not in told)])
    samples = generate(
        generator, balanced_labels(sampling.num_images, data.num_classes), storage,
        seed=sampling.seed, solver=sampling.solver, steps=sampling.steps,
        scale=sampling.guidance(data.num_classes), interval=sampling.interval, batch_size=sampling.batch_size,
        title=f"sampling {name}",
    )  # fmt: skip
    save_grid(picture, samples.images, samples.labels, data)
    values = judge(samples, name)
    values |= {
        "evaluations": Value(samples.evaluations),
        "network passes": Value(samples.network_passes),
        "training time": Value(float(generator.header["seconds"]), unit="s"),
        "sampling time": Value(samples.seconds, unit="s"),
        "parameters": Value(sum(p.numel() for p in generator.model.parameters())),
    }
    return Record(
        kind="evaluate",
        name=name,
        values=values,
        settings=json_ready(settings),
        fingerprints={"weights": generator.fingerprint},
        pictures={f"Samples of {name}; image i starts from the same noise in every run": picture.name},
    )


def check_fit(header: Mapping[str, Any], data: Latents) -> None:
    """Raise a ValueError if a run was trained on latents of another representation, shape or class count."""
    model, manifest = header["model"], data.manifest
    pairs = {
        "representation": (header["latents"]["representation_fingerprint"], manifest.representation_fingerprint),
        "shape": ([model["latent_channels"], *[model["latent_size"]] * 2], list(data.shape)),
        "number of classes": (model["num_classes"], data.num_classes),
    }
    for name, (trained, found) in pairs.items():
        if trained != found:
            raise ValueError(f"{data.folder}: the latents' {name} is {found}, the run was trained on {trained}")


def evaluate(run: Path, latents: Path, out: Path, sampling: Sampling, extractor: str) -> tuple[Record, Path]:
    """Measure one trained run against held-out images; write and return its record and the record's path."""
    data = open_latents(latents)
    training, held_out = (stack_images(real_images(latents, split)) for split in ("train", "held-out"))
    features = files.choose("extractor", extractor, EXTRACTORS)()
    judge, real = prepare_judge(training, held_out, sampling.num_images, features)
    settings = {f"sampling {name}": value for name, value in dataclasses.asdict(sampling).items()}
    settings |= {"extractor": features.name, "held-out images": len(held_out[1])}
    out.mkdir(parents=True, exist_ok=True)
    part = measure_run(run, data, sampling, judge, {}, out / "samples.png", out / "samples")
    save_grid(out / "real.png", held_out[0], held_out[1], data)
    record = dataclasses.replace(
        part,
        values={},  # they are the part's, in a column beside real against real
        settings=json_ready(settings),
        fingerprints={**part.fingerprints, **judge.fingerprints(data)},
        pictures={"Real held-out images": "real.png"},
        parts=(part, real_part(real)),
    )
    records.write(record, out / "record.json")
    return record, out / "record.json"


def prepare_judge(
    training: tuple[Tensor, Tensor], held_out: tuple[Tensor, Tensor], num_images: int, extractor: Extractor
) -> tuple[Judge, dict[str, Value]]:
    """Return the judge, and its values for as many real training images: what no model is expected to beat."""
    against = reference(held_out[0], extractor, f"{len(held_out[0])} held-out images")
    count = min(num_images, len(training[0]))
    real = real_against_real(training[0], against, extractor, count)
    classifier = fit_classifier(*training) if int(training[1].min()) >= 0 else None
    if classifier is not None:
        real["class agreement"] = Value(100 * class_agreement(classifier, *held_out), unit="%")
    return Judge(extractor, against, classifier), real


def real_part(values: Mapping[str, Value]) -> Record:
    """Return the column that stands beside every run's: as many real training images, measured in the same way."""
    return Record("reference", "real against real", values, {})


def stack_images(source: Source) -> tuple[UInt8[Tensor, "n c h w"], Int[Tensor, " n"]]:
    """Read all images and labels of a source."""
    pairs = [source[i] for i in range(len(source))]
    return torch.from_numpy(np.stack([image for image, _ in pairs])), torch.tensor([label for _, label in pairs])


def balanced_labels(count: int, num_classes: int) -> Int[Tensor, " n"]:
    """Return the classes in turn; for an unconditional model, zeros."""
    return torch.arange(count) % max(num_classes, 1)


def save_grid(path: Path, images: Tensor, labels: Tensor, data: Latents, columns: int = 10, rows: int = 10) -> None:
    """Write a picture of the first images of each class, a column a class."""
    order = torch.argsort(labels, stable=True)
    if data.num_classes:
        firsts = [order[labels[order] == k][:rows] for k in range(min(data.num_classes, columns))]
        depth = min(len(first) for first in firsts)
        order = torch.stack([first[:depth] for first in firsts], dim=1).flatten()
        columns = len(firsts)
    with files.replaced(path) as temporary:
        grid(images[order[: rows * columns]], columns).save(temporary, format="PNG")


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


def json_ready(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Flatten nested settings to `outer inner` names and tuples to lists."""
    flat: dict[str, Any] = {}
    for name, value in settings.items():
        if isinstance(value, dict):
            flat |= {f"{name} {inner}": v for inner, v in json_ready(value).items()}
        else:
            flat[name] = list(value) if isinstance(value, tuple) else value
    return flat
