"""The path, the prediction targets, and the conversion of any target into any other (paper, "Path, targets, readout").

A target is a mixture `y = c_x x + c_eps eps`; its two coefficients are all there is to it. With the path
`z = t x + (1 - t) eps` and `det = c_eps t - c_x (1 - t)`, the clean latent and the noise read

    x   = (c_eps z - (1 - t) y) / det
    eps = (t y - c_x z) / det

so that a target `b` follows from a target `a` as

    y_b = ((b_x a_eps - b_eps a_x) z + det_b y_a) / det_a

which is the one formula of this module: `velocity` is its case b = (1, -1). Coefficients are numbers, or tensors that
broadcast to `z`: they may depend on `t`, or, where `z` is written in an orthogonal channel basis, on the channel.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from jlt import files

Coefficient = float | int | Tensor
Time = float | int | Tensor


@dataclass(frozen=True)
class Target:
    """A prediction target `y = c_x x + c_eps eps`: `coefficients(t)` gives (c_x, c_eps), each broadcastable to `z`."""

    name: str
    coefficients: Callable[[Time], tuple[Coefficient, Coefficient]]

    def mix(self, x: Float[Tensor, "*b"], eps: Float[Tensor, "*b"], t: Time) -> Float[Tensor, "*b"]:
        """Return the target's value `y = c_x x + c_eps eps`."""
        c_x, c_eps = self.coefficients(expand(t, x))
        return c_x * x + c_eps * eps

    def det(self, t: Time) -> Coefficient:
        """Return `c_eps t - c_x (1 - t)`, the determinant of (x, eps) -> (z, y) up to its sign."""
        c_x, c_eps = self.coefficients(t)
        return c_eps * t - c_x * (1 - t)


def _constant(name: str, c_x: float, c_eps: float) -> Target:
    return Target(name, lambda t: (c_x, c_eps))


TARGETS = {
    "x": _constant("x", 1.0, 0.0),
    "eps": _constant("eps", 0.0, 1.0),
    "v": _constant("v", 1.0, -1.0),
}


def residual(variance: float | Tensor, name: str = "residual") -> Target:
    """Return the target that a Gaussian of this variance leaves to the network: nothing that z could tell linearly.

    For x ~ N(0, lambda), y = ((1 - t) x - t lambda eps) / sqrt(lambda Var z) has variance 1 and no correlation with z,
    so a prediction of 0 is read as the optimal linear denoiser x = t lambda z / Var z: the skip connection is that
    denoiser (EDM's preconditioning, arXiv 2206.00364, eq. 7, is the case of one lambda). It is x - k eps with
    k = t lambda / (1 - t), in other units. `variance` above 0 is a number, or a tensor of one a direction that
    broadcasts to `z` where `z` is written in those directions. |det| = sqrt(Var z / lambda) is 0 nowhere.
    """

    def coefficients(t: Time) -> tuple[Coefficient, Coefficient]:
        deviation = (t**2 * variance + (1 - t) ** 2) ** 0.5
        return (1 - t) / (variance**0.5 * deviation), -t * variance**0.5 / deviation

    return Target(name, coefficients)


def target(name: str) -> Target:
    """Return the target of that name.

    "x", "eps", "v"; "k=0.25" for `y = x - k eps` with k in [0, 1]; "residual=1" for `residual` with that variance.
    """
    kind, has_number, text = name.partition("=")
    if has_number and kind in ("k", "residual"):
        try:
            number = float(text)
        except ValueError:
            raise ValueError(f"target {name!r}: {kind} must be a number, got {text!r}") from None
        if kind == "residual":
            if not 0 < number < math.inf:
                raise ValueError(f"target {name!r}: residual must be above 0 and finite, got {number}")
            return residual(number, f"residual={number:g}")
        if not 0 <= number <= 1:
            raise ValueError(f"target {name!r}: k must be in [0, 1], got {number}")
        return {0.0: TARGETS["x"], 1.0: TARGETS["v"]}.get(number) or _constant(f"k={number:g}", 1.0, -number)
    return files.choose("target", name, {**TARGETS, "k=K": TARGETS["x"], "residual=VARIANCE": TARGETS["x"]})


def expand(t: Time, z: Tensor) -> Time:
    """Shape a vector with one time an image so that it broadcasts to `z` of shape (b, ...); leave any other `t`."""
    if isinstance(t, Tensor) and t.ndim == 1 and z.ndim > 1:
        return t.reshape(-1, *[1] * (z.ndim - 1))
    return t


def interpolate(x: Float[Tensor, "*b"], eps: Float[Tensor, "*b"], t: Time) -> Float[Tensor, "*b"]:
    """Return the noisy latent `z = t x + (1 - t) eps`."""
    t = expand(t, x)
    return t * x + (1 - t) * eps


def convert(
    y: Float[Tensor, "*b"], z: Float[Tensor, "*b"], t: Time, source: Target, to: Target, floor: float = 0.0
) -> Float[Tensor, "*b"]:
    """Turn `y`, a value of the target `source` at (z, t), into the value of the target `to`.

    Exact unless a `floor` is given, which bounds |det| of the source from below and keeps its sign. Without one the
    result is infinite or NaN where `source` does not determine `to` (eps at t = 0, x at t = 1).
    """
    t = expand(t, z)
    if source.name == to.name:
        return y  # not even a division of det by det, which may be zero
    a_x, a_eps = source.coefficients(t)
    b_x, b_eps = to.coefficients(t)
    return ((b_x * a_eps - b_eps * a_x) * z + to.det(t) * y) / floored(source.det(t), a_eps - a_x, floor)


def velocity(
    target: Target, y: Float[Tensor, "*b"], z: Float[Tensor, "*b"], t: Time, floor: float = 0.05
) -> Float[Tensor, "*b"]:
    """Read `v = ((c_x + c_eps) z - y) / det` from a prediction; |det| is at least `floor` (0.05 in the paper)."""
    return convert(y, z, t, target, TARGETS["v"], floor)


def floored(det: Coefficient, sign: Coefficient, floor: float) -> Coefficient:
    """Return `sign(det) max(|det|, floor)`; where det is 0, at an end of the path, the sign is that of `sign`.

    There `sign = c_eps - c_x` is the side from which det comes: 0 from below for x at t = 1, from above for eps at 0.
    """
    if not floor:
        return det
    if isinstance(det, Tensor):
        positive = torch.where(det == 0, sign, det) > 0
        return torch.where(positive, det.clamp(min=floor), det.clamp(max=-floor))
    return max(det, floor) if (det or sign) > 0 else min(det, -floor)
