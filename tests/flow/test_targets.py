"""The readout table of the paper, its conversions, limits and floor."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from jlt.flow import TARGETS, Target, convert, geometry, interpolate, target, velocity
from jlt.flow.targets import channel_residual, residual

NAMES = ["x", "eps", "v", "k=0.25", "k=0.9", "k=0..1", "k=1..0", "k=0.7..0.2", "residual=0.5"]
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
    assert target("k=0..0") is TARGETS["x"]
    assert target("k=1..1") is TARGETS["v"]
    assert target("k=0.3..0.3").name == "k=0.3"


@given(st.floats(0, 1), st.floats(0, 1), st.floats(0, 1))
def test_a_k_that_changes_with_t_has_no_det_of_0_before_the_data(start: float, end: float, t: float) -> None:
    mixed = target(f"k={start}..{end}")
    c_x, c_eps = mixed.coefficients(t)
    assert c_x == 1
    assert -c_eps == pytest.approx(start + (end - start) * t)
    # -det = 1 - t + t k >= 1 - t
    assert -mixed.det(t) >= 1 - t
    assert target(f"k={start}..{end}").coefficients(1.0)[1] == -end


def test_k_from_0_to_1_is_x_at_the_noise_and_v_at_the_data_and_needs_no_floor() -> None:
    (x, eps), changing = pair(), target("k=0..1")
    assert torch.equal(changing.mix(x, eps, 0.0), x)
    assert torch.equal(changing.mix(x, eps, 1.0), x - eps)
    t = torch.linspace(0, 1, 1001, dtype=torch.float64)
    torch.testing.assert_close(-changing.det(t), 1 - t + t**2)
    for time in (0.0, 0.5, 1.0):  # |det| >= 3/4: the paper's floor of 0.05 changes nothing
        z = interpolate(x, eps, time)
        y = changing.mix(x, eps, time)
        assert torch.equal(velocity(changing, y, z, time), velocity(changing, y, z, time, floor=0.0))
        torch.testing.assert_close(velocity(changing, y, z, time), x - eps)


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
        ("k=0..1.5", r"k must be in \[0, 1\], got 1.5"),
        ("k=-0.1..1", r"k must be in \[0, 1\], got -0.1"),
        ("k=0..", "k must be a number, got ''"),
        ("k=0..1..0", "k is one number, or two, at t = 0 and at t = 1; got 3"),
        ("residual=channels", "measured when a training begins"),
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


def test_a_residual_of_channels_is_made_again_from_its_name_alone() -> None:
    x, eps = pair()
    variances = [4.0, 1 / 3, 0.1]
    skip = channel_residual(variances)
    assert (skip.name, skip.short) == ("residual=channels:4,0.333333,0.1", "residual=channels")
    t = torch.linspace(0.1, 0.9, 5, dtype=torch.float64)
    y = target(skip.name).mix(x, eps, t)
    assert torch.equal(y, skip.mix(x, eps, t))
    for channel, variance in enumerate(variances):
        alone = residual(variance).mix(x[:, channel], eps[:, channel], t)
        torch.testing.assert_close(y[:, channel], alone, rtol=2e-6, atol=2e-6)  # six digits, kept in float32


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_coefficients_follow_the_latents_dtype(dtype: torch.dtype) -> None:
    x, eps = (side.to(dtype) for side in pair())
    skip = target("residual=channels:4,1,0.1")
    for t in (0.3, torch.linspace(0.1, 0.9, 5, dtype=dtype)):
        y, z = skip.mix(x, eps, t), interpolate(x, eps, t)
        v = velocity(skip, y, z, t)
        assert y.dtype == v.dtype == dtype
        torch.testing.assert_close(v, x - eps, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "name",
    [
        "residual=channels:1,0",
        "residual=channels:",
        "residual=0",
        "residual=-1",
        "residual=inf",
        "residual=nan",
        "residual=a",
    ],
)
def test_a_residual_of_no_variance_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match="residual must be"):
        target(name)
