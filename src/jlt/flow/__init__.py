"""The mathematics, with no network: path, targets, time densities, loss, counter-based randomness, Gaussian geometry.

The path is `z = t x + (1 - t) eps`, `t` in [0, 1], 0 = noise and 1 = data; its velocity is `v = dz/dt = x - eps`.
`t` is a number, a scalar tensor, a vector with one time an image, or anything broadcastable to `z`.
"""

from jlt.flow.loss import WEIGHTS, loss
from jlt.flow.targets import TARGETS, Target, convert, interpolate, target, velocity
from jlt.flow.times import DENSITIES, TimeDensity

__all__ = [
    "DENSITIES",
    "TARGETS",
    "WEIGHTS",
    "Target",
    "TimeDensity",
    "convert",
    "interpolate",
    "loss",
    "target",
    "velocity",
]
