"""Moments: count, mean and covariance of features, in float64, however the features were split into batches."""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Float64
from torch import Tensor


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
