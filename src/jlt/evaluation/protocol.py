"""The protocol: which images are compared with which, and under which names the distances are stated.

Real images are turned into a `Reference` once, and every set of images is measured against it:

    held_out = reference(real_images, extractor, "500 held-out digits")
    values = measure(samples, held_out, extractor)         # {"FD (EfficientNet-Lite0)": ..., "KD (...)": ...}
    floor = real_against_real(more_real_images, held_out, extractor, count=len(samples))

At full count, nothing is held in memory: `Statistics` of the images come from one pass over their features, and
`compare` measures them against a reference on disk (`references`).

A distance depends on the number of images, on the reference and on the extractor, so it is stated with all three, and
beside the floor: what as many real images score. Below about 5,000 images KD is the one to trust.
Images of `measure` are one uint8 tensor (n, c, h, w) or an iterable of such batches; memory holds a batch and all
features.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor
from tqdm import tqdm

from jlt.evaluation.distances import frechet_distance, frechet_distances, kernel_distance
from jlt.evaluation.features import Extractor, metric_name
from jlt.evaluation.moments import Moments, Stated
from jlt.evaluation.records import Value, mean_and_spread
from jlt.evaluation.scores import NEIGHBOURS, coverage_scores
from jlt.evaluation.statistics import SPLITS, Statistics

SMALLEST_FIFTH = 5  # images, below which a spread over subsets says nothing
Images = UInt8[Tensor, "n c h w"] | Iterable[UInt8[Tensor, "_ c h w"]]


@dataclass(frozen=True)
class Reference:
    """Images as one extractor sees them: the real ones that others are measured against, or those that are measured.

    `features` are those of all images or of some, None where only moments were kept; `labels` are theirs, -1 or None
    where they have none; `spatial` is Inception's; `image_size` is "height x width", where it is known.
    """

    name: str
    extractor: str
    fingerprint: str
    moments: Moments | Stated
    features: Float[Tensor, "n d"] | None
    spatial: Moments | Stated | None = None
    labels: Int[Tensor, " n"] | None = None
    image_size: str | None = None

    @property
    def count(self) -> int | None:
        """The number of images, if it is known."""
        return self.moments.count


def reference(
    images: Images, extractor: Extractor, name: str, batch_size: int = 32, labels: Int[Tensor, " n"] | None = None
) -> Reference:
    """Return the reference of images; `name` says which ones."""
    features, moments = extract(images, extractor, batch_size, name)
    return Reference(name, extractor.name, extractor.fingerprint, moments, features, labels=labels)


def measure(
    images: Images, reference: Reference, extractor: Extractor, batch_size: int = 32, name: str = "images"
) -> dict[str, Value]:
    """Return the distances of `images` from the reference: FD, and KD if the reference has its features.

    `name` stands beside the progress bar. An extractor other than the reference's is a ValueError.
    """
    check_extractor(reference, extractor)
    features, moments = extract(images, extractor, batch_size, name)
    seen = Reference(name, extractor.name, extractor.fingerprint, moments, features)
    return between(seen, reference, extractor)


def between(seen: Reference, real: Reference, extractor: Extractor) -> dict[str, Value]:
    """Return the distances of images that were seen from a reference: FD, and KD if both have features."""
    check_extractor(real, extractor)
    values = {metric_name("FD", extractor): Value(frechet_distance(seen.moments, real.moments))}
    if seen.features is not None and real.features is not None:
        values[metric_name("KD", extractor)] = Value(kernel_distance(seen.features, real.features))
    return values


def by_class(seen: Reference, real: Reference) -> dict[int, float]:
    """Return the kernel distance of each class of which both sides have at least 2 images with features and labels.

    It is unbiased at any number, where the Frechet distance of a class's few images would be mostly bias.
    """
    if seen.features is None or seen.labels is None or real.features is None or real.labels is None:
        return {}
    found = {}
    for k in sorted({int(label) for label in torch.cat([seen.labels, real.labels]) if label >= 0}):
        ours, theirs = seen.features[seen.labels == k], real.features[real.labels == k]
        if min(len(ours), len(theirs)) >= 2:
            found[k] = kernel_distance(ours, theirs)
    return found


def compare(statistics: Statistics, reference: Reference, extractor: Extractor) -> dict[str, Value]:
    """Return every metric that statistics of images and a reference allow.

    Distances are those of all images; "over fifths" is the mean of the same distance for five disjoint subsets, higher
    since they are smaller, and its spread. KD, precision, recall, density and coverage compare the features kept.
    """
    check_extractor(reference, extractor)
    assert statistics.seen == statistics.count, f"{statistics.seen} of {statistics.count} images were seen"
    values = {}
    for metric, view, real in (("FD", "features", reference.moments), ("sFD", "spatial", reference.spatial)):
        if real is None or (moments := statistics.moments(view)) is None:
            continue
        parts = statistics.subsets(view)
        apart = metric == "FD" and min(part.count for part in parts) >= SMALLEST_FIFTH
        whole, *fifths = frechet_distances([moments, *(parts if apart else ())], real)
        values[metric_name(metric, extractor)] = Value(whole)
        if fifths:
            values[f"{metric_name(metric, extractor)}, over fifths of {parts[-1].count}"] = mean_and_spread(fifths)
    if statistics.score is not None and statistics.count >= SPLITS:
        values[metric_name("IS", extractor)] = statistics.score.value()
    if reference.features is not None and min(len(reference.features), statistics.keep) > NEIGHBOURS:
        kept = statistics.kept
        values[metric_name("KD", extractor)] = Value(kernel_distance(kept, reference.features))
        for metric, value in coverage_scores(kept, reference.features).items():
            values[metric_name(metric, extractor)] = Value(value)
    return values


def check_extractor(reference: Reference, extractor: Extractor) -> None:
    """Refuse an extractor other than the one that a reference was made with."""
    if extractor.fingerprint != reference.fingerprint:
        raise ValueError(
            f"the reference {reference.name!r} was made with {reference.extractor} ({reference.fingerprint}), "
            f"not with {extractor.name} ({extractor.fingerprint})"
        )


def real_against_real(
    images: UInt8[Tensor, "n c h w"],
    reference: Reference,
    extractor: Extractor,
    count: int,
    seed: int = 0,
    batch_size: int = 32,
) -> dict[str, Value]:
    """Measure `count` of these real images, drawn by `seed`: what no generator can be expected to beat.

    The images must be others than the reference's; fewer than `count` are a ValueError.
    """
    if len(images) < count:
        raise ValueError(f"real against real needs {count} images besides the reference's, got {len(images)}")
    return measure(images[draw(len(images), count, seed)], reference, extractor, batch_size, "real against real")


def draw(total: int, count: int, seed: int = 0) -> Int[Tensor, " n"]:
    """Draw `count` of `total` numbers: a set may be ordered by class, so its first images are no fair draw."""
    return torch.randperm(total, generator=torch.Generator().manual_seed(seed))[:count]


def extract(images: Images, extractor: Extractor, batch_size: int, name: str) -> tuple[Float[Tensor, "n d"], Moments]:
    """Return the features of all images, float32, and their moments."""
    moments, features = Moments(extractor.dimension), [torch.zeros(0, extractor.dimension)]
    total = len(images) if isinstance(images, Tensor) else None
    with tqdm(total=total, desc=name, unit="image", disable=None) as progress:
        for batch in batches(images, batch_size):
            features.append(extractor(batch).float().cpu())
            moments.update(features[-1])
            progress.update(len(batch))
    return torch.cat(features), moments


def batches(images: Images, batch_size: int) -> Iterator[UInt8[Tensor, "_ c h w"]]:
    """Yield the images in batches of at most `batch_size`."""
    if batch_size < 1:
        raise ValueError(f"the batch size is {batch_size}, it must be at least 1")
    for part in [images] if isinstance(images, Tensor) else images:
        yield from torch.split(part, batch_size)
