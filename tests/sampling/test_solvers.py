"""Solvers on problems with known answers: exact Gaussian flow, orders of convergence, the authors' samples."""

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from jlt.flow import TARGETS, convert, target
from jlt.flow.targets import channel_residual
from jlt.nn import Transformer, authors
from jlt.sampling import SOLVERS, Field, classifier_free, euler, guided, heun, time_grid
from jlt.sampling.field import Passes, Prediction


def gaussian_field(variance: Tensor | float) -> Callable[[Tensor, float], Prediction]:
    """The exact field of x ~ N(0, variance): E[x|z] = t var / (t^2 var + (1-t)^2) z, and v = E[x|z] - E[eps|z]."""

    def field(z: Tensor, t: float) -> Prediction:
        total = t**2 * variance + (1 - t) ** 2
        return Prediction((t * variance - (1 - t)) / total * z, t * variance / total * z)

    return field


@pytest.mark.parametrize(("solver", "order"), [("euler", 1), ("heun", 2)])
@pytest.mark.parametrize("variance", [0.25, 1.0, 4.0])
def test_the_order_of_convergence_on_a_gaussian(solver: str, order: int, variance: float) -> None:
    # The exact flow multiplies by the ratio of standard deviations, from 1 at t = 0 to sqrt(variance) at t = 1.
    z, var = torch.tensor([[1.5]], dtype=torch.float64), torch.tensor(variance, dtype=torch.float64)
    end = z * var.sqrt()
    errors = [
        (SOLVERS[solver](gaussian_field(var), z, time_grid("uniform", n), None) - end).abs().item()
        for n in (64, 128, 256)
    ]
    # Heun's last step is an Euler step, whose error is of order h^2 once: the order stays 2
    observed = [torch.tensor(a / b).log2().item() for a, b in itertools.pairwise(errors)]
    assert observed[-1] == pytest.approx(order, abs=0.15)


def test_a_straight_flow_is_solved_exactly_in_any_number_of_steps() -> None:
    # v is constant along the path to a single point x: every solver must land on it
    point, z = torch.tensor([[2.0, -1.0]], dtype=torch.float64), torch.tensor([[0.3, 0.4]], dtype=torch.float64)
    for solve in SOLVERS.values():
        for steps in (1, 2, 7):
            field = lambda z_t, t: Prediction((point - z_t) / (1 - t), point)  # noqa: E731
            torch.testing.assert_close(
                solve(field, z, time_grid("uniform", steps), None, lambda i: torch.zeros_like(z)), point
            )


@pytest.mark.parametrize(("solver", "evaluations"), [("euler", 50), ("heun", 99)])
def test_evaluations_are_counted(solver: str, evaluations: int) -> None:
    field = Field(lambda z, t, label: z, TARGETS["v"])
    SOLVERS[solver](field, torch.zeros(1, 1), time_grid("uniform", 50), None)
    assert field.evaluations == evaluations


def test_the_callback_sees_every_step_with_its_clean_latent() -> None:
    seen: list[tuple[int, float, float, float]] = []
    var = torch.tensor(4.0, dtype=torch.float64)
    z = torch.ones(1, 1, dtype=torch.float64)
    heun(gaussian_field(var), z, time_grid("uniform", 4), lambda i, t, z, x: seen.append((i, t, z.item(), x.item())))
    assert [(i, t) for i, t, _, _ in seen] == [(0, 0.0), (1, 0.25), (2, 0.5), (3, 0.75)]
    for _, t, z_t, x_t in seen:
        assert x_t == pytest.approx(4 * t / (4 * t**2 + (1 - t) ** 2) * z_t)


