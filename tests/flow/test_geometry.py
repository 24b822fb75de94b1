import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from jlt.flow.geometry import (
    conditional_variance,
    gaussian_flow,
    gaussian_velocity,
    noisy_variance,
    optimal_coefficient,
    spectrum_statistics,
    target_spectrum,
)

eigenvalues = st.floats(1e-4, 100)
times = st.floats(0, 1)
inner_times = st.floats(0, 0.999)
coefficients = st.floats(-2, 2)
TARGETS = {"x": (1.0, 0.0), "eps": (0.0, 1.0), "v": (1.0, -1.0), "x - eps / 2": (1.0, -0.5)}


def published_spectrum() -> torch.Tensor:
    """The published extremes, trace and effective rank of FLUX.2's 128 channels; two levels between meet the sums."""
    largest, smallest, trace, effective_rank = 10.50, 10.50 / 50.36, 120.2, 35.10
    high, low = 13, 113
    mean = (trace - largest - smallest) / (high + low)
    square = (trace**2 / effective_rank - largest**2 - smallest**2) / (high + low)
    deviation = math.sqrt(square - mean**2)
    levels = [mean + deviation * math.sqrt(low / high)] * high + [mean - deviation * math.sqrt(high / low)] * low
    return torch.tensor([largest, *levels, smallest], dtype=torch.float64)


def condition(eigenvalue: float, c_x: float, c_eps: float, t: float) -> tuple[float, float]:
    """E[y | z] / z and Var(y | z) by the Schur complement of the explicit joint covariance of (y, z)."""
    mixing = np.array([[c_x, c_eps], [t, 1 - t]])
    joint = mixing @ np.diag([eigenvalue, 1.0]) @ mixing.T
    gain = joint[0, 1] / joint[1, 1]
    return gain, joint[0, 0] - gain * joint[1, 0]


def test_the_published_clean_spectrum_gives_the_published_velocity_spectrum():
    spectrum = published_spectrum()
    clean, velocity = spectrum_statistics(spectrum), spectrum_statistics(target_spectrum(spectrum, 1, -1))
    assert clean.condition_number == pytest.approx(50.36)
    assert clean.effective_rank == pytest.approx(35.10)
    assert velocity.condition_number == pytest.approx(9.52, abs=0.02)  # the paper prints two decimals of rounded input
    assert velocity.effective_rank == pytest.approx(78.97, abs=0.02)
    assert velocity.trace == pytest.approx(clean.trace + 128)


def test_the_noise_target_is_isotropic_whatever_the_latents():
    statistics = spectrum_statistics(target_spectrum(published_spectrum(), 0, 1))
    assert statistics.condition_number == 1
    assert statistics.effective_rank == pytest.approx(128)
    assert statistics.directions_90 == 116  # the least integer that is at least 0.9 * 128


@given(st.lists(eigenvalues, min_size=1, max_size=20), st.floats(0.1, 10))
def test_shape_statistics_are_invariant_to_order_and_scale(values, scale):
    spectrum = torch.tensor(values, dtype=torch.float64)
    one, other = spectrum_statistics(spectrum), spectrum_statistics(scale * spectrum.flip(0))
    assert other.condition_number == pytest.approx(one.condition_number)
    assert other.effective_rank == pytest.approx(one.effective_rank)
    assert other.directions_90 == one.directions_90
    assert other.trace == pytest.approx(scale * one.trace)


@given(st.lists(eigenvalues, min_size=1, max_size=20))
def test_a_unit_floor_never_lowers_the_effective_rank_nor_raises_the_condition(values):
    spectrum = torch.tensor(values, dtype=torch.float64)
    clean, velocity = spectrum_statistics(spectrum), spectrum_statistics(target_spectrum(spectrum, 1, -1))
    assert velocity.effective_rank >= clean.effective_rank - 1e-9  # rounding, where all are equal
    assert velocity.condition_number <= clean.condition_number + 1e-9
    assert clean.effective_rank + 1e-9 >= 1
    assert clean.effective_rank <= len(values) + 1e-9


@pytest.mark.parametrize(
    ("values", "number"), [([1.0] * 10, 9), ([0.1] * 10, 9), ([9.0, 1.0], 1), ([8.9, 1.1], 2), ([1.0], 1)]
)
def test_directions_90_is_the_least_number_of_directions_that_hold_90_percent(values, number):
    assert spectrum_statistics(torch.tensor(values)).directions_90 == number


def test_a_singular_covariance_has_an_infinite_condition_number_and_rounding_counts_as_zero():
    statistics = spectrum_statistics(torch.tensor([1.0, 1.0, -1e-16], dtype=torch.float64))
    assert math.isinf(statistics.condition_number)
    assert statistics.effective_rank == pytest.approx(2)
    assert statistics.smallest == 0


