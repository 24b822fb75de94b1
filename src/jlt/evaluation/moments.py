"""Moments: count, mean and covariance of features, in float64, however the features were split into batches.

On disk a set of moments is one safetensors file: the tensors `mean` (d,) and `scatter` (d, d), the sum of the outer
products of the centred features, and in the header's metadata `format_version`, `extractor` (its name), `fingerprint`,
`count` and `source` (what the images were). It is readable only for the extractor that it was made with.
"""

from dataclasses import dataclass
from pathlib import Path

import safetensors
import safetensors.torch
import torch
from jaxtyping import Float, Float64
from torch import Tensor

from jlt import files
from jlt.evaluation.features import Extractor

FORMAT_VERSION = 1


class Moments:
    """The running `count`, `mean` (d,) and `scatter` (d, d) of all features seen."""

    def __init__(self, dimension: int) -> None:
        self.count = 0
        self.mean: Float64[Tensor, " d"] = torch.zeros(dimension, dtype=torch.float64)
        self.scatter: Float64[Tensor, "d d"] = torch.zeros(dimension, dimension, dtype=torch.float64)

    @property
    def dimension(self) -> int:
        """The length of a feature vector."""
        return len(self.mean)

    @property
    def covariance(self) -> Float64[Tensor, "d d"]:
        """The unbiased covariance (divided by count - 1)."""
        if self.count < 2:
            raise ValueError(f"a covariance needs at least 2 images, got {self.count}")
        return self.scatter / (self.count - 1)

    def update(self, features: Float[Tensor, "b d"]) -> None:
        """Add a batch of features; NaN, infinities and another dimension are ValueErrors, and nothing is added."""
        check_features(features, self.dimension)
        if len(features) == 0:
            return
        features = features.detach().to("cpu", torch.float64)
        mean = features.mean(0)
        self._add(len(features), mean, features - mean)

    def merge(self, other: "Moments") -> None:
        """Add all that `other` has seen."""
        if other.dimension != self.dimension:
            raise ValueError(f"features of dimension {other.dimension} cannot join those of dimension {self.dimension}")
        if other.count > 0:
            self._add(other.count, other.mean, torch.zeros(0, self.dimension, dtype=torch.float64))
            self.scatter += other.scatter

    def _add(self, count: int, mean: Tensor, centred: Tensor) -> None:
        # Chan, Golub and LeVeque (1983): the shift of the means enters the scatter as one more centred row.
        total = self.count + count
        shift = mean - self.mean
        rows = torch.cat([centred, (shift * (self.count * count / total) ** 0.5)[None]])
        self.scatter.addmm_(rows.T, rows)
        self.mean += shift * (count / total)
        self.count = total


@dataclass(frozen=True)
class Stated:
    """Mean and covariance as a file states them, of a number of images that it may not state."""

    mean: Float64[Tensor, " d"]
    covariance: Float64[Tensor, "d d"]
    count: int | None = None

    @property
    def dimension(self) -> int:
        """The length of a feature vector."""
        return len(self.mean)


def check_features(features: Tensor, dimension: int) -> None:
    """Refuse features of another dimension, and any that are not finite."""
    if features.ndim != 2 or features.shape[1] != dimension:
        raise ValueError(f"features are {tuple(features.shape)}, expected (images, {dimension})")
    if bad := int((~features.isfinite()).any(1).sum()):
        raise ValueError(f"features of {bad} of {len(features)} images are NaN or infinite")


def save(moments: Moments, path: Path, extractor: Extractor, source: str) -> None:
    """Write moments of `source`'s images under `extractor`, whole or not at all."""
    metadata = {
        "format_version": str(FORMAT_VERSION),
        "extractor": extractor.name,
        "fingerprint": extractor.fingerprint,
        "count": str(moments.count),
        "source": source,
    }
    tensors = {"mean": moments.mean, "scatter": moments.scatter}
    files.write_bytes(path, safetensors.torch.save(tensors, metadata))


def load(path: Path, extractor: Extractor) -> tuple[Moments, str]:
    """Read moments and their source; those of another extractor, dimension or format version are a ValueError."""
    try:
        with safetensors.safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118, not a dict
    except safetensors.SafetensorError as error:
        raise ValueError(f"{path} is not a safetensors file: {error}") from None
    if (version := metadata.get("format_version")) != str(FORMAT_VERSION):
        raise ValueError(f"{path} holds moments of format version {version}, this jlt reads {FORMAT_VERSION}")
    theirs = (metadata.get("extractor"), metadata.get("fingerprint"))
    if theirs != (extractor.name, extractor.fingerprint):
        raise ValueError(
            f"{path} was made with {theirs[0]} ({theirs[1]}), not with {extractor.name} ({extractor.fingerprint})"
        )
    d = extractor.dimension
    expected = {"mean": ((d,), torch.float64), "scatter": ((d, d), torch.float64)}
    if (found := {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()}) != expected:
        raise ValueError(f"{path} holds {found}, moments of {extractor.name} are {expected}")
    count = metadata.get("count", "")
    if not (count.isascii() and count.isdigit()) or not all(
        bool(tensor.isfinite().all()) for tensor in tensors.values()
    ):
        raise ValueError(f"{path} holds a count of {count!r} or numbers that are not finite")
    moments = Moments(d)
    moments.count, moments.mean, moments.scatter = int(count), tensors["mean"], tensors["scatter"]
    return moments, metadata.get("source", "")
