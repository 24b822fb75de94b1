"""Averages of the weights."""

import contextlib
import copy

import pytest
import torch

from jlt.nn import EMA
from jlt.nn.ema import LONGEST, exponent, overlap, reconstruction, standing_in


def test_an_average_is_its_closed_form() -> None:
    model = torch.nn.Linear(2, 2, bias=False).double()
    start = model.weight.detach().clone()
    ema = EMA(model, [0.9, 0.5])
    history = [start + k for k in range(1, 8)]
    for weights in history:
        with torch.no_grad():
            model.weight.copy_(weights)
        ema.update(model)
    for decay, average in ema.averages.items():
        n = len(history)
        expected = decay**n * start + sum((1 - decay) * decay ** (n - 1 - k) * w for k, w in enumerate(history))
        torch.testing.assert_close(average["weight"].double(), expected, rtol=1e-6, atol=1e-6)  # kept in float32


def test_averages_are_float32_whatever_the_model_is() -> None:
    model = torch.nn.Linear(4, 4).bfloat16()
    ema = EMA(model, [0.9999])
    before = ema.averages[0.9999]["weight"].clone()
    with torch.no_grad():
        model.weight.add_(1)
    ema.update(model)
    moved = ema.averages[0.9999]["weight"] - before
    assert moved.dtype == torch.float32
    # 1e-4 of the step of 1 is far below bfloat16's resolution; the weight itself was rounded by at most 1/256
    torch.testing.assert_close(moved, torch.full_like(moved, 1e-4), rtol=1e-2, atol=0)


@pytest.mark.parametrize("decay", [1.0, -0.1, float("nan")])
def test_a_decay_outside_its_range_is_refused(decay: float) -> None:
    with pytest.raises(ValueError, match=r"must be in \[0, 1\)"):
        EMA(torch.nn.Linear(1, 1), [decay])


@pytest.mark.parametrize("length", [0.01, 0.05, 0.1, 0.2, 0.28])
def test_a_relative_length_is_the_standard_deviation_of_its_profile(length: float) -> None:
    gamma = exponent(length)
    t = (torch.arange(200_000, dtype=torch.float64) + 0.5) / 200_000
    profile = (gamma + 1) * t**gamma / len(t)
    assert profile.sum().item() == pytest.approx(1, rel=1e-6)
    mean = (profile * t).sum()
    assert (profile * (t - mean) ** 2).sum().sqrt().item() == pytest.approx(length, rel=1e-5)  # the quadrature's error


def test_the_lengths_of_edm2_have_its_exponents() -> None:
    assert exponent(0.05) == pytest.approx(16.97, abs=0.005)
    assert exponent(0.10) == pytest.approx(6.94, abs=0.005)
    assert exponent(LONGEST) == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("length", [0.3, 0.0, -0.1, 1e-200, float("nan")])
def test_a_relative_length_outside_its_range_is_refused(length: float) -> None:
    with pytest.raises(ValueError, match=rf"must be in \[1e-09, 0\.2887\], got {length}"):
        exponent(length)


def walk(lengths: list[float], steps: int, every: int = 0) -> tuple[list[torch.Tensor], EMA, list[tuple[int, EMA]]]:
    """Average a random walk; return its weights by step, the averages, and copies of them by step."""
    model = torch.nn.Linear(40, 1, bias=False)
    torch.nn.init.zeros_(model.weight)
    generator, history, snapshots = torch.Generator().manual_seed(0), list[torch.Tensor](), list[tuple[int, EMA]]()
    ema = EMA(model, [], lengths)
    for step in range(steps):
        with torch.no_grad():
            model.weight.add_(torch.randn(1, 40, generator=generator))
        history.append(model.weight.detach().clone())
        ema.update(model, step=step)
        if every and (step + 1) % every == 0:
            snapshots.append((step + 1, copy.deepcopy(ema)))
    return history, ema, snapshots


def test_a_power_average_weighs_each_step_by_its_part_of_the_profile() -> None:
    history, ema, _ = walk([0.1], 30)
    ends = torch.arange(31, dtype=torch.float64) / 30
    shares = (ends ** (exponent(0.1) + 1)).diff()  # the profile's integral over each step; the start has none
    expected = sum(share * weights.double() for share, weights in zip(shares, history, strict=True))
    torch.testing.assert_close(ema.powers[0.1]["weight"].double(), expected, rtol=1e-5, atol=1e-5)  # kept in float32


@pytest.mark.parametrize("a", [(0.0, 3.0), (7.0, 5.0)])
@pytest.mark.parametrize("b", [(2.5, 5.0), (17.0, 2.0)])
def test_the_overlap_of_two_profiles_is_the_integral_of_their_product(
    a: tuple[float, float], b: tuple[float, float]
) -> None:
    t = (torch.arange(400_000, dtype=torch.float64) + 0.5) / 400_000 * min(a[1], b[1])
    first, second = ((gamma + 1) * (t / until) ** gamma / until for gamma, until in (a, b))
    assert overlap(a, b) == pytest.approx((first * second).mean().item() * min(a[1], b[1]), rel=1e-6)


@pytest.mark.parametrize("length", [0.05, 0.06, 0.07, 0.1, 0.14])
def test_an_average_worked_out_from_snapshots_is_the_one_that_was_kept(length: float) -> None:
    steps, kept = 400, [0.05, 0.1]
    _, direct, _ = walk([length], steps)
    history, _, snapshots = walk(kept, steps, every=20)
    sources = [(own, step) for step, _ in snapshots for own in kept]
    factors, left = reconstruction(sources, length, steps)
    rebuilt = torch.zeros(1, 40, dtype=torch.float64)
    for factor, (own, step) in zip(factors, sources, strict=True):
        rebuilt += factor * dict(snapshots)[step].powers[own]["weight"].double()
    moved = (history[-1] - direct.powers[length]["weight"]).norm()
    assert left < (1e-6 if length in kept else 0.01)
    # a walk is as rough as weights get; 0.5 % of the way between the average and the last weights
    assert (rebuilt - direct.powers[length]["weight"]).norm() < 0.005 * moved


def test_weights_stand_in_for_a_models_own_and_leave_them_to_the_bit() -> None:
    model = torch.nn.Linear(3, 2)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    average = {name: torch.randn_like(p) for name, p in before.items()}
    with contextlib.suppress(RuntimeError), standing_in(model, average):
        assert all(torch.equal(p, average[name]) for name, p in model.named_parameters())
        raise RuntimeError
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