@pytest.mark.parametrize("values", [[], [1.0, -0.1], [float("nan"), 1.0], [0.0, 0.0]])
def test_what_is_no_covariance_is_refused(values):
    with pytest.raises(ValueError, match="eigenvalue"):
        spectrum_statistics(torch.tensor(values, dtype=torch.float64))


@given(eigenvalues, coefficients, coefficients, times)
def test_coefficient_and_ambiguity_agree_with_explicit_gaussian_conditioning(eigenvalue, c_x, c_eps, t):
    gain, variance = condition(eigenvalue, c_x, c_eps, t)
    assert optimal_coefficient(eigenvalue, c_x, c_eps, t).item() == pytest.approx(gain, rel=1e-10, abs=1e-10)
    # The Schur complement subtracts two nearly equal numbers, so the absolute error follows their size, at most 404.
    assert conditional_variance(eigenvalue, c_x, c_eps, t).item() == pytest.approx(variance, rel=1e-10, abs=1e-10)


@given(eigenvalues, inner_times)
def test_velocity_is_more_ambiguous_than_clean_by_one_over_one_minus_t_squared(eigenvalue, t):
    ratio = conditional_variance(eigenvalue, 1, -1, t) / conditional_variance(eigenvalue, 1, 0, t)
    assert ratio.item() == pytest.approx(1 / (1 - t) ** 2, rel=1e-10)


@pytest.mark.parametrize("t", [0.1, 0.5, 0.9])
def test_directions_without_variance_are_damped_by_clean_and_amplified_by_velocity(t):
    vanishing = 1e-14
    assert optimal_coefficient(vanishing, 1, 0, t).item() == pytest.approx(0, abs=1e-10)
    assert optimal_coefficient(vanishing, 1, -1, t).item() == pytest.approx(-1 / (1 - t), rel=1e-10)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("eigenvalue", [0.05, 1.0, 8.0])
def test_coefficient_and_ambiguity_lie_within_five_standard_errors_of_monte_carlo(target, eigenvalue):
    c_x, c_eps = TARGETS[target]
    num_draws, t = 200_000, 0.6
    generator = torch.Generator().manual_seed(0)
    x, eps = torch.randn(2, num_draws, generator=generator, dtype=torch.float64)
    x = x * math.sqrt(eigenvalue)
    z, y = t * x + (1 - t) * eps, c_x * x + c_eps * eps
    slope = (y @ z) / (z @ z)
    residual = (y - slope * z).square().mean()
    ambiguity = conditional_variance(eigenvalue, c_x, c_eps, t)
    slope_error = (ambiguity / (num_draws * noisy_variance(eigenvalue, t))).sqrt()
    residual_error = ambiguity * math.sqrt(2 / num_draws)
    assert abs(slope - optimal_coefficient(eigenvalue, c_x, c_eps, t)) < 5 * slope_error
    assert abs(residual - ambiguity) < 5 * residual_error


@given(eigenvalues, times, times, times)
def test_the_flow_composes_and_runs_back(eigenvalue, t0, t1, t2):
    z = torch.tensor([-1.5, 0.0, 2.0], dtype=torch.float64)
    there = gaussian_flow(z, eigenvalue, t0, t1)
    torch.testing.assert_close(gaussian_flow(there, eigenvalue, t1, t0), z, rtol=1e-12, atol=0)
    onward = gaussian_flow(there, eigenvalue, t1, t2)
    torch.testing.assert_close(onward, gaussian_flow(z, eigenvalue, t0, t2), rtol=1e-12, atol=0)


@given(eigenvalues)
def test_the_flow_from_noise_to_data_scales_by_the_standard_deviation(eigenvalue):
    z = torch.tensor([1.0, -3.0], dtype=torch.float64)
    torch.testing.assert_close(gaussian_flow(z, eigenvalue, 0, 1), math.sqrt(eigenvalue) * z, rtol=1e-12, atol=0)


@given(st.floats(0.01, 10), st.floats(0.01, 0.99))
def test_the_flow_moves_at_the_gaussian_velocity(eigenvalue, t):
    z, step = torch.tensor([1.0, -2.0], dtype=torch.float64), 1e-5
    ahead, behind = (gaussian_flow(z, eigenvalue, t, t + sign * step) for sign in (1, -1))
    velocity = gaussian_velocity(z, eigenvalue, t)
    # A central difference errs by step^2 / 6 times the third derivative, which lambda = 0.01 brings to about 1e6 / 6.
    torch.testing.assert_close((ahead - behind) / (2 * step), velocity, rtol=1e-4, atol=1e-4)


def test_whole_spectra_and_grids_of_times_broadcast():
    spectrum, t = published_spectrum(), torch.linspace(0, 1, 11, dtype=torch.float64)[:, None]
    assert conditional_variance(spectrum, 1, t, t).shape == (11, 128)
    assert gaussian_velocity(torch.zeros(11, 128), spectrum, t).dtype == torch.float64
