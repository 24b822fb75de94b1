"""Time grids: where a solver's steps begin and end, from exactly 0 (noise) to exactly 1 (data).

A grid is `name` or `name=value`, with u = i / steps:

    uniform       t = u                                             the paper's
    shifted=3     t = u / (u + s (1 - u))                           SD3, arXiv 2403.03206, eq. 23: s > 1 dwells at noise
    logit=3       t = (sigmoid(a (2u - 1)) - sigmoid(-a)) / (sigmoid(a) - sigmoid(-a)): nearly even in log(t / (1 - t))
    karras=7      t = 1 / (1 + sigma), sigma^(1/rho) even from 80 to 0.002, then the ends: EDM, arXiv 2206.00364, eq. 5

As a becomes 0 and s becomes 1, logit and shifted become uniform.
"""

import itertools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from jlt import files


@dataclass(frozen=True)
class Grid:
    """A family of grids: `time(i, steps, value)` for 0 < i < steps, and the value that its bare name means."""

    time: Callable[[int, int, float], float]
    value: float | None = None


def time_grid(name: str, steps: int) -> list[float]:
    """Return the steps + 1 rising times of a grid; a bad name, value or number of steps is a ValueError."""
    if steps < 1:
        raise ValueError(f"steps must be at least 1, got {steps}")
    family, value = parse("grid", name, {key: row.value for key, row in GRIDS.items()})
    try:
        times = [0.0, *(GRIDS[family].time(i, steps, value) for i in range(1, steps)), 1.0]
    except ArithmeticError as error:
        raise ValueError(f"grid {name!r} cannot be worked out: {error}") from None
    if any(end <= start for start, end in itertools.pairwise(times)):
        raise ValueError(f"grid {name!r} has steps of no length at {steps} steps")
    return times


def parse(kind: str, name: str, defaults: Mapping[str, float | None]) -> tuple[str, float]:
    """Split `name` or `name=value`, the value above 0; `defaults` gives a bare name's, None where it takes none."""
    known, equals, text = name.partition("=")
    default = files.choose(kind, known, defaults)
    if not equals:
        return known, default or 0.0
    if default is None:
        raise ValueError(f"{kind} {known!r} takes no value, got {text!r}")
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise ValueError(f"{kind} {name!r}: the value must be a number above 0, got {text!r}")
    return known, value


def _shifted(i: int, steps: int, shift: float) -> float:
    u = i / steps
    return u / (u + shift * (1 - u))


def _logit(i: int, steps: int, width: float) -> float:
    # sigmoid is tanh of half the argument but for an affine map, which the ends fix
    return (1 + math.tanh(width * (i / steps - 0.5)) / math.tanh(width / 2)) / 2


def _karras(i: int, steps: int, rho: float) -> float:
    high, low = 80 ** (1 / rho), 0.002 ** (1 / rho)
    return 1 / (1 + (high + i / (steps - 1) * (low - high)) ** rho)


GRIDS: dict[str, Grid] = {
    "uniform": Grid(lambda i, steps, _: i / steps),
    "shifted": Grid(_shifted, 3.0),
    "logit": Grid(_logit, 3.0),
    "karras": Grid(_karras, 7.0),
}
