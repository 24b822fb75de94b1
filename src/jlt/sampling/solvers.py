"""ODE solvers: pure functions of a field, the noise, and a time grid from 0 (noise) to 1 (data).

A solver calls `callback(i, t, z, x)` after reading the field at the start of step i; x is the field's clean latent.
"""

import itertools
from collections.abc import Callable, Sequence

from torch import Tensor

from jlt.sampling.field import Prediction

AnyField = Callable[[Tensor, float], Prediction]
Callback = Callable[[int, float, Tensor, Tensor], None]


def uniform_grid(steps: int) -> list[float]:
    """Return the times 0, 1/steps, ..., 1."""
    if steps < 1:
        raise ValueError(f"steps must be at least 1, got {steps}")
    return [i / steps for i in range(steps + 1)]


def euler(field: AnyField, z: Tensor, grid: Sequence[float], callback: Callback | None = None) -> Tensor:
    """Solve by Euler's method: order 1, one evaluation a step."""
    for i, (t, end) in enumerate(itertools.pairwise(grid)):
        v, x = field(z, t)
        if callback:
            callback(i, t, z, x)
        z = z + (end - t) * v
    return z


def heun(field: AnyField, z: Tensor, grid: Sequence[float], callback: Callback | None = None) -> Tensor:
    """Solve by Heun's method: order 2, two evaluations a step, the last an Euler step as in the authors' code.

    The last step has one because the velocity of a clean latent has no denominator left at t = 1.
    """
    for i, (t, end) in enumerate(itertools.pairwise(grid)):
        v, x = field(z, t)
        if callback:
            callback(i, t, z, x)
        proposal = z + (end - t) * v
        if i < len(grid) - 2:
            proposal = z + (end - t) * 0.5 * (v + field(proposal, end).v)
        z = proposal
    return z


SOLVERS: dict[str, Callable[[AnyField, Tensor, Sequence[float], Callback | None], Tensor]] = {
    "euler": euler,
    "heun": heun,
}
