"""From data back to noise, and between two noises.

A field read backwards is a field again: with s = 1 - t the path is z = s eps + (1 - s) x, so noise and clean latent
exchange their parts, and every solver runs towards the noise as it runs towards the data, with the same limits.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor

from jlt.sampling.field import Prediction
from jlt.sampling.generator import Generator, Making
from jlt.sampling.grids import time_grid
from jlt.sampling.solvers import AnyField
from jlt.sampling.solvers import solver as find_solver


def backwards(field: AnyField) -> AnyField:
    """Return the field in s = 1 - t: velocity -v, and for the clean latent the noise (from v, floored, at t = 1)."""

    def read(z: Tensor, s: float) -> Prediction:
        t = 1 - s
        v, x = field(z, t)
        return Prediction(-v, (z - t * x) / s if s else x - v)

    return read


def invert(
    generator: Generator,
    latents: Float[Tensor, "n c h w"],
    labels: Sequence[int] | Int[Tensor, " n"],
    *,
    solver: str = Making.solver,
    grid: str = Making.grid,
    steps: int = Making.steps,
) -> Float[Tensor, "n c h w"]:
    """Return the noise from which the unguided model makes these normalised latents, up to the solver's error.

    Latents and labels of other shapes than the model's and each other's, and a solver that draws noise, which has no
    way back, are a ValueError.
    """
    solve, label = find_solver(solver), torch.as_tensor(labels, dtype=torch.int64)
    if solve.stochastic:
        raise ValueError(f"solver {solver!r} draws noise, so it cannot be followed back")
    how = Making(solver=solver, grid=grid, steps=steps)
    generator.check(label, how)
    generator.check_latents("latents", latents, label)
    device = next(generator.model.parameters()).device
    field = generator.field(generator.passes(), label, how)
    times = [1 - t for t in reversed(time_grid(grid, steps))]
    with torch.no_grad():
        return solve(backwards(field), latents.to(device), times).cpu()


def slerp(a: Float[Tensor, "*b"], b: Float[Tensor, "*b"], weight: float) -> Float[Tensor, "*b"]:
    """Interpolate on the arc from `a` (weight 0) to `b` (weight 1): two noises of one variance give a third of it."""
    cosine = ((a * b).sum().double() / (a.double().norm() * b.double().norm())).clamp(-1, 1)
    angle = torch.arccos(cosine)
    if angle < 1e-4:
        return torch.lerp(a, b, weight)
    return (torch.sin((1 - weight) * angle) * a + torch.sin(weight * angle) * b) / torch.sin(angle)
