"""Measuring a trained run: its images against held-out real ones, beside real images measured in the same way.

OUT/record.json, OUT/samples.png, OUT/real.png, OUT/neighbours.png, OUT/samples/ (jlt.sampling.storage), of several
seeds OUT/samples-seed-0/ and so on
"""

import dataclasses
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int, UInt8
from torch import Tensor

from jlt.data import Latents, Source, load_representation, open_latents, real_images
from jlt.data.batches import cut, read_batches
from jlt.data.representations import image_batch
from jlt.evaluation import records
from jlt.evaluation.agreement import Classifier, class_agreement, fit_classifier
from jlt.evaluation.features import Extractor, metric_name, open_extractor
from jlt.evaluation.neighbours import nearest
from jlt.evaluation.protocol import Reference, between, by_class, draw, reference
from jlt.evaluation.reconstruction import Fidelity
from jlt.evaluation.records import Record, Value, mean_and_spread, over_seeds
from jlt.experiments import plots
from jlt.experiments.asking import Sampling, balanced_labels, by_seed
from jlt.sampling import Generator, Samples, generate, load

BATCH_SIZE = 100  # images decoded at once
COMPARED = 100  # samples whose nearest training images are looked for
SHOWN = 10  # of them in the picture
NEAREST = "distance to the nearest training latent"
SPENT = ("labels", "evaluations", "network_passes", "seconds")  # of samples.json


@dataclass(frozen=True)
class Judge:
    """What images are measured with, and what real images score: the columns that stand beside every run's.

    `held_out` are the held-out images as the extractor sees them, `real` as many real training images as are sampled,
    `classifier` one of real images, if they are of several classes; `real_values` are those of `real` (for class
    agreement: of the held-out images).
    """

    extractor: Extractor
    held_out: Reference
    images: UInt8[Tensor, "n c h w"]
    labels: Int[Tensor, " n"]
    classifier: Classifier | None
    real: Reference
    real_values: Mapping[str, Value]

    def see(self, samples: Samples, name: str) -> Reference:
        """Return generated images as the extractor sees them."""
        return reference(samples.images, self.extractor, f"measuring {name}", labels=samples.labels)

    def values(self, seen: Reference, samples: Samples) -> dict[str, Value]:
        """Return the values of generated images."""
        found = between(seen, self.held_out, self.extractor)
        return found | agreement(self.classifier, samples.images, samples.labels)

    @property
    def real_part(self) -> Record:
        """The values of real images as a part of a record."""
        return Record("reference", "real against real", self.real_values, {})

    def ceiling(self, latents: Path, device: str = "cpu") -> Record:
        """Measure what latents leave of the held-out images, decoded on `device`: no model of them can do better."""
        decoded = torch.cat(list(decode(latents, "held-out", cut(0, len(self.images), BATCH_SIZE), device)))
        fidelity = Fidelity()
        fidelity.update(self.images, decoded)
        seen = reference(decoded, self.extractor, f"images encoded and decoded, {latents.name}")
        values = between(seen, self.held_out, self.extractor) | agreement(self.classifier, decoded, self.labels)
        name = f"{len(self.images)} held-out images, encoded and decoded"
        return Record("reference", name, values | fidelity.values(), {"latents": latents.name})

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
    against = reference(held_out, features, f"{len(held_out)} held-out images", labels=labels)
    drawn = draw(len(training), num_images)
    real = reference(training[drawn], features, "real against real", labels=classes[drawn])
    classifier = fit_classifier(training, classes) if len(classes.unique()) > 1 else None
    return Judge(
        extractor=features,
        held_out=against,
        images=held_out,
        labels=labels,
        classifier=classifier,
        real=real,
        real_values=between(real, against, features) | agreement(classifier, held_out, labels),
    )


def decode(
    latents: Path, split: str, ranges: Iterable[range], device: str | torch.device = "cpu"
) -> Iterator[UInt8[Tensor, "b c h w"]]:
    """Yield what the latents of each range of a split decode to."""
    data, representation = open_latents(latents, split), load_representation(latents / "representation")
    for numbers in ranges:
        z = data.gather(list(numbers)).to(device)
        yield representation.decode(data.manifest.affine.restore(z)).cpu()


