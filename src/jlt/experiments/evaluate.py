"""Measuring a trained run: its images against held-out real ones, beside real images measured in the same way.

OUT/record.json, OUT/samples.png, OUT/real.png, OUT/samples/ (jlt.sampling.storage)
"""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int, UInt8
from torch import Tensor

from jlt import files
from jlt.data import Latents, Source, open_latents, real_images
from jlt.data.batches import read_batches
from jlt.evaluation import records
from jlt.evaluation.agreement import Classifier, class_agreement, fit_classifier
from jlt.evaluation.features import Extractor, open_extractor
from jlt.evaluation.protocol import Reference, measure, real_against_real, reference
from jlt.evaluation.records import Record, Value
from jlt.experiments.plots import grid
from jlt.sampling import Making, Samples, default_scale, generate, load


@dataclass(frozen=True)
class Sampling:
    """How a run is sampled to be measured.

    Attributes:
        num_images: images a run, their labels in turn over the classes.
        solver: a key of SOLVERS.
        grid: the time grid: uniform, shifted=3, logit=3, karras=7.
        steps: steps of the time grid.
        scale: guidance scale, 1 is none; by default the paper's 2.9, or 1 for an unconditional model.
        interval: guidance applies where low < t < high.
        seed: of the noise, together with the image's index.
        weights: "ema", "model", or the decay of an average.
        batch_size: images at once.
    """

    num_images: int = 500
    solver: str = "heun"
    grid: str = "uniform"
    steps: int = 50
    scale: float | None = None
    interval: tuple[float, float] = (0.1, 1.0)
    seed: int = 0
    weights: str = "ema"
    batch_size: int = 100

    def __post_init__(self) -> None:
        if self.num_images < 2:
            raise ValueError(f"num_images must be at least 2, got {self.num_images}")

    def making(self, num_classes: int) -> Making:
        """Return how images are made; a scale asked for on an unconditional model is refused where it is used."""
        return Making(
            seed=self.seed,
            solver=self.solver,
            grid=self.grid,
            steps=self.steps,
            scale=default_scale(num_classes) if self.scale is None else self.scale,
            interval=self.interval,
            batch_size=self.batch_size,
        )


@dataclass(frozen=True)
class Judge:
    """What images are measured with, and what real images score: a column that stands beside every run's.

    `held_out` are the features of the held-out images, `real` the values of as many real training images as are
    sampled (for class agreement: of the held-out images), `classifier` one of real images, if they have labels.
    """

    extractor: Extractor
    held_out: Reference
    images: UInt8[Tensor, "n c h w"]
    labels: Int[Tensor, " n"]
    classifier: Classifier | None
    real: Mapping[str, Value]

    def __call__(self, samples: Samples, name: str) -> dict[str, Value]:
        """Return the values of generated images."""
        values = measure(samples.images, self.held_out, self.extractor, name=f"measuring {name}")
        return values | agreement(self.classifier, samples.images, samples.labels)

    @property
    def real_part(self) -> Record:
        """The values of real images as a part of a record."""
        return Record("reference", "real against real", self.real, {})

    def settings(self) -> dict[str, Any]:
        """Return what a record states about the measurement."""
        return {"extractor": self.extractor.name, "held-out images": len(self.images)}

    def fingerprints(self, data: Latents) -> dict[str, str]:
        """Return what identifies the latents, their images and the features."""
        return {
            "representation": data.manifest.representation_fingerprint,
            "source": str(data.manifest.source["source_fingerprint"]),
            "extractor": self.extractor.fingerprint,
        }


def prepare_judge(latents: Path, num_images: int, extractor: str) -> Judge:
    """Return the judge of runs trained on these latents, whose source's held-out images are the reference."""
    features = open_extractor(extractor)
    (training, classes), (held_out, labels) = (stack_images(real_images(latents, s)) for s in ("train", "held-out"))
    against = reference(held_out, features, f"{len(held_out)} held-out images")
    real = real_against_real(training, against, features, min(num_images, len(training)))
    classifier = fit_classifier(training, classes) if int(classes.min()) >= 0 else None
    real |= agreement(classifier, held_out, labels)
    return Judge(features, against, held_out, labels, classifier, real)


def agreement(classifier: Classifier | None, images: Tensor, labels: Tensor) -> dict[str, Value]:
    """Return the share of images that the classifier takes for what their labels say, if there is a classifier."""
    if classifier is None:
        return {}
    return {"class agreement": Value(100 * class_agreement(classifier, images, labels), unit="%")}


def evaluate(run: Path, latents: Path, out: Path, sampling: Sampling, extractor: str) -> Path:
    """Measure one trained run against held-out images; write its record and return the record's path."""
    data = open_latents(latents)
    judge = prepare_judge(latents, sampling.num_images, extractor)
    out.mkdir(parents=True, exist_ok=True)
    part = measure_run(run, data, sampling, judge, {}, out / "samples.png", out / "samples")
    save_grid(out / "real.png", judge.images, judge.labels, data)
    record = dataclasses.replace(
        part,
        values={},  # they are the part's, in a column beside real against real
        settings=json_ready({"sampling": dataclasses.asdict(sampling)} | judge.settings()),
        fingerprints={**part.fingerprints, **judge.fingerprints(data)},
        pictures={"Real held-out images": "real.png"},
        parts=(part, judge.real_part),
    )
    records.write(record, out / "record.json")
    return out / "record.json"


def measure_run(
    run: Path,
    data: Latents,
    sampling: Sampling,
    judge: Judge,
    settings: Mapping[str, Any],
    picture: Path,
    storage: Path,
    device: str = "cpu",
) -> Record:
    """Sample a trained run, draw a grid of its images, and measure them."""
    generator = load(run, sampling.weights, device)
    check_fit(generator.header, data)
    # the model's name tells target, size and patch size; other settings that runs differ in are appended
    told = {"target", "size", "patch_size"}
    name = ", ".join([str(generator.header["name"]), *(f"{k} {v}" for k, v in settings.items() if k not in told)])
    labels = balanced_labels(sampling.num_images, data.num_classes)
    how = vars(sampling.making(data.num_classes))
    samples = generate(generator, labels, storage, title=f"sampling {name}", **how)
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


def stack_images(source: Source) -> tuple[UInt8[Tensor, "n c h w"], Int[Tensor, " n"]]:
    """Read all images and labels of a source."""
    ((images, labels),) = read_batches(source, 0, len(source), len(source))
    return images, labels


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


def json_ready(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Flatten nested settings to `outer inner` names and tuples to lists."""
    flat: dict[str, Any] = {}
    for name, value in settings.items():
        if isinstance(value, dict):
            flat |= {f"{name} {inner}": v for inner, v in json_ready(value).items()}
        else:
            flat[name] = list(value) if isinstance(value, tuple) else value
    return flat
