"""Every solver on problems with known answers: Gaussian and mixture, both ends, marginals, diffusers' schedulers."""

import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from jlt.flow import TARGETS, target
from jlt.flow.geometry import gaussian_flow
from jlt.flow.mixture import Mixture
from jlt.sampling import SOLVERS, Field, time_grid
from jlt.sampling.field import Prediction
from jlt.sampling.grids import GRIDS
from jlt.sampling.solvers import exponential, log_ratio, solver

DETERMINISTIC = [name for name, row in SOLVERS.items() if not row.stochastic and row.per_step]
MEANS, STDS, WEIGHTS = (
    torch.tensor(v, dtype=torch.float64) for v in ((-1.0, 0.3, 1.5), (0.4, 0.3, 0.5), (0.3, 0.3, 0.4))
)
START = torch.linspace(-2, 2, 21, dtype=torch.float64)[:, None]


def gaussian(z: Tensor, t: float, variance: float = 0.3) -> Prediction:
    """The exact field of x ~ N(0, variance)."""
    total = t**2 * variance + (1 - t) ** 2
    return Prediction((t * variance - (1 - t)) / total * z, t * variance / total * z)


def mixture(z: Tensor, t: float) -> Prediction:
    """The exact field of a mixture of Gaussians."""
    x, eps = Mixture(MEANS[:, None], STDS, WEIGHTS).expected(z, t)
    return Prediction(x - eps, x)


def mixture_error(end: Tensor) -> float:
    """In one dimension the flow preserves order, so the mixture's distribution function is the start's: no solver."""
    normal = torch.distributions.Normal(0.0, 1.0)
    found = (WEIGHTS * torch.distributions.Normal(MEANS, STDS).cdf(end)).sum(1, keepdim=True)
    return float((found - normal.cdf(START)).abs().max())


def observed(name: str, field: str, counts: tuple[int, ...]) -> float:
    errors = []
    for n in counts:
        if field == "gaussian":
            end = SOLVERS[name](gaussian, START, time_grid("uniform", n))
            errors.append(float((end - math.sqrt(0.3) * START).abs().max()))
        else:
            errors.append(mixture_error(SOLVERS[name](mixture, START, time_grid("uniform", n))))
    return math.log2(errors[-2] / errors[-1])


@pytest.mark.parametrize("field", ["gaussian", "mixture"])
@pytest.mark.parametrize("name", DETERMINISTIC)
def test_each_solver_has_its_order_on_even_steps(name: str, field: str) -> None:
    # the error of data prediction in even steps is h^2 up to a logarithm: still, no other whole number is as near
    tolerance = 0.45 if SOLVERS[name].reads == "x" else 0.2
    order = observed(name, field, (128, 256))
    # from 0 to 1 on a Gaussian the midpoint method happens to gain an order
    expected = 3 if (name, field) == ("midpoint", "gaussian") else SOLVERS[name].order
    assert order == pytest.approx(expected, abs=tolerance)


def test_the_adaptive_solver_keeps_its_tolerance_and_is_exact_beyond_the_others() -> None:
    errors = [mixture_error(solver(f"adaptive={e}")(mixture, START, [0.0, 1.0])) for e in (1e-3, 1e-5, 1e-7)]
    assert all(error < 10 * e for error, e in zip(errors, (1e-3, 1e-5, 1e-7), strict=True))
    assert errors[0] > errors[1] > errors[2]


@given(st.lists(st.floats(-3, 3), min_size=3, max_size=3))
def test_the_exponential_step_is_exact_for_a_quadratic_in_lambda(coefficients: list[float]) -> None:
    # the integral of x e^lambda by Simpson's rule on 2,000 intervals, error below 1e-12
    a, b, c = coefficients
    x = lambda lam: torch.tensor(a + b * lam + c * lam**2, dtype=torch.float64)  # noqa: E731
    t, end = 0.55, 0.7
    low, high = log_ratio(t), log_ratio(end)
    nodes = [(lam, x(lam)) for lam in (low, log_ratio(0.3), log_ratio(0.2))]
    lam = torch.linspace(low, high, 2001, dtype=torch.float64)
    weight = torch.full((2001,), 2.0, dtype=torch.float64)
    weight[1::2], weight[0], weight[-1] = 4.0, 1.0, 1.0
    integral = ((a + b * lam + c * lam**2) * lam.exp() * weight).sum() * (high - low) / 6000
    expected = (1 - end) / (1 - t) * 0.8 + (1 - end) * integral
    found = exponential(torch.tensor(0.8, dtype=torch.float64), t, end, nodes)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", ["dpmpp-3m", "unipc"])