def agreement(classifier: Classifier | None, images: Tensor, labels: Tensor) -> dict[str, Value]:
    """Return the share of images that the classifier takes for what their labels say, if there is a classifier."""
    if classifier is None:
        return {}
    return {"class agreement": Value(100 * class_agreement(classifier, images, labels), unit="%")}


def evaluate(
    run: Path,
    latents: Path,
    out: Path,
    sampling: Sampling,
    extractor: str,
    seeds: Sequence[int] = (),
    device: str = "cpu",
) -> Path:
    """Measure one trained run against held-out images; write its record and return the record's path.

    Of several `seeds`, in place of the sampling's, values are mean and spread. The run works on `device`.
    """
    generator, data = load(run, sampling.weights, device), open_latents(latents)
    check_fit(generator.header, data)
    generator.check(balanced_labels(sampling.num_images, data.num_classes), sampling.making(data.num_classes, device))
    samplings = by_seed(sampling, seeds, out)
    judge = prepare_judge(latents, sampling.num_images, extractor)
    measured = [
        measure(generator, data, each, judge, {}, folder.with_suffix(".png"), folder) for each, folder in samplings
    ]
    first = measured[0]
    ours, theirs = near_training(data, latents, first.samples, out / "neighbours.png")
    values = over_seeds([each.record.values for each in measured]) | {NEAREST: ours}
    part = dataclasses.replace(first.record, values=values)
    real = dataclasses.replace(judge.real_part, values={**judge.real_values, NEAREST: theirs})
    save_grid(out / "real.png", judge.images, judge.labels, data)
    return write_record(
        out,
        part,
        beside=[real, judge.ceiling(latents, device)],
        settings=stated(first.samples.settings, data.num_classes, seeds) | judge.settings(),
        fingerprints=judge.fingerprints(data),
        pictures={
            "Real held-out images": "real.png",
            "First row: samples. Below each the training images nearest to it, nearest first.": "neighbours.png",
        },
        sections=class_section(
            {part.name: first.seen, "real against real": judge.real},
            judge.held_out,
            judge.extractor,
            data.manifest.class_names,
        ),
    )


def stated(header: Mapping[str, Any], num_classes: int, seeds: Sequence[int] = ()) -> dict[str, Any]:
    """Return what a record states of samples.json: how images were made, but not what they took."""
    told = {name: value for name, value in header.items() if name not in SPENT}
    told["labels"] = f"in turn over {num_classes} classes" if num_classes else "none"
    if len(seeds) > 1:
        told.pop("seed")
        told["seeds"] = list(seeds)
    return told


def write_record(
    out: Path,
    part: Record,
    beside: Sequence[Record],
    settings: Mapping[str, Any],
    fingerprints: Mapping[str, str],
    pictures: Mapping[str, str],
    sections: Sequence[Record] = (),
) -> Path:
    """Write the record of an evaluation: a column of what was measured, columns beside it, and sections below."""
    record = dataclasses.replace(
        part,
        values={},  # they are the part's, in its column
        settings=json_ready(settings),
        fingerprints={**part.fingerprints, **fingerprints},
        pictures=pictures,
        parts=(part, *beside, *sections),
    )
    records.write(record, out / "record.json")
    return out / "record.json"


@dataclass(frozen=True)
class Measured:
    """A run's record, its images, and the images as the extractor sees them."""

    record: Record
    samples: Samples
    seen: Reference


