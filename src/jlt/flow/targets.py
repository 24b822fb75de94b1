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
from collections.abc import Callable, Sequence
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
        return fitted(c_x, x) * x + fitted(c_eps, x) * eps

    def det(self, t: Time) -> Coefficient:
        """Return `c_eps t - c_x (1 - t)`, the determinant of (x, eps) -> (z, y) up to its sign."""
        c_x, c_eps = self.coefficients(t)
        return c_eps * t - c_x * (1 - t)

    @property
    def short(self) -> str:
        """The name without measured numbers."""
        return short_name(self.name)


def short_name(name: str) -> str:
    """Return a target's name without measured numbers."""
    return name.partition(":")[0]


def _constant(name: str, c_x: float, c_eps: float) -> Target:
    return Target(name, lambda t: (c_x, c_eps))


CHANNELS = "residual=channels"
TARGETS = {
    "x": _constant("x", 1.0, 0.0),
    "eps": _constant("eps", 0.0, 1.0),
    "v": _constant("v", 1.0, -1.0),
}


def between(start: float, end: float) -> Target:
    """Return the target `y = x - k(t) eps`, with k linear from `start` at t = 0 to `end` at t = 1, both in [0, 1].

    -det = 1 - t + t k(t) is above 0 wherever t < 1, for all such pairs, and `end` at t = 1: only where that is 0 does
    the velocity need a floor. From 0 to 1 it is x where z is noise and v where z is nearly clean, |det| >= 3/4.
    """
    for k in (start, end):
        if not 0 <= k <= 1:
            raise ValueError(f"target x - k eps: k must be in [0, 1], got {k}")
    if start == end:
        return {0.0: TARGETS["x"], 1.0: TARGETS["v"]}.get(start) or _constant(f"k={start:g}", 1.0, -start)
    # a sum of both ends, exact at both: a start plus a slope may miss the end by a rounding
    return Target(f"k={start:g}..{end:g}", lambda t: (1.0, -(start * (1 - t) + end * t)))


def residual(variance: float | Tensor, name: str = "residual") -> Target:
    """Return the target that a Gaussian of this variance leaves to the network: nothing that z could tell linearly.

    For x ~ N(0, lambda), y = ((1 - t) x - t lambda eps) / sqrt(lambda Var z) has variance 1 and no correlation with z,
    so a prediction of 0 is read as the optimal linear denoiser x = t lambda z / Var z: the skip connection is that
    denoiser (EDM's preconditioning, arXiv 2206.00364, eq. 7, is the case of one lambda). It is x - k eps with
    k = t lambda / (1 - t), in other units. `variance` above 0 is a number, or a tensor of one a direction that
    broadcasts to `z` where `z` is written in those directions. |det| = sqrt(Var z / lambda) is 0 nowhere.
    """

    def coefficients(t: Time) -> tuple[Coefficient, Coefficient]:
        own = fitted(variance, t) if isinstance(t, Tensor) else variance
        deviation = (t**2 * own + (1 - t) ** 2) ** 0.5
        return (1 - t) / (own**0.5 * deviation), -t * own**0.5 / deviation

    return Target(name, coefficients)


def channel_residual(variances: Sequence[float]) -> Target:
    """Return `residual` with a variance for each channel of z (b, c, h, w).

    Its name states the variances to six digits, `residual=channels:4,1,0.1`, and `target` makes it anew from that.
    """
    stated = [f"{variance:.6g}" for variance in variances]
    return residual(torch.tensor([float(text) for text in stated])[:, None, None], f"{CHANNELS}:{','.join(stated)}")


def target(name: str) -> Target:
    """Return the target of that name.

    "x", "eps", "v"; "k=0.25" for `y = x - k eps` with k in [0, 1], "k=0..1" for a k that changes with t (`between`);
    "residual=1" for `residual` with that variance, "residual=channels:4,1,0.1" with one for each channel.
    """
    kind, has_number, text = name.partition("=")
    if name == CHANNELS:
        raise ValueError(f"target {name!r} is measured when a training begins; the run then states its variances")
    if has_number and kind == "residual":
        by_channel = name.startswith(f"{CHANNELS}:")
        parts = text.partition(":")[2].split(",") if by_channel else [text]
        variances = [_number(name, part) for part in parts]
        if outside := [variance for variance in variances if not 0 < variance < math.inf]:
            raise ValueError(f"target {name!r:.60}: residual must be above 0 and finite, got {outside[0]}")
        return channel_residual(variances) if by_channel else residual(variances[0], f"residual={variances[0]:g}")
    if has_number and kind == "k":
        ends = [_number(name, part) for part in text.split("..")]
        if len(ends) > 2:
            raise ValueError(f"target {name!r}: k is one number, or two, at t = 0 and at t = 1; got {len(ends)}")
        return between(ends[0], ends[-1])
    options = ("k=K", "k=K0..K1", "residual=VARIANCE", CHANNELS)
    return files.choose("target", name, {**TARGETS, **dict.fromkeys(options, TARGETS["x"])})


def _number(name: str, text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise ValueError(f"target {name!r:.60}: {name.partition('=')[0]} must be a number, got {text!r}") from None


def check_channels(target: Target, channels: int) -> None:
    """Raise a ValueError for a target that states variances of another number of channels than the latents have."""
    _, measured, text = target.name.partition(":")
    if measured and (count := len(text.split(","))) != channels:
        raise ValueError(f"target {target.short} states {count} variances, the latents have {channels} channels")


def check_floor(floor: float) -> None:
    """Raise a ValueError for a bound on |det| that is negative or not finite."""
    if not 0 <= floor < math.inf:
        raise ValueError(f"floor must be at least 0 and finite, got {floor}")


def fitted(coefficient: Coefficient, z: Tensor) -> Coefficient:
    """Return a coefficient where `z` is: on its device and in its dtype."""
    return coefficient.to(z) if isinstance(coefficient, Tensor) else coefficient


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
    det = floored(source.det(t), a_eps - a_x, floor)
    return (fitted(b_x * a_eps - b_eps * a_x, z) * z + fitted(to.det(t), z) * y) / fitted(det, z)


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
