"""ODE solvers: pure functions of a field, the noise, and a time grid from 0 (noise) to 1 (data).

A solver reads the field's velocity v, or its clean latent x. Those of x (data prediction) solve

    z_e = (1 - e) / (1 - t) z_t + (1 - e) int x(lambda) e^lambda dlambda,   lambda = log(t / (1 - t))            (1)

with x a polynomial in lambda through what the field said before. Lambda is infinite at both ends, so there (1) is
replaced by its limit. A step from t = 0 has weight on x at its start alone; a polynomial through a point at
lambda = -inf has no slope there, so that point leaves the history. A step to t = 1 has no limit but for a constant x,
so the last is z = x. A constant x makes (1) Euler's step, `z + (e - t) (x - z) / (1 - t)`, at any t. No solver reads
the field at t = 1, where the velocity of a clean latent has no denominator left.

A solver calls `callback(i, t, z, x)` after reading the field at the start of step i; x is the field's clean latent.
"""

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor

from jlt.sampling.field import Prediction
from jlt.sampling.grids import parse

AnyField = Callable[[Tensor, float], Prediction]
Callback = Callable[[int, float, Tensor, Tensor], None]
Noise = Callable[[int], Tensor]
Node = tuple[float, Tensor]  # lambda, and what x was there


def euler(field: AnyField, z: Tensor, grid: Sequence[float], callback: Callback | None = None) -> Tensor:
    """Solve by Euler's method: order 1, one evaluation a step."""
    for i, (t, end) in enumerate(itertools.pairwise(grid)):
        v, x = field(z, t)
        if callback:
            callback(i, t, z, x)
        z = z + (end - t) * v
    return z


def heun(field: AnyField, z: Tensor, grid: Sequence[float], callback: Callback | None = None) -> Tensor:
    """Solve by Heun's method: order 2, two evaluations a step, the last an Euler step as in the authors' code."""
    for i, (t, end) in enumerate(itertools.pairwise(grid)):
        v, x = field(z, t)
        if callback:
            callback(i, t, z, x)
        proposal = z + (end - t) * v
        if i < len(grid) - 2:
            proposal = z + (end - t) * 0.5 * (v + field(proposal, end).v)
        z = proposal
    return z


def midpoint(field: AnyField, z: Tensor, grid: Sequence[float], callback: Callback | None = None) -> Tensor:
    """Solve by the midpoint method: order 2, two evaluations a step."""
    for i, (t, end) in enumerate(itertools.pairwise(grid)):
        v, x = field(z, t)
        if callback:
            callback(i, t, z, x)
        half = (end - t) / 2
        z = z + (end - t) * field(z + half * v, t + half).v
    return z


def rk4(field: AnyField, z: Tensor, grid: Sequence[float], callback: Callback | None = None) -> Tensor:
    """Solve by the classical Runge-Kutta method: order 4, four evaluations a step.

    The last step is one of Ralston's method, with three evaluations before t = 1; its error of order h^4 is made once.
    """
    for i, (t, end) in enumerate(itertools.pairwise(grid)):
        v, x = field(z, t)
        if callback:
            callback(i, t, z, x)
        h = end - t
        if i == len(grid) - 2:
            return ralston(field, z, t, h, v)[0]
        b = field(z + h / 2 * v, t + h / 2).v
        c = field(z + h / 2 * b, t + h / 2).v
        d = field(z + h * c, end).v
        z = z + h / 6 * (v + 2 * b + 2 * c + d)
    return z


def ralston(field: AnyField, z: Tensor, t: float, h: float, v: Tensor) -> tuple[Tensor, Tensor]:
    """Return a step of Ralston's method of order 3 from velocity v, and its difference from the midpoint method's.

    Both are made of the same velocities, at t, t + h/2 and t + 3h/4: an embedded pair without one at t + h.
    """
    b = field(z + h / 2 * v, t + h / 2).v
    c = field(z + 0.75 * h * b, t + 0.75 * h).v
    step = h / 9 * (2 * v + 3 * b + 4 * c)
    return z + step, step - h * b


def ab2(field: AnyField, z: Tensor, grid: Sequence[float], callback: Callback | None = None) -> Tensor:
    """Solve by the two-step Adams-Bashforth method for steps of any length: order 2, one evaluation a step."""
    before: tuple[Tensor, float] | None = None  # velocity and length of the step before
    for i, (t, end) in enumerate(itertools.pairwise(grid)):
        v, x = field(z, t)
        if callback:
            callback(i, t, z, x)
        h = end - t
        z = z + h * (v if before is None else v + h / (2 * before[1]) * (v - before[0]))
        before = v, h
    return z