@pytest.mark.parametrize(("lam", "name", "deviation"), [
    (1.0, "x", 0.978), (1.0, "eps", 1.026), (1.0, "v", 1.000), (1e-4, "x", 0.021), (1e-4, "v", 0.0045),
])  # fmt: skip
def test_the_floor_moves_a_gaussians_spread_as_the_paper_states(lam: float, name: str, deviation: float) -> None:
    """Heun 50 with the exact denoiser and the floor of 0.05, read from each target."""
    exact = gaussian_field(torch.tensor(lam, dtype=torch.float64))

    def predict(z: Tensor, t: float, label: Tensor | None) -> Tensor:
        v, x = exact(z, t)
        return target(name).mix(x, x - v, t)  # eps = x - v

    end = heun(Field(predict, target(name)), torch.ones(1, 1, dtype=torch.float64), time_grid("uniform", 50))
    assert end.abs().item() == pytest.approx(deviation, abs=0.0006)


@pytest.mark.parametrize("folder", ["jlt_p1", "jlt_p2"])
@pytest.mark.parametrize("name", ["x", "v"])
@pytest.mark.parametrize(
    ("vector", "solver", "steps"), [("euler", euler, 6), ("heun", heun, 6), ("euler25", euler, 25)]
)
def test_the_authors_samples_are_reproduced(
    golden: Path, folder: str, name: str, vector: str, solver: Callable[..., Tensor], steps: int
) -> None:
    vectors = load_file(golden / folder / "vectors.safetensors")
    found = authors.read(golden / folder / "checkpoint-last.pth")
    model = Transformer(found.config(latent_size=8))
    model.load_state_dict(found.model)
    predict = classifier_free(Passes(model), 10, scale=2.9, interval=(0.1, 1.0))
    with torch.no_grad():
        z = solver(
            Field(predict, target(name), vectors["sample_label"]), vectors["sample_noise"], time_grid("uniform", steps)
        )
    expected = vectors[f"sample_{vector}_target_{name}"]
    assert (z - expected).norm() < 1e-5 * expected.norm()  # the vectors' own tolerance


class Dtypes(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.seen: set[torch.dtype] = set()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = function(*args, **(kwargs or {}))
        self.seen |= {leaf.dtype for leaf in tree_leaves(made) if torch.is_tensor(leaf)}
        return made


@pytest.mark.parametrize("name", SOLVERS)
def test_a_solver_keeps_the_latents_dtype_for_devices_that_have_no_other(name: str) -> None:
    z = torch.ones(2, 1, 2, 2)
    with Dtypes() as dtypes:
        SOLVERS[name](gaussian_field(4.0), z, time_grid("uniform", 4), None, lambda i: torch.ones_like(z))
    assert dtypes.seen <= {torch.float32, torch.bool}


def test_a_grid_needs_a_step() -> None:
    with pytest.raises(ValueError, match="steps must be at least 1, got 0"):
        time_grid("uniform", 0)


@pytest.mark.parametrize("name", ["x", "v", "k=0.5", "k=0..1"])
def test_the_field_gives_the_unfloored_clean_latent(name: str) -> None:
    z, y = torch.randn(2, 3, dtype=torch.float64), torch.randn(2, 3, dtype=torch.float64)
    field = Field(lambda z, t, label: y, target(name))
    torch.testing.assert_close(field(z, 0.99).x, convert(y, z, 0.99, target(name), TARGETS["x"]))


@pytest.mark.parametrize("guidance", ["cfg", "cfg-zero:until=0", "apg"])
@pytest.mark.parametrize("name", ["heun", "dpmpp-2m"])
def test_a_network_that_says_0_of_a_residual_samples_gaussian_channels_exactly(name: str, guidance: str) -> None:
    variances = torch.tensor([4.0, 1.0, 0.1])
    network = Passes(lambda z, t, label: torch.zeros_like(z))
    skip, z = channel_residual(variances.tolist()), torch.randn(6, 3, 2, 2)
    predict = guided(network, skip, 2, scale=2.0, guidance=guidance)
    end = SOLVERS[name](Field(predict, skip, torch.zeros(6, dtype=torch.int64)), z, time_grid("uniform", 200))
    # second order: 200 steps err by at most 7e-4, in the channel of variance 0.1, which changes fastest near the data
    torch.testing.assert_close(end, variances.sqrt()[:, None, None] * z, rtol=1e-3, atol=1e-6)
