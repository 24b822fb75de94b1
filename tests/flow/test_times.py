"""Densities of t by their quantile functions."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from jlt.flow import TimeDensity


def test_the_logit_normal_has_its_mean_and_spread() -> None:
    u = (torch.arange(100_000, dtype=torch.float64) + 0.5) / 100_000
    logits = torch.logit(TimeDensity(mean=-0.8, std=0.8).quantile(u))
    assert logits.mean() == pytest.approx(-0.8, abs=1e-9)  # the grid is symmetric
    assert logits.std() == pytest.approx(0.8, abs=1e-3)  # the grid cuts the tails


def test_the_papers_median_time() -> None:
    median = TimeDensity(mean=-0.8, std=0.8).quantile(torch.tensor([0.5], dtype=torch.float64))
    assert median.item() == pytest.approx(1 / (1 + math.exp(0.8)))


@given(st.floats(1e-6, 1 - 1e-6), st.floats(0.1, 10))
def test_a_shift_multiplies_the_ratio_of_noise_to_data(u: float, shift: float) -> None:
    t = TimeDensity("uniform", shift=shift).quantile(torch.tensor([u], dtype=torch.float64)).item()
    assert (1 - t) / t == pytest.approx(shift * (1 - u) / u, rel=1e-9)


@given(st.floats(1e-3, 1 - 1e-3), st.floats(-2, 2), st.floats(0.1, 10))
def test_a_shift_of_a_logit_normal_is_another_mean(u: float, mean: float, shift: float) -> None:
    number = torch.tensor([u], dtype=torch.float64)
    shifted, moved = TimeDensity(mean=mean, shift=shift), TimeDensity(mean=mean - math.log(shift))
    assert shifted.quantile(number).item() == pytest.approx(moved.quantile(number).item(), rel=1e-9)


@given(st.floats(1e-3, 1 - 1e-3), st.floats(0.1, 10))
def test_a_noise_scale_and_a_shift_of_its_value_mix_signal_and_noise_alike(u: float, scale: float) -> None:
    number = torch.tensor([u], dtype=torch.float64)
    plain, shifted = TimeDensity().quantile(number), TimeDensity(shift=scale).quantile(number)
    # t x + (1 - t) scale n against t' x + (1 - t') n, up to a common factor
    assert (scale * (1 - plain) / plain).item() == pytest.approx(((1 - shifted) / shifted).item(), rel=1e-9)


@pytest.mark.parametrize("density", [TimeDensity(), TimeDensity("uniform"), TimeDensity("uniform", shift=3.0)])
def test_quantiles_rise_and_stay_inside(density: TimeDensity) -> None:
    t = density.quantile(torch.linspace(1e-4, 1 - 1e-4, 999, dtype=torch.float64))
    assert (t.diff() > 0).all()
    assert t.min() > 0
    assert t.max() < 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"name": "lognormal"}, "unknown time density 'lognormal', did you mean 'logit-normal'"),
        ({"std": 0.0}, "std must be above 0 and finite, got 0.0"),
        ({"shift": -1.0}, "shift must be above 0 and finite, got -1.0"),
    ],
)
def test_an_impossible_density_is_refused(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TimeDensity(**arguments)  # type: ignore[arg-type]
