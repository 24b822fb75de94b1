"""Data to noise and back, and what lies between two noises."""

import math

import pytest
import torch
from torch import Tensor

from jlt.sampling import SOLVERS, slerp, time_grid
from jlt.sampling.field import Prediction
from jlt.sampling.inversion import backwards

DETERMINISTIC = [name for name, row in SOLVERS.items() if not row.stochastic]


def gaussian(z: Tensor, t: float, variance: float = 0.3) -> Prediction:
    total = t**2 * variance + (1 - t) ** 2
    return Prediction((t * variance - (1 - t)) / total * z, t * variance / total * z)


@pytest.mark.parametrize("name", DETERMINISTIC)
def test_every_solver_finds_the_noise_of_gaussian_data(name: str) -> None:
    x = torch.linspace(-1, 1, 9, dtype=torch.float64)[:, None]
    errors, trips = [], []
    for steps in (20, 80):
        times = time_grid("uniform", steps)
        noise = SOLVERS[name](backwards(gaussian), x, times)
        errors.append(float((noise - x / math.sqrt(0.3)).abs().max()))
        trips.append(float((SOLVERS[name](gaussian, noise, times) - x).abs().max()))
    # order 1 leaves a quarter, here with a margin; the adaptive solver keeps its tolerance in both, and an error that
    # happens to be near a change of sign at 20 steps is small already
    for coarse, fine in (errors, trips):
        assert fine < max(coarse / 3, 2e-3)
        assert fine < 0.04


def test_a_field_read_backwards_twice_is_itself() -> None:
    z = torch.linspace(-1, 1, 9, dtype=torch.float64)[:, None]
    for t in (0.0, 0.3, 0.99, 1.0):
        for found, expected in zip(backwards(backwards(gaussian))(z, t), gaussian(z, t), strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)


def test_the_arc_between_two_noises_keeps_their_size_and_ends_in_them() -> None:
    a, b = torch.randn(2, 32, 16, 16, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(slerp(a, b, 0.0), a)
    torch.testing.assert_close(slerp(a, b, 1.0), b)
    torch.testing.assert_close(slerp(a, a, 0.4), a)
    middle = slerp(a, b, 0.5)
    assert middle.std().item() == pytest.approx(1, abs=0.02)  # 8,192 numbers; the straight line's is 0.71
    torch.testing.assert_close((middle - a).norm(), (middle - b).norm(), rtol=1e-2, atol=0)
