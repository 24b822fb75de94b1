"""The field that a solver follows: a model, its target and a guidance rule, read as velocity and clean latent.

A predictor is any `predict(z, t, label) -> y`; guidance is a predictor made from a predictor, and the model never hears
of it. `t` is one Python number for the whole batch, so that no choice waits for a device. Rules of guidance act on all
channels at once.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from jlt import files
from jlt.flow.targets import TARGETS, Target, convert, fitted, velocity

Predictor = Callable[[Tensor, float, Tensor | None], Tensor]


class Prediction(NamedTuple):
    """What a field says at (z, t): the velocity, floored as in the paper, and the clean latent, without a floor.

    Where the target does not determine the clean latent (eps at t = 0), it is read from the velocity, floored.
    """

    v: Tensor
    x: Tensor


@dataclass
class Passes:
    """Runs a network at one time for a whole batch, and counts its forward passes.

    Attributes:
        model: called as `model(z, t, label)`.
        shares: whether `model` takes `rows`, as jlt.nn.Transformer does: then one time is embedded instead of a batch
            of them, and every class once, and so are the modulations that follow from them.
        together: the most images whose two passes of guidance are one call; more are two calls.
        count: forward passes an image; one call on two halves is two.
    """

    model: Callable[..., Tensor]
    shares: bool = False
    together: float = math.inf
    count: int = 0
    seen: dict[Tensor, tuple[Tensor, ...]] = field(default_factory=dict, repr=False)  # a batch's labels, by identity
    pairs: dict[Tensor, tuple[Tensor, Tensor]] = field(default_factory=dict, repr=False)

    def __call__(self, z: Tensor, t: float, label: Tensor | None) -> Tensor:
        """Run the network once."""
        self.count += 1
        if not self.shares:
            return self.model(z, torch.full((len(z),), t, device=z.device, dtype=z.dtype), label)
        time = torch.full((1,), t, device=z.device, dtype=z.dtype)
        if label is None:
            return self.model(z, time)
        if label not in self.seen:  # once a batch, since it waits for the device
            different, rows = torch.unique(label, return_inverse=True)
            self.seen[label] = (different, rows) if len(different) > 1 else (different,)
        different, *rows = self.seen[label]
        return self.model(z, time, different, rows=rows[0] if rows else None)

    def pair(self, z: Tensor, t: float, label: Tensor, no_class: int) -> tuple[Tensor, Tensor]:
        """Run the network with the class and without."""
        if label not in self.pairs:
            none = torch.full_like(label, no_class)
            self.pairs[label] = none, torch.cat([label, none])
        none, both = self.pairs[label]
        if len(z) > self.together:
            return self(z, t, label), self(z, t, none)
        self.count += 1
        conditional, unconditional = self(torch.cat([z, z]), t, both).chunk(2)
        return conditional, unconditional


Rule = Callable[[Tensor, Tensor, Tensor, float, float], Tensor]  # (y, other y, z, t, scale) -> y


def extrapolated(y: Tensor, other: Tensor, z: Tensor, t: float, scale: float) -> Tensor:
    """Return `other + scale (y - other)`: Ho and Salimans, arXiv 2207.12598, eq. 6 with scale = 1 + w.

    Linear, and every target is affine in every other at one (z, t), so guiding y guides x, eps and v alike.
    """
    return torch.lerp(other, y, scale)


@dataclass
class Rescaled:
    """CFG-Zero*, arXiv 2503.18886: the other velocity is first scaled to be nearest to this one, image by image."""

    target: Target

    def __call__(self, y: Tensor, other: Tensor, z: Tensor, t: float, scale: float) -> Tensor:
        """Guide; velocities are read as det v, since a common factor leaves the scale as it is, and det may be 0.

        A det by channel is no common factor, and 0 nowhere.
        """
        still, det = self.target.mix(z, z, t), self.target.det(t)  # what is predicted where the velocity is 0
        factor = fitted(det, y) if isinstance(det, Tensor) else 1.0
        v, v_other = (still - y) / factor, (still - other) / factor
        share = sums(v * v_other) / sums(v_other.square()).clamp(min=torch.finfo(v.dtype).tiny)
        return still - factor * torch.lerp(share * v_other, v, scale)


@dataclass
class Projected:
    """Adaptive projected guidance, arXiv 2410.02416, in x: `x + (scale - 1) (across + eta along)`.

    The change x - other, plus `momentum` times what it was before, is cut to a root mean square of `threshold` (0:
    never; the paper's is a norm) and split along x and across it. With eta 1, no momentum and no threshold it is
    classifier-free guidance. It remembers, so each batch needs one of its own; each evaluation counts as a step. Where
    the target does not determine x (eps at t = 0), y is extrapolated.
    """

    target: Target
    eta: float
    momentum: float
    threshold: float
    before: Tensor | None = field(default=None, init=False)

    def __call__(self, y: Tensor, other: Tensor, z: Tensor, t: float, scale: float) -> Tensor:
        """Guide."""
        if undetermined(self.target, t):
            return extrapolated(y, other, z, t, scale)
        per_y = fitted(-(1 - t) / self.target.det(t), y)  # dx / dy
        change = per_y * (y - other)
        if self.before is not None:
            change = change + self.momentum * self.before
        self.before = change
        if self.threshold:
            rms = (sums(change.square()) / change[0].numel()).sqrt()
            change = change * (self.threshold / rms.clamp(min=torch.finfo(y.dtype).tiny)).clamp(max=1)
        x = convert(y, z, t, self.target, TARGETS["x"])
        along = sums(change * x) / sums(x.square()).clamp(min=torch.finfo(y.dtype).tiny) * x
        return y + (scale - 1) / per_y * (change + (self.eta - 1) * along)


def undetermined(target: Target, t: float) -> bool:
    """Return whether a target's det is 0, so that it gives no other target; one by channel is 0 nowhere."""
    det = target.det(t)
    return not isinstance(det, Tensor) and det == 0


def sums(z: Tensor) -> Tensor:
    """Return each image's sum, to broadcast to `z`."""
    return z.flatten(1).sum(1).reshape(-1, *[1] * (z.ndim - 1))


@dataclass(frozen=True)
class Guidance:
    """A row of GUIDANCE: what makes its rule, from the target and its options, and the options' defaults."""

    rule: Callable[[Target, Mapping[str, float]], Rule]
    options: Mapping[str, float]


GUIDANCE: dict[str, Guidance] = {
    "cfg": Guidance(lambda target, options: extrapolated, {}),
    "cfg-zero": Guidance(lambda target, options: Rescaled(target), {"until": 0.04}),
    "apg": Guidance(
        lambda target, options: Projected(target, **options), {"eta": 0.0, "momentum": -0.5, "threshold": 0.0}
    ),
    "auto": Guidance(lambda target, options: extrapolated, {}),
}

# The factor of scale - 1 at t; each has mean 1 over [0, 1]. Wang et al., arXiv 2404.13040.
SCHEDULES: dict[str, Callable[[float], float]] = {
    "constant": lambda t: 1.0,
    "linear": lambda t: 2 * t,
    "cosine": lambda t: 1 - math.cos(math.pi * t),
}


def parse_guidance(text: str) -> tuple[str, str, dict[str, float]]:
    """Return rule, schedule and options of, for instance, `cfg`, `cfg:schedule=linear`, `apg:eta=0.5,momentum=0`."""
    name, _, rest = text.partition(":")
    options, schedule = dict(files.choose("guidance", name, GUIDANCE).options), "constant"
    for part in rest.split(",") if rest else ():
        key, _, value = part.partition("=")
        files.choose(f"option of guidance {name}", key, {**options, "schedule": None})
        if key == "schedule":
            files.choose("schedule", value, SCHEDULES)
            schedule = value
            continue
        try:
            options[key] = float(value)
        except ValueError:
            options[key] = math.nan
        if not math.isfinite(options[key]):
            raise ValueError(f"guidance {text!r}: {key} must be a finite number, got {value!r}")
        if key in ("threshold", "until") and options[key] < 0:
            raise ValueError(f"guidance {text!r}: {key} must be at least 0, got {value!r}")
    return name, schedule, options


@dataclass
class Guide:
    """A second network of the same latents, and the target that it predicts."""

    passes: Passes
    target: Target


@dataclass
class Guided:
    """Guidance where low < t < high; a `low` of 0 includes t = 0.

    The other prediction is the one without a class, or a guide's. Outside the interval, and where
    the scale is 1, only the conditional prediction is made. So it is where a guide's target says nothing about y.
    """

    passes: Passes
    no_class: int
    scale: float
    interval: tuple[float, float]
    rule: Rule = extrapolated
    schedule: str = "constant"
    target: Target = TARGETS["x"]
    guide: Guide | None = None
    still_until: float = 0.0

    def __call__(self, z: Tensor, t: float, label: Tensor | None) -> Tensor:
        """Predict under guidance."""
        low, high = self.interval
        if t < self.still_until:
            return self.target.mix(z, z, t)
        scale = 1 + (self.scale - 1) * SCHEDULES[self.schedule](t) if self.schedule != "constant" else self.scale
        if scale == 1 or not ((low < t or low == t == 0) and t < high):
            return self.passes(z, t, label)
        if self.guide is not None:
            y, source = self.passes(z, t, label), self.guide.target
            if source.name != self.target.name and undetermined(source, t):
                return y
            other = convert(self.guide.passes(z, t, label), z, t, source, self.target)
            return self.rule(y, other, z, t, scale)
        assert label is not None, "guidance needs labels"
        return self.rule(*self.passes.pair(z, t, label, self.no_class), z, t, scale)


def default_scale(num_classes: int) -> float:
    """Return the paper's guidance scale, or none for an unconditional model."""
    return 2.9 if num_classes else 1.0


def guided(
    passes: Passes,
    target: Target,
    num_classes: int,
    scale: float = 1.0,
    interval: tuple[float, float] = (0.0, 1.0),
    guidance: str = "cfg",
    guide: Guide | None = None,
) -> Predictor:
    """Wrap a network that predicts `target` in guidance; scale 1 is the network itself, to the bit and at one pass.

    `guidance` is a key of GUIDANCE, perhaps with options; "auto" is autoguidance (Karras et al., arXiv 2406.02507) and
    needs a `guide`. Raises ValueError for a reversed or outlying interval, a scale that is not finite, unknown or
    impossible options, and for guidance that lacks what it compares with: classes or a guide.
    """
    low, high = interval
    if not 0 <= low < high <= 1:
        raise ValueError(f"the guidance interval must satisfy 0 <= low < high <= 1, got ({low}, {high})")
    name, schedule, options = parse_guidance(guidance)
    if (name == "auto") != (guide is not None):
        raise ValueError(f"guidance {name!r} {'needs a guide' if guide is None else 'takes no guide, auto does'}")
    if not math.isfinite(scale):
        raise ValueError(f"the guidance scale must be finite, got {scale}")
    if scale == 1:
        return passes
    if num_classes == 0 and guide is None:
        raise ValueError(f"guidance scale {scale} needs a class-conditional model, this one has num_classes = 0")
    rule = GUIDANCE[name].rule(target, options)
    return Guided(passes, num_classes, scale, interval, rule, schedule, target, guide, options.get("until", 0.0))


def classifier_free(
    passes: Passes, num_classes: int, scale: float = 1.0, interval: tuple[float, float] = (0.0, 1.0)
) -> Predictor:
    """Wrap a network in plain classifier-free guidance, which is the same for every target: `guided`'s default."""
    return guided(passes, TARGETS["x"], num_classes, scale, interval)


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
        if undetermined(self.target, t) and self.target.name != "x":
            return Prediction(v, z + (1 - t) * v)
        return Prediction(v, convert(y, z, t, self.target, TARGETS["x"]))
