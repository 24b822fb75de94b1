"""Averages of the weights."""

import pytest
import torch

from jlt.nn import EMA
from jlt.nn.ema import fitting_decay


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


@pytest.mark.parametrize("steps", [100, 1500, 250_000])
def test_a_fitting_decay_forgets_the_start(steps: int) -> None:
    assert fitting_decay(steps) ** steps < 1e-6
