"""The readout table of the paper, its conversions, limits and floor."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from jlt.flow import TARGETS, Target, convert, geometry, interpolate, target, velocity
from jlt.flow.targets import residual

NAMES = ["x", "eps", "v", "k=0.25", "k=0.9", "residual=0.5"]
inner_times = st.floats(0.01, 0.99)
names = st.sampled_from(NAMES)


def pair(seed: int = 0, shape: tuple[int, ...] = (5, 3, 4, 4)) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x, eps = (torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(2))
    return x, eps


@given(names, names, inner_times, st.integers(0, 9))
def test_any_target_converts_into_any_other(source: str, to: str, t: float, seed: int) -> None:
    x, eps = pair(seed)
    z = interpolate(x, eps, t)
    y = target(source).mix(x, eps, t)
    # det is at least 0.01 here, so float64's rounding grows a hundredfold at most
    torch.testing.assert_close(
        convert(y, z, t, target(source), target(to)), target(to).mix(x, eps, t), rtol=1e-11, atol=1e-11
    )


@given(names, names, inner_times, st.integers(0, 9))
def test_conversion_there_and_back_is_the_identity(source: str, to: str, t: float, seed: int) -> None:
    y, z = pair(seed)
    there = convert(y, z, t, target(source), target(to))
    torch.testing.assert_close(convert(there, z, t, target(to), target(source)), y, rtol=1e-9, atol=1e-9)


@given(names, inner_times)
def test_velocity_is_the_paths_derivative(name: str, t: float) -> None:
    x, eps = pair()
    z = interpolate(x, eps, t)
    v = velocity(target(name), target(name).mix(x, eps, t), z, t, floor=0.0)
    h = 1e-4
    torch.testing.assert_close(
        v, (interpolate(x, eps, t + h) - interpolate(x, eps, t - h)) / (2 * h), rtol=0, atol=1e-9
    )


@pytest.mark.parametrize("t", [0.0, 0.3, 0.95, 1.0])
def test_the_papers_readout_table(t: float) -> None:
    (y, z), one = pair(), 1 - t
    x, eps, v = TARGETS["x"], TARGETS["eps"], TARGETS["v"]
    torch.testing.assert_close(convert(y, z, t, v, x), z + one * y)
    torch.testing.assert_close(velocity(v, y, z, t), y)
    torch.testing.assert_close(velocity(x, y, z, t), (y - z) / max(one, 0.05))
    torch.testing.assert_close(velocity(eps, y, z, t), (z - y) / max(t, 0.05))
    if t > 0:
        torch.testing.assert_close(convert(y, z, t, eps, x), (z - one * y) / t)


def test_converting_a_target_into_itself_is_exact_even_where_det_is_zero() -> None:
    y, z = pair()
    assert convert(y, z, 1.0, TARGETS["x"], TARGETS["x"]) is y
    assert convert(y, z, 0.0, TARGETS["eps"], TARGETS["eps"]) is y


@given(names, st.integers(0, 1000).map(lambda n: n / 1000))
def test_the_floor_bounds_the_velocity_and_only_where_det_is_small(name: str, t: float) -> None:
    y, z = pair()
    det = target(name).det(t)
    assert isinstance(det, float)
    floored, exact = (velocity(target(name), y, z, t, floor=f) for f in (0.05, 0.0))
    assert torch.isfinite(floored).all()
    if abs(det) >= 0.05:
        torch.testing.assert_close(floored, exact, rtol=0, atol=0)
    elif det != 0:
        torch.testing.assert_close(floored, exact * abs(det) / 0.05, rtol=1e-9, atol=1e-12)


def test_the_family_ends_at_x_and_v() -> None:
    assert target("k=0") is TARGETS["x"]
    assert target("k=1") is TARGETS["v"]


def test_one_time_an_image_is_the_same_as_each_alone() -> None:
    x, eps = pair()
    t = torch.linspace(0.1, 0.9, 5, dtype=torch.float64)
    z = interpolate(x, eps, t)
    v = velocity(TARGETS["x"], x, z, t)
    for i in range(5):
        torch.testing.assert_close(z[i], interpolate(x[i], eps[i], float(t[i])))
        torch.testing.assert_close(v[i], velocity(TARGETS["x"], x[i], z[i], float(t[i])))


def test_coefficients_may_depend_on_time_and_channel() -> None:
    x, eps = pair()
    channel = torch.tensor([0.0, 0.5, 1.0], dtype=torch.float64).reshape(3, 1, 1)
    mixed = Target("by channel", lambda t: (1.0, -channel * t))
    t = torch.linspace(0.1, 0.9, 5, dtype=torch.float64)
    y, z = mixed.mix(x, eps, t), interpolate(x, eps, t)
    torch.testing.assert_close(convert(y, z, t, mixed, TARGETS["x"]), x)
    torch.testing.assert_close(convert(x, z, t, TARGETS["x"], mixed), y)
    torch.testing.assert_close(velocity(mixed, y, z, t), x - eps)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("vel", "unknown target 'vel'"),
        ("epsilon", "did you mean 'eps'"),
        ("k=1.5", r"k must be in \[0, 1\], got 1.5"),
        ("k=half", "k must be a number, got 'half'"),
        ("k=nan", r"k must be in \[0, 1\], got nan"),
    ],
)
def test_an_unknown_target_is_refused_with_the_options(name: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        target(name)


@given(st.floats(0.01, 20), inner_times)
def test_the_residual_has_unit_variance_and_a_prediction_of_0_is_the_optimal_linear_denoiser(
    variance: float, t: float
) -> None:
    c_x, c_eps = residual(variance).coefficients(t)
    assert geometry.target_spectrum(variance, c_x, c_eps).item() == pytest.approx(1)
    assert geometry.optimal_coefficient(variance, c_x, c_eps, t).item() == pytest.approx(0, abs=1e-9)
    z, _ = pair()
    read = convert(torch.zeros_like(z), z, t, residual(variance), TARGETS["x"])
    torch.testing.assert_close(read, geometry.optimal_coefficient(variance, 1, 0, t) * z)


def test_a_residual_may_have_a_variance_for_every_channel() -> None:
    (x, eps), variances = pair(), torch.tensor([4.0, 1.0, 0.1], dtype=torch.float64)[:, None, None]
    t = torch.linspace(0.1, 0.9, 5, dtype=torch.float64)
    z, skip = interpolate(x, eps, t), residual(variances)
    torch.testing.assert_close(convert(skip.mix(x, eps, t), z, t, skip, TARGETS["x"]), x, rtol=1e-10, atol=1e-10)
    alone = residual(0.1).mix(x[:, 2], eps[:, 2], t)
    torch.testing.assert_close(skip.mix(x, eps, t)[:, 2], alone)


@pytest.mark.parametrize("name", ["residual=0", "residual=-1", "residual=inf", "residual=nan", "residual=a"])
def test_a_residual_of_no_variance_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match="residual must be"):
        target(name)
