"""The field that a solver follows: a model, its target and a guidance rule, read as velocity and clean latent.

A predictor is any `predict(z, t, label) -> y`; guidance is a predictor made from a predictor, and the model never hears
of it. `t` is one Python number for the whole batch, so that no choice waits for a device.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from jlt.flow.targets import TARGETS, Target, convert, velocity

Predictor = Callable[[Tensor, float, Tensor | None], Tensor]


class Prediction(NamedTuple):
    """What a field says at (z, t): the velocity, floored as in the paper, and the clean latent, without a floor.

    Where the target does not determine the clean latent (eps at t = 0), it is read from the velocity, floored.
    """

    v: Tensor
    x: Tensor


@dataclass
class Passes:
    """Counts a network's forward passes: one batched call on two halves is two passes an image."""

    model: Callable[[Tensor, Tensor, Tensor | None], Tensor]
    count: int = 0

    def __call__(self, z: Tensor, t: float, label: Tensor | None) -> Tensor:
        """Run the network at one time for the whole batch."""
        self.count += 1
        return self.model(z, torch.full((len(z),), t, device=z.device, dtype=z.dtype), label)


@dataclass
class Guided:
    """Classifier-free guidance `y_0 + scale (y_c - y_0)` where low < t < high; a `low` of 0 includes t = 0.

    Both halves are one batched call. Outside the interval, and for scale 1 anywhere, only the conditional half runs.
    Guidance is linear and every target is affine in every other at one (z, t), so guiding y guides x, eps and v alike.
    """

    passes: Passes
    no_class: int
    scale: float
    interval: tuple[float, float]

    def __call__(self, z: Tensor, t: float, label: Tensor | None) -> Tensor:
        """Predict under guidance."""
        assert label is not None, "guidance needs labels"
        low, high = self.interval
        if self.scale == 1 or not ((low < t or low == t == 0) and t < high):
            return self.passes(z, t, label)
        self.passes.count += 1
        both = torch.cat([label, torch.full_like(label, self.no_class)])
        conditional, unconditional = self.passes(torch.cat([z, z]), t, both).chunk(2)
        return torch.lerp(unconditional, conditional, self.scale)


def default_scale(num_classes: int) -> float:
    """Return the paper's guidance scale, or none for an unconditional model."""
    return 2.9 if num_classes else 1.0


def classifier_free(
    passes: Passes, num_classes: int, scale: float = 1.0, interval: tuple[float, float] = (0.0, 1.0)
) -> Predictor:
    """Wrap a network in classifier-free guidance; scale 1 is the network itself, to the bit and at one pass.

    Raises ValueError for a reversed or outlying interval, and for guidance on an unconditional model.
    """
    low, high = interval
    if not 0 <= low < high <= 1:
        raise ValueError(f"the guidance interval must satisfy 0 <= low < high <= 1, got ({low}, {high})")
    if scale == 1:
        return passes
    if num_classes == 0:
        raise ValueError(f"guidance scale {scale} needs a class-conditional model, this one has num_classes = 0")
    return Guided(passes, num_classes, scale, interval)


@dataclass
class Field:
    """Velocity and clean latent at (z, t), read from a predictor of `target`; counts its evaluations."""

    predict: Predictor
    target: Target
    label: Int[Tensor, " b"] | None = None
    floor: float = 0.05
    evaluations: int = field(default=0, init=False)

    def __call__(self, z: Float[Tensor, "b *c"], t: float) -> Prediction:
        """Evaluate once."""
        self.evaluations += 1
        y = self.predict(z, t, self.label)
        v = velocity(self.target, y, z, t, self.floor)
        det = self.target.det(t)
        if not isinstance(det, Tensor) and det == 0 and self.target.name != "x":
            return Prediction(v, z + (1 - t) * v)
        return Prediction(v, convert(y, z, t, self.target, TARGETS["x"]))
