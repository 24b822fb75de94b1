"""The geometry of stored latents close up: within classes, in neighbourhoods, and how far from Gaussian they are.

The paper's analysis is local: what a network must tell apart at a given z is not the whole set but what could have
made that z. So the spectrum is measured within classes and among the nearest tokens of a token, beside the same
estimates on as many draws of one Gaussian: a finite neighbourhood has fewer directions than the whole whatever the
data, and only what differs from the Gaussian's column says something about them.

Many tokens may be copies of one, such as an empty background. They count in the whole set and in classes, but nearest
tokens, intrinsic dimension and the distance from Gaussian are those of tokens that differ: a neighbourhood of copies
has no variance, and a peak of them is all that a distance would show. The Gaussian has the covariance of these.

All is measured on tokens drawn evenly from images spread over the set (settings say how many).
"""

from collections.abc import Sequence
from typing import Protocol

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from jlt.data.covariance import patches
from jlt.evaluation.records import Figure, Record, Value, mean_and_spread
from jlt.experiments.geometry import DENSE
from jlt.flow import geometry

LEAST_CLASS = 2  # times the dimension: tokens that a class needs for a covariance of its own
CLASS_POINTS = 200  # at least, where there are so many, for a class's intrinsic dimension
LEAST_POINTS = 10


class LabelledLatents(Protocol):
    """What is measured: latents that gather batches, with a label each."""

    @property
    def labels(self) -> Int64[Tensor, " n"]: ...

    def __len__(self) -> int: ...

    def gather(self, indices: Int64[Tensor, " b"]) -> Float[Tensor, "b c h w"]:
        """Return the latents at `indices`."""


