"""Densities of the training time t, each given by its quantile function, so that one uniform number makes one time.

`logit-normal`: logit(t) ~ N(mean, std^2), the paper's choice with (-0.8, 0.8). `uniform`: t ~ U(0, 1). Either may be
shifted towards the noise by `t -> t / (t + shift (1 - t))` (shift > 1; SD3, arXiv 2403.03206, eq. 23 for t = 0 data).
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from jlt import files


@dataclass(frozen=True)
class TimeDensity:
    """A density of t: its name in DENSITIES, the mean and std of logit(t) (logit-normal only), and the shift."""

    name: str = "logit-normal"
    mean: float = -0.8
    std: float = 0.8
    shift: float = 1.0

    def __post_init__(self) -> None:
        files.choose("time density", self.name, DENSITIES)
        if not math.isfinite(self.mean):
            raise ValueError(f"the time density's mean must be finite, got {self.mean}")
        for name, value in (("std", self.std), ("shift", self.shift)):
            if not 0 < value < math.inf:
                raise ValueError(f"the time density's {name} must be above 0 and finite, got {value}")

    def quantile(self, u: Float[Tensor, "*b"]) -> Float[Tensor, "*b"]:
        """Map uniform numbers in (0, 1) to times in (0, 1)."""
        t = DENSITIES[self.name](u, self)
        return t / (t + self.shift * (1 - t))


def _logit_normal(u: Tensor, density: TimeDensity) -> Tensor:
    return torch.sigmoid(density.mean + density.std * torch.special.ndtri(u))


def _uniform(u: Tensor, density: TimeDensity) -> Tensor:
    return u


DENSITIES: dict[str, Callable[[Tensor, TimeDensity], Tensor]] = {"logit-normal": _logit_normal, "uniform": _uniform}