def dpmpp_2m(field: AnyField, z: Tensor, grid: Sequence[float], callback: Callback | None = None) -> Tensor:
    """Solve by DPM-Solver++(2M), arXiv 2211.01095, algorithm 2: order 2, one evaluation a step, of x."""
    before: Node | None = None
    for i, (t, end) in enumerate(itertools.pairwise(grid)):
        x = field(z, t).x
        if callback:
            callback(i, t, z, x)
        z = constant(z, t, end, ahead(x, t, end, before))
        before = log_ratio(t), x
    return z


def ahead(x: Tensor, t: float, end: float, before: Node | None) -> Tensor:
    """Return the x of algorithm 2: on the line in lambda through the last two, half a step ahead."""
    if before is None or end == 1:
        return x
    # after a step from t = 0 the denominator is infinite, and the line has no slope
    slope = (log_ratio(end) - log_ratio(t)) / (2 * (log_ratio(t) - before[0]))
    return x + slope * (x - before[1])


def dpmpp_3m(field: AnyField, z: Tensor, grid: Sequence[float], callback: Callback | None = None) -> Tensor:
    """Solve by the three-step method of the same family, exact where x is quadratic in lambda; one evaluation a step.

    diffusers' third-order DPM-Solver++ takes half the second derivative (measured in the tests); here it is whole.
    Order 3 in the interior; its first steps, of orders 1 and 2, and grids even in t, leave an error of order h^2.
    """
    nodes: list[Node] = []
    for i, (t, end) in enumerate(itertools.pairwise(grid)):
        x = field(z, t).x
        if callback:
            callback(i, t, z, x)
        nodes = [(log_ratio(t), x), *nodes[:2]]
        z = exponential(z, t, end, nodes)
    return z


def unipc(field: AnyField, z: Tensor, grid: Sequence[float], callback: Callback | None = None) -> Tensor:
    """Solve by UniPC of order 2 (B_2), arXiv 2302.04867: one evaluation a step, of x, order 3 in the interior.

    The predictor is DPM-Solver++(2M); what the field says at its result then corrects the step that led there, by the
    quadratic through three points, or by the mean of both ends in the first step.
    """
    last: tuple[Tensor, float] | None = None  # z and t at the start of the last step
    nodes: list[Node] = []
    for i, (t, end) in enumerate(itertools.pairwise(grid)):
        x = field(z, t).x
        if callback:
            callback(i, t, z, x)
        now = log_ratio(t), x
        if last is not None:
            start, *earlier = nodes
            z = exponential(*last, t, [start, now, *earlier]) if earlier else constant(*last, t, (start[1] + x) / 2)
        last, before = (z, t), nodes[0] if nodes else None
        nodes = [now, *nodes[:1]]
        z = constant(z, t, end, ahead(x, t, end, before))
    return z


def log_ratio(t: float) -> float:
    """Return lambda = log(t / (1 - t)), infinite at both ends."""
    return math.inf if t == 1 else math.log(t / (1 - t)) if t else -math.inf


def constant(z: Tensor, t: float, end: float, x: Tensor) -> Tensor:
    """Return (1) for a constant x."""
    return ((1 - end) * z + (end - t) * x) / (1 - t)


def exponential(z: Tensor, t: float, end: float, nodes: Sequence[Node]) -> Tensor:
    """Return (1), exact for the polynomial in lambda through up to three nodes, the first of them at t.

    With h = lambda_e - lambda_t the integrals of (lambda - lambda_t)^k are, without 1 - e in front, e h - (e - t) /
    (1 - t) for k = 1 and e h^2 - 2 that for k = 2.
    """
    (start, x), *others = [node for node in nodes if node[0] > -math.inf] or nodes[:1]
    z = constant(z, t, end, x)
    if end == 1 or not others:
        return z
    h = log_ratio(end) - log_ratio(t)
    linear = end * h - (end - t) / (1 - t)
    first, value = others[0]
    slope = (x - value) / (start - first)
    if len(others) == 1:
        return z + linear * slope
    second, earlier = others[1]
    curve = (slope - (value - earlier) / (first - second)) / (start - second)
    return z + linear * (slope + (start - first) * curve) + (end * h**2 - 2 * linear) * curve


def sde_dpmpp_2m(
    field: AnyField, z: Tensor, grid: Sequence[float], callback: Callback | None = None, *, noise: Noise
) -> Tensor:
    """Solve the stochastic equation with the same marginals by SDE-DPM-Solver++(2M), arXiv 2211.01095, eq. 18 and on.

    With r = e^-h = (1 - e) t / (e (1 - t)) a step is z_e = r (1 - e) / (1 - t) z + e (1 - r^2) x + (1 - e)
    sqrt(1 - r^2) n, with fresh noise n: all of z is redrawn in the first step, and none of it is left in the last.
    One evaluation a step, of x. `noise(i)` gives step i's, of the shape and scale of z at t = 0.
    """
    before: Node | None = None
    for i, (t, end) in enumerate(itertools.pairwise(grid)):
        x = field(z, t).x
        if callback:
            callback(i, t, z, x)
        r = (1 - end) * t / (end * (1 - t))
        z = r * (1 - end) / (1 - t) * z + end * (1 - r**2) * ahead(x, t, end, before)
        if end < 1:
            z = z + (1 - end) * math.sqrt(1 - r**2) * noise(i).to(z.dtype)
        before = log_ratio(t), x
    return z