def measure(
    generator: Generator,
    data: Latents,
    sampling: Sampling,
    judge: Judge,
    settings: Mapping[str, Any],
    picture: Path,
    storage: Path,
) -> Measured:
    """Sample a trained run, draw a grid of its images, and measure them."""
    # the model's name tells target, size and patch size; other settings that runs differ in are appended
    told = {"target", "size", "patch_size"}
    name = ", ".join([str(generator.header["name"]), *(f"{k} {v}" for k, v in settings.items() if k not in told)])
    labels = balanced_labels(sampling.num_images, data.num_classes)
    how = vars(sampling.making(data.num_classes, next(generator.model.parameters()).device))
    samples = generate(generator, labels, storage, title=f"sampling {name}", **how)
    save_grid(picture, samples.images, samples.labels, data)
    seen = judge.see(samples, name)
    values = judge.values(seen, samples)
    values |= {
        "evaluations": Value(samples.evaluations),
        "network passes": Value(samples.network_passes),
        "training time": Value(float(generator.header["seconds"]), unit="s"),
        "sampling time": Value(samples.seconds, unit="s"),
        "parameters": Value(sum(p.numel() for p in generator.model.parameters())),
    }
    record = Record(
        kind="evaluate",
        name=name,
        values=values,
        settings=json_ready(settings),
        fingerprints={"weights": generator.fingerprint},
        pictures={f"Samples of {name}; image i starts from the same noise in every run": picture.name},
    )
    return Measured(record, samples, seen)


def near_training(data: Latents, latents: Path, samples: Samples, picture: Path) -> tuple[Value, Value]:
    """Draw samples above the training images nearest to them; return how near they are, and held-out images.

    Both are means over as many images, drawn at random, at most 100.
    """
    held_out = open_latents(latents, "held-out")
    count = min(COMPARED, len(samples.labels), len(held_out))
    mine, others = (draw(total, count) for total in (len(samples.labels), len(held_out)))
    found = nearest(samples.latents[mine], samples.labels[mine], data)
    theirs = nearest(held_out.gather(others), held_out.labels[others], data, count=1)
    source, shown = real_images(latents, "train"), range(min(SHOWN, count))
    rows = [samples.images[mine[: len(shown)]]]
    for k in range(found.numbers.shape[1]):
        rows.append(image_batch(source[int(found.numbers[i, k])][0] for i in shown))
    plots.save(picture, plots.grid(torch.cat(rows), len(shown)))
    near = [mean_and_spread(each.distances[:, 0].tolist()) for each in (found, theirs)]
    return near[0], near[1]


def class_section(
    seen: Mapping[str, Reference], real: Reference, extractor: Extractor, names: Sequence[str] | None
) -> list[Record]:
    """Return a section with the kernel distance of each class, or none without labels.

    The first of `seen` is measured, the others stand beside it.
    """
    found = {name: by_class(side, real) for name, side in seen.items()}
    first = next(iter(found.values()))
    if len(first) < 2:
        return []
    counts = {
        f"images a class, {name}": images_a_class(side.labels, first)
        for name, side in [*seen.items(), (real.name, real)]
    }
    order = sorted(first, key=lambda k: -first[k])  # the worst first
    metric = metric_name("KD", extractor)
    parts = [
        Record(
            "evaluate" if values is first else "reference",
            name,
            {names[k] if names else f"class {k}": Value(values[k]) for k in order if k in values},
            {},
        )
        for name, values in found.items()
    ]
    return [Record("by class", f"{metric} of each class", {}, counts, parts=tuple(parts))]


def images_a_class(labels: Int[Tensor, " n"] | None, classes: Iterable[int]) -> str:
    """Say how many images the classes have."""
    assert labels is not None
    counts = [int((labels == k).sum()) for k in classes]
    return f"{min(counts)}" if min(counts) == max(counts) else f"{min(counts)} to {max(counts)}"


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


def save_grid(path: Path, images: Tensor, labels: Tensor, data: Latents, columns: int = 10, rows: int = 10) -> None:
    """Write a picture of the first images of each class that has some, a column a class."""
    order = torch.argsort(labels, stable=True)
    if data.num_classes:
        firsts = [order[labels[order] == k][:rows] for k in labels.unique().tolist()[:columns]]
        depth = min(len(first) for first in firsts)
        order = torch.stack([first[:depth] for first in firsts], dim=1).flatten()
        columns = len(firsts)
    plots.save(path, plots.grid(images[order[: rows * columns]], columns))


def json_ready(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Flatten nested settings to `outer inner` names and tuples to lists."""
    flat: dict[str, Any] = {}
    for name, value in settings.items():
        if isinstance(value, dict):
            flat |= {f"{name} {inner}": v for inner, v in json_ready(value).items()}
        else:
            flat[name] = list(value) if isinstance(value, tuple) else str(value) if isinstance(value, Path) else value
    return flat
