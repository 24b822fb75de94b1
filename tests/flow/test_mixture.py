"""The exact predictions of a Gaussian mixture against independent computations."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.distributions import Categorical, Independent, MixtureSameFamily, Normal

from jlt.flow.geometry import optimal_coefficient
from jlt.flow.mixture import Mixture

MIXTURE = Mixture(
    means=torch.tensor([[-1.0, 0.5], [0.3, -0.2], [1.5, 1.0]], dtype=torch.float64),
    stds=torch.tensor([0.4, 0.3, 0.5], dtype=torch.float64),
    weights=torch.tensor([0.3, 0.3, 0.4], dtype=torch.float64),
)
Z = torch.randn(50, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
times = st.floats(0.05, 0.95)


@given(times)
def test_the_expected_noise_is_the_score_of_pytorchs_mixture(t: float) -> None:
    """Tweedie: E[eps | z] = -(1 - t) d log p(z) / dz."""
    z = Z.clone().requires_grad_()
    deviation = ((t * MIXTURE.stds) ** 2 + (1 - t) ** 2).sqrt()[:, None].expand(-1, 2)
    parts = Independent(Normal(t * MIXTURE.means, deviation), 1)
    MixtureSameFamily(Categorical(MIXTURE.weights), parts).log_prob(z).sum().backward()
    torch.testing.assert_close(MIXTURE.expected(Z, t)[1], -(1 - t) * z.grad)


@given(st.floats(0, 1))
def test_expected_x_and_noise_lie_on_the_path_through_z(t: float) -> None:
    x, eps = MIXTURE.expected(Z, t)
    torch.testing.assert_close(t * x + (1 - t) * eps, Z)


@given(times, st.floats(0.1, 3))
def test_one_component_is_the_gaussian(t: float, std: float) -> None:
    one = Mixture(torch.zeros(1, 2).double(), torch.tensor([std]).double(), torch.ones(1).double())
    torch.testing.assert_close(one.expected(Z, t)[0], optimal_coefficient(std**2, 1, 0, t) * Z)


def test_a_vector_of_times_is_each_time_for_itself() -> None:
    t = torch.linspace(0, 1, 50, dtype=torch.float64)
    each = torch.cat([MIXTURE.expected(Z[i : i + 1], t[i].item())[0] for i in range(50)])
    torch.testing.assert_close(MIXTURE.expected(Z, t)[0], each)


def test_no_estimate_by_polynomials_beats_the_expected_x_on_draws() -> None:
    """E[x | z] is the least-squares best: what it leaves is uncorrelated with any function of z."""
    generator = torch.Generator().manual_seed(1)
    x = MIXTURE.draw(200_000, generator)
    z = 0.6 * x + 0.4 * torch.randn(x.shape, generator=generator, dtype=x.dtype)
    left = x - MIXTURE.expected(z, 0.6)[0]
    for function in (torch.ones_like(z), z, z**2, z.sin(), z.flip(1)):
        products = left * function
        assert (products.mean(0).abs() < 5 * products.std(0) / 200_000**0.5).all()  # 5 standard errors


def test_draws_have_the_mixtures_mean_and_covariance() -> None:
    x = MIXTURE.draw(100_000, torch.Generator().manual_seed(0))
    mean = MIXTURE.weights @ MIXTURE.means
    between = MIXTURE.means.T @ torch.diag(MIXTURE.weights) @ MIXTURE.means - torch.outer(mean, mean)
    assert x.mean(0).tolist() == pytest.approx(mean.tolist(), abs=5 * 1.2 / 100_000**0.5)  # deviations are below 1.2
    expected = between + (MIXTURE.weights * MIXTURE.stds**2).sum() * torch.eye(2)
    torch.testing.assert_close(x.T.cov(), expected.double(), rtol=0, atol=0.03)  # 5 standard errors