def test_data_prediction_is_of_order_three_in_the_interior(name: str) -> None:
    # away from t = 0, in steps even in lambda, from the two steps on that dpmpp-3m needs to have three points
    errors = []
    for n in (40, 80, 160):
        grid = torch.sigmoid(torch.linspace(-2, 2, n + 1, dtype=torch.float64)).tolist()
        seen: list[Tensor] = []
        SOLVERS[name](gaussian, START, [*grid, 0.9], lambda i, t, z, x, seen=seen: seen.append(z))  # type: ignore[misc]
        exact = gaussian_flow(seen[2], 0.3, grid[2], grid[-1])
        errors.append(float((seen[-1] - exact).abs().max()))
    assert math.log2(errors[1] / errors[2]) == pytest.approx(3, abs=0.3)


@pytest.mark.parametrize("name", SOLVERS)
@pytest.mark.parametrize("kind", ["x", "eps", "v", "k=0.5", "k=0..1", "k=1..0"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("steps", [1, 2, 5])
def test_both_ends_are_finite_for_every_target(name: str, kind: str, dtype: torch.dtype, steps: int) -> None:
    def predict(z: Tensor, t: float, label: Tensor | None) -> Tensor:
        v, x = gaussian(z, t)
        return target(kind).mix(x, x - v, t)

    z = torch.linspace(-2, 2, 8).reshape(4, 2).to(dtype)
    field = Field(predict, target(kind))
    # bfloat16's eight bits are no tolerance of 1e-4
    solve = solver("adaptive=0.1") if name == "adaptive" else SOLVERS[name]
    end = solve(field, z, time_grid("uniform", steps), None, lambda i: torch.ones_like(z))
    assert end.isfinite().all()
    assert end.dtype == dtype
    assert SOLVERS[name].evaluations(steps) in (None, field.evaluations)


@pytest.mark.parametrize("name", [name for name in SOLVERS if name != "adaptive"])
def test_no_solver_needs_a_floor_for_the_clean_latent(name: str) -> None:
    times: list[float] = []

    def predict(z: Tensor, t: float, label: Tensor | None) -> Tensor:
        times.append(t)
        return gaussian(z, t).x

    end = SOLVERS[name](
        Field(predict, TARGETS["x"], floor=0.0), START, time_grid("uniform", 4), None, lambda i: torch.zeros_like(START)
    )
    assert end.isfinite().all()
    assert max(times) < 1


def stochastic_shares(grid: str, steps: int, variance: float) -> tuple[Tensor, float]:
    """On a Gaussian z is a sum of noises: return the share of each in the end, and the largest error of z's variance.

    An image a noise, each with 1 of its own and 0 of the others, so nothing is left to chance.
    """
    one = torch.eye(steps + 1, dtype=torch.float64)
    seen: list[tuple[float, Tensor]] = []
    end = SOLVERS["sde-dpmpp-2m"](
        lambda z, t: gaussian(z, t, variance), one[0], time_grid(grid, steps),
        lambda i, t, z, x: seen.append((t, z)), lambda i: one[i + 1],
    )  # fmt: skip
    return end, max(abs(float(z.square().sum()) - t**2 * variance - (1 - t) ** 2) for t, z in [*seen, (1.0, end)])


@pytest.mark.parametrize("variance", [0.05, 0.3, 1.0, 4.0])
@pytest.mark.parametrize("grid", ["uniform", "shifted=0.5", "shifted=3", "logit=3", "logit=5", "karras=7"])
def test_the_stochastic_solver_keeps_the_marginals_to_second_order(grid: str, variance: float) -> None:
    counts = (64, 128) if grid.startswith("karras") else (512, 1024)  # the first and last of its steps do not shrink
    errors = [stochastic_shares(grid, steps, variance)[1] for steps in counts]
    # h^2; up to a logarithm where steps are even in t near t = 0, as for the solvers without noise
    even = grid.startswith(("uniform", "shifted"))
    assert math.log2(errors[0] / errors[1]) == pytest.approx(2, abs=0.4 if even else 0.1)
    assert errors[1] < 5e-3 * max(1, variance)


def test_nothing_of_the_start_is_left_by_the_stochastic_solver() -> None:
    assert stochastic_shares("uniform", 20, 0.3)[0][0] == 0


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # diffusers on numpy 2
@pytest.mark.parametrize("name", ["euler", "heun", "dpmpp-2m", "unipc"])
def test_diffusers_schedulers_make_the_same_steps(name: str) -> None:
    import diffusers

    flow = {"use_flow_sigmas": True, "prediction_type": "flow_prediction", "final_sigmas_type": "zero"}
    scheduler = {
        "euler": lambda: diffusers.FlowMatchEulerDiscreteScheduler(),
        "heun": lambda: diffusers.FlowMatchHeunDiscreteScheduler(),
        "dpmpp-2m": lambda: diffusers.DPMSolverMultistepScheduler(algorithm_type="dpmsolver++", flow_shift=2.0, **flow),
        "unipc": lambda: diffusers.UniPCMultistepScheduler(flow_shift=2.0, **flow),
    }[name]()
    scheduler.set_timesteps(20)
    times = [1 - float(sigma) for sigma in scheduler.sigmas]
    z = START
    for t, timestep in zip(times, scheduler.timesteps, strict=False):
        z = scheduler.step(-mixture(z, t).v, timestep, z).prev_sample  # their velocity points to the noise
    grid = [*times[:1], *times[1::2]] if name == "heun" else times  # which lists the start of each inner step twice
    # their sigmas are float32
    torch.testing.assert_close(z, SOLVERS[name](mixture, START, grid), rtol=0, atol=2e-6)


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # diffusers on numpy 2
def test_the_published_third_order_step_takes_half_the_second_derivative() -> None:
    import diffusers

    scheduler = diffusers.DPMSolverMultistepScheduler(
        solver_order=3, use_flow_sigmas=True, prediction_type="flow_prediction", final_sigmas_type="zero"
    )
    scheduler.set_timesteps(20)
    times = [1 - float(sigma) for sigma in scheduler.sigmas]
    z, nodes = START, []
    for (t, end), timestep in zip(itertools.pairwise(times), scheduler.timesteps, strict=True):
        v, x = mixture(z, t)
        nodes = [(log_ratio(t), x), *nodes[:2]]
        found = scheduler.step(-v, timestep, z).prev_sample
        if len(nodes) == 3 and end < 1:
            (a, x0), (b, x1), (c, x2) = nodes
            half = ((x0 - x1) / (a - b) - (x1 - x2) / (b - c)) / (a - c)  # a divided difference is x'' / 2
            h = log_ratio(end) - a
            square = end * h**2 - 2 * (end * h - (end - t) / (1 - t))  # the integral of (lambda - lambda_t)^2
            expected = exponential(z, t, end, nodes) - 0.5 * square * half
            torch.testing.assert_close(found, expected, rtol=0, atol=2e-6)  # their sigmas are float32
        z = found


@pytest.mark.parametrize("family", [*GRIDS, "shifted=1.5", "logit=6", "karras=2"])
@pytest.mark.parametrize("steps", [1, 2, 3, 50])
def test_a_grid_rises_from_zero_to_one(family: str, steps: int) -> None:
    times = time_grid(family, steps)
    assert (times[0], times[-1], len(times)) == (0.0, 1.0, steps + 1)
    assert all(a < b for a, b in itertools.pairwise(times))


def test_grids_are_what_their_formulas_say() -> None:
    assert time_grid("shifted=1", 7) == pytest.approx(time_grid("uniform", 7))
    assert time_grid("logit=0.001", 7) == pytest.approx(time_grid("uniform", 7), abs=1e-6)
    assert time_grid("shifted=3", 2)[1] == pytest.approx(0.25)
    sigma = [(1 - t) / t for t in time_grid("karras=1", 5)[1:-1]]
    assert sigma == pytest.approx([80 + i / 4 * (0.002 - 80) for i in (1, 2, 3, 4)])


@pytest.mark.parametrize(("name", "message"), [
    ("unifrom", "unknown grid 'unifrom', did you mean 'uniform'"),
    ("uniform=2", "grid 'uniform' takes no value, got '2'"),
    ("shifted=-1", "grid 'shifted=-1': the value must be a number above 0, got '-1'"),
    ("logit=nan", "must be a number above 0, got 'nan'"),
    ("karras=0.001", "grid 'karras=0.001' cannot be worked out: .* out of range"),
    ("logit=5e-324", "grid 'logit=5e-324' cannot be worked out: float division by zero"),
    ("logit=1000", "grid 'logit=1000' has steps of no length at 9 steps"),
])  # fmt: skip
def test_an_impossible_grid_is_refused(name: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        time_grid(name, 9)