def measure_local_geometry(
    latents: LabelledLatents,
    patch_size: int | None = 1,
    num_points: int = 8000,
    num_anchors: int = 50,
    max_images: int = 5000,
    seed: int = 0,
) -> Record:
    """Measure spectra within classes and neighbourhoods, intrinsic dimension, and distance from Gaussian.

    A neighbourhood is a token's nearest tokens by Euclidean distance, among `num_points` that differ: four times the
    dimension, at most a twentieth of them. Means and standard deviations are over classes, and over `num_anchors`
    neighbourhoods; a class of fewer than LEAST_POINTS tokens that differ has no intrinsic dimension. Fewer than 100
    tokens that differ in all are a ValueError.
    """
    check_tokens(latents, patch_size)
    index = torch.arange(min(len(latents), max_images)) * len(latents) // min(len(latents), max_images)
    cut = [patches(latents.gather(part), patch_size).double() for part in index.split(500)]
    tokens = torch.cat(cut)
    label = latents.labels[index].repeat_interleave(len(tokens) // len(index))
    num_tokens, dimension = tokens.shape
    distinct = tokens.unique(dim=0)
    if len(distinct) < 100:
        raise ValueError(
            f"tokens close up must be at least 100 that differ, got {len(distinct)}; --no-local leaves them out"
        )
    generator = torch.Generator().manual_seed(seed)
    points = some(distinct, num_points, generator)
    centred = distinct - distinct.mean(0)
    eigenvalues, basis = (side.flip(-1) for side in torch.linalg.eigh(centred.T @ centred / (len(distinct) - 1)))
    eigenvalues = eigenvalues.clamp(min=0)
    draws = torch.randn(points.shape, generator=generator, dtype=torch.float64) * eigenvalues.sqrt()
    trace = tokens.var(0).sum().item()
    neighbours = max(2, min(4 * dimension, len(points) // 20))
    anchors = torch.randperm(len(points), generator=generator)[:num_anchors]
    classes = [tokens[label == k] for k in label.unique().tolist()]
    large = [members for members in classes if len(members) >= LEAST_CLASS * dimension]
    parts = [_part("all tokens", [tokens], trace)]
    if len(classes) > 1 and large:
        count = max(num_points // len(large), CLASS_POINTS)
        each = [some(members.unique(dim=0), count, generator) for members in large]
        each = [differing for differing in each if len(differing) >= LEAST_POINTS]
        parts.append(_part("in a class", large, trace, each))
    parts.append(_part("tokens that differ", [distinct], trace, [points]))
    for name, cloud in (("in a neighbourhood", points), ("in a neighbourhood of a Gaussian", draws)):
        nearest = torch.cdist(cloud[anchors], cloud).topk(neighbours, largest=False).indices
        parts.append(_part(name, list(cloud[nearest]), trace, [draws] if cloud is draws else [], near=True))
    directions = list(range(1, dimension + 1))
    regular = eigenvalues > geometry.ROUNDING * eigenvalues[0]
    projected = [
        ("latents", ((points - distinct.mean(0)) @ basis)[:, regular]),
        ("draws of a Gaussian", draws[:, regular]),
    ]
    distance = {
        name: ([n for n, keep in zip(directions, regular.tolist(), strict=True) if keep], gaussian_distance(p).tolist())
        for name, p in projected
    }
    return Record(
        kind="local geometry",
        name="Geometry close up",
        values={
            "copies of another token": Value(100 * (1 - len(distinct) / num_tokens), unit="%"),
            "distance from Gaussian, mean over directions": Value(
                sum(distance["latents"][1]) / len(distance["latents"][1])
            ),
            "that of draws of a Gaussian": Value(
                sum(distance["draws of a Gaussian"][1]) / len(distance["draws of a Gaussian"][1])
            ),
        },
        settings={
            "images": len(index), "tokens": num_tokens, "points": len(points), "neighbours": neighbours,
            "neighbourhoods": len(anchors), "classes": len(classes), "classes large enough": len(large), "seed": seed,
        },
        figures={
            "distance from Gaussian": Figure(
                "How far tokens that differ are from Gaussian along each of their eigen-directions: the Wasserstein "
                "distance to a Gaussian of the same variance, in standard deviations. The second line is what chance "
                "alone gives.",
                "direction, from the largest variance", "distance / standard deviation", distance, y_scale="log",
            )
        },
        parts=tuple(parts),
    )  # fmt: skip


def check_tokens(latents: LabelledLatents, patch_size: int | None) -> None:
    """Raise a ValueError for tokens of more numbers than DENSE."""
    shape = latents.gather(torch.zeros(1, dtype=torch.int64)).shape
    if (numbers := shape[1] * (patch_size**2 if patch_size else shape[2] * shape[3])) > DENSE:
        raise ValueError(f"tokens close up may have {DENSE} numbers, these have {numbers}; --no-local leaves them out")


def some(points: Float[Tensor, "n d"], count: int, generator: torch.Generator) -> Float[Tensor, "m d"]:
    """Return at most `count` of the points, drawn evenly."""
    return points[torch.randperm(len(points), generator=generator)[:count]]


def two_nn(points: Float[Tensor, "n d"], batch_size: int = 500) -> tuple[float, float, int]:
    """Estimate the intrinsic dimension from the ratio of the distances to the two nearest neighbours.

    Facco et al., arXiv 1803.06992: on a manifold of dimension D the ratio mu = r2/r1 has density D mu^(-D-1), so that D
    is 1 / mean(ln mu). Returns D, its standard error D / sqrt(n), too small by up to a half as it takes the ratios of
    neighbours for independent, and the number of points used: those with a copy of themselves in the set (r1 = 0) have
    no ratio.
    """
    ratios = []
    for part in points.split(batch_size):
        # by differences: the fast form loses the smallest distances to cancellation
        nearest = torch.cdist(part, points, compute_mode="donot_use_mm_for_euclid_dist").topk(3, largest=False).values
        ratios.append((nearest[:, 2] / nearest[:, 1])[nearest[:, 1] > 0])
    logs = torch.cat(ratios).log()
    if len(logs) < LEAST_POINTS or logs.sum() == 0:
        raise ValueError(f"an intrinsic dimension needs {LEAST_POINTS} points that differ, got {len(logs)}")
    dimension = (len(logs) - 1) / logs.sum().item()
    return dimension, dimension / len(logs) ** 0.5, len(logs)


def gaussian_distance(values: Float[Tensor, "n d"]) -> Float[Tensor, " d"]:
    """Return each column's 2-Wasserstein distance to a Gaussian of its own mean and variance, over its deviation."""
    standard = (values - values.mean(0)) / values.std(0)
    quantiles = torch.special.ndtri((torch.arange(len(values), dtype=values.dtype) + 0.5) / len(values))
    return (standard.sort(0).values - quantiles[:, None]).square().mean(0).sqrt()


def _part(name: str, clouds: list[Tensor], trace: float, points: Sequence[Tensor] = (), near: bool = False) -> Record:
    spectra = [torch.linalg.svdvals(cloud - cloud.mean(0)) ** 2 / (len(cloud) - 1) for cloud in clouds]
    statistics = [geometry.spectrum_statistics(s) for s in spectra if s.max() > 0]  # none for copies of one point
    if not statistics:
        raise ValueError(f"{name}: all of {len(clouds)} sets of tokens are copies of one token")
    values = {
        "variance / that of all tokens": mean_and_spread([s.trace / trace for s in statistics]),
        "effective rank": mean_and_spread([s.effective_rank for s in statistics]),
        "directions for 90 % of the variance": mean_and_spread([s.directions_90 for s in statistics]),
    }
    if all(s.condition_number < float("inf") for s in statistics) and not near:
        values["condition number"] = mean_and_spread([s.condition_number for s in statistics])
    if points:
        dimensions = [two_nn(each) for each in points]
        (dimension, error, count), *others = dimensions
        values["intrinsic dimension (TwoNN)"] = (
            mean_and_spread([one[0] for one in dimensions]) if others else Value(dimension, error, count)
        )
    return Record(kind="tokens", name=name, values=values, settings={"sets": len(statistics)})