def adaptive(
    field: AnyField,
    z: Tensor,
    grid: Sequence[float],
    callback: Callback | None = None,
    *,
    tolerance: float = 1e-4,
) -> Tensor:
    """Solve to a tolerance: each step of the grid by as many steps of Ralston's method (order 3) as it takes.

    A step's error is its difference from the midpoint method's (order 2), as root mean square of the worst image
    relative to 1 + that of z. So images depend on their batch by an error of the size of the tolerance. The next
    length is Hairer, Norsett and Wanner's, "Solving Ordinary Differential Equations I", eq. II.4.13.
    """
    size = grid[1] - grid[0]
    for i, (start, end) in enumerate(itertools.pairwise(grid)):
        t = start
        v, x = field(z, t)
        if callback:
            callback(i, t, z, x)
        while t < end:
            last = t + size >= end * (1 - 1e-12)
            h = end - t if last else size
            proposal, difference = ralston(field, z, t, h, v)
            error = (rms(difference) / (1 + rms(z))).max().item() / tolerance
            if not error < math.inf:
                raise FloatingPointError(f"the field is not finite at t = {t:.6g}")
            if h < 1e-9:
                raise FloatingPointError(f"the tolerance {tolerance:g} needs steps below 1e-9 at t = {t:.6g}")
            growth = min(5.0, max(0.2, 0.9 / max(error, 1e-6) ** (1 / 3)))
            size = h * growth if error > 1 or not last else max(size, h * growth)
            if error > 1:
                continue
            z, t = proposal, end if last else t + h
            if t < end:
                v = field(z, t).v
    return z


def rms(z: Tensor) -> Tensor:
    """Return each image's root mean square."""
    return z.flatten(1).square().mean(1).sqrt()


@dataclass(frozen=True)
class Solver:
    """A row of SOLVERS: how to solve, and what is known of it.

    Attributes:
        solve: the function.
        order: of its error's decrease on a smooth problem, over the whole of [0, 1] in even steps; of a stochastic
            one, of the error of its marginals (its weak order).
        per_step: evaluations of the field in a step; 0 where they depend on the problem.
        saved: evaluations that the last step does without.
        reads: what it reads from the field, "v" or "x".
        multistep: whether a step makes use of those before it.
        stochastic: whether it draws noise.
        value: the tolerance that the bare name means, for one that takes `name=value`.
    """

    solve: Callable[..., Tensor]
    order: int
    per_step: int
    reads: str
    saved: int = 0
    multistep: bool = False
    stochastic: bool = False
    value: float | None = None

    def evaluations(self, steps: int) -> int | None:
        """Return how often `steps` steps evaluate the field, or None where that depends on the problem."""
        return self.per_step * steps - self.saved if self.per_step else None

    def __call__(
        self,
        field: AnyField,
        z: Tensor,
        grid: Sequence[float],
        callback: Callback | None = None,
        noise: Noise | None = None,
    ) -> Tensor:
        """Solve; `noise` is for those that draw it."""
        if not self.stochastic:
            return self.solve(field, z, grid, callback)
        assert noise is not None, "a stochastic solver needs a source of noise"
        return self.solve(field, z, grid, callback, noise=noise)


SOLVERS: dict[str, Solver] = {
    "euler": Solver(euler, 1, 1, "v"),
    "heun": Solver(heun, 2, 2, "v", saved=1),
    "midpoint": Solver(midpoint, 2, 2, "v"),
    "rk4": Solver(rk4, 4, 4, "v", saved=1),
    "ab2": Solver(ab2, 2, 1, "v", multistep=True),
    "dpmpp-2m": Solver(dpmpp_2m, 2, 1, "x", multistep=True),
    "dpmpp-3m": Solver(dpmpp_3m, 2, 1, "x", multistep=True),
    "unipc": Solver(unipc, 2, 1, "x", multistep=True),
    "sde-dpmpp-2m": Solver(sde_dpmpp_2m, 2, 1, "x", multistep=True, stochastic=True),
    "adaptive": Solver(adaptive, 3, 0, "v", value=1e-4),
}


def solver(name: str) -> Solver:
    """Return the solver of that name, or for instance `adaptive=1e-6` with that tolerance."""
    known, value = parse("solver", name, {key: row.value for key, row in SOLVERS.items()})
    row = SOLVERS[known]
    if row.value is None or value == row.value:
        return row
    return dataclasses.replace(row, solve=functools.partial(row.solve, tolerance=value), value=value)
