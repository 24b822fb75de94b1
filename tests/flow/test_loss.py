"""The loss: which space scores the prediction, with and without the floor."""

import math
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

from jlt.flow import TARGETS, WEIGHTS, convert, loss, target, velocity
from jlt.nn import Transformer, authors

NAMES = ["x", "eps", "v", "k=0.5", "k=0..1", "residual=channels:2,0.3"]


def draw(dtype: torch.dtype = torch.float64) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(1)
    x, eps, error = (torch.randn((6, 2, 4, 4), generator=generator, dtype=dtype) for _ in range(3))
    return x, eps, error, torch.tensor([0.07, 0.3, 0.5, 0.6, 0.9, 0.94], dtype=dtype)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("t", [0.0, 0.5, 1.0])
def test_in_its_own_space_the_loss_is_the_plain_error(name: str, t: float) -> None:
    x, eps, error, _ = draw()
    times = torch.full((6,), t, dtype=torch.float64)
    losses = loss(target(name).mix(x, eps, times) + error, x, eps, times, target(name), target(name))
    torch.testing.assert_close(losses, error.square().mean((1, 2, 3)))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("space", NAMES)
def test_away_from_the_floor_a_loss_is_the_error_of_what_its_space_names(name: str, space: str) -> None:
    x, eps, error, t = draw()
    y = target(name).mix(x, eps, t) + error
    z = t.reshape(-1, 1, 1, 1) * x + (1 - t.reshape(-1, 1, 1, 1)) * eps
    read = convert(y, z, t, target(name), target(space))
    expected = (read - target(space).mix(x, eps, t)).square().mean((1, 2, 3))
    torch.testing.assert_close(loss(y, x, eps, t, target(name), target(space)), expected)


@given(st.sampled_from(NAMES), st.floats(0, 1))
def test_the_velocity_loss_compares_floored_velocities(name: str, time: float) -> None:
    x, eps, error, _ = draw()
    t = torch.full((6,), time, dtype=torch.float64)
    y_true = target(name).mix(x, eps, t)
    z = time * x + (1 - time) * eps
    both = [velocity(target(name), y, z, t) for y in (y_true + error, y_true)]
    torch.testing.assert_close(
        loss(y_true + error, x, eps, t, target(name), TARGETS["v"]), (both[0] - both[1]).square().mean((1, 2, 3))
    )


def test_in_the_floored_region_another_space_has_the_unfloored_det_of_its_own() -> None:
    x, eps, error, _ = draw()
    t = torch.full((6,), 0.98, dtype=torch.float64)
    # the velocity of x is error / 0.05 there; eps-space multiplies by |det| = t
    losses = loss(x + error, x, eps, t, TARGETS["x"], TARGETS["eps"])
    torch.testing.assert_close(losses, (error / 0.05 * 0.98).square().mean((1, 2, 3)))


def test_a_weight_multiplies_each_images_loss() -> None:
    x, eps, error, t = draw()
    plain, weighted = (loss(x + error, x, eps, t, TARGETS["x"], TARGETS["x"], w) for w in ("constant", "min-snr-5"))
    torch.testing.assert_close(weighted, plain * ((t / (1 - t)) ** 2).clamp(max=5))
    with pytest.raises(ValueError, match="unknown loss weight 'min-snr'"):
        loss(x, x, eps, t, TARGETS["x"], TARGETS["x"], "min-snr")


def test_a_weight_is_what_its_source_states() -> None:
    t = torch.linspace(0.01, 0.99, 99, dtype=torch.float64)
    ratio, sigma = (t / (1 - t)) ** 2, (1 - t) / t
    stated = {
        "constant": torch.ones_like(t),
        "min-snr-5": torch.minimum(ratio, torch.tensor(5.0, dtype=torch.float64)),
        "soft-min-snr-5": 5 * ratio / (ratio + 5),
        "edm": (sigma**2 + 1) / sigma**2,  # at sigma_data 1
        "sigmoid": math.e**2 / (math.e**2 + ratio),
        "p2": sigma**2 / (sigma**2 + 1),
        "cosmap": 2 / (math.pi * (1 - 2 * t + 2 * t**2)),
    }
    assert stated.keys() == WEIGHTS.keys()
    for name, expected in stated.items():
        torch.testing.assert_close(WEIGHTS[name](t), expected)


def test_cosmap_is_a_density_of_t() -> None:
    middles = (torch.arange(1000, dtype=torch.float64) + 0.5) / 1000
    assert WEIGHTS["cosmap"](middles).mean().item() == pytest.approx(1, abs=1e-6)  # midpoints err by h^2 / 24


@given(st.floats(0.001, 0.999))
def test_the_soft_minimum_lies_below_the_minimum_and_above_its_half(time: float) -> None:
    t = torch.tensor(time, dtype=torch.float64)
    hard, soft = WEIGHTS["min-snr-5"](t).item(), WEIGHTS["soft-min-snr-5"](t).item()
    assert hard / 2 * (1 - 1e-12) <= soft <= hard


@pytest.mark.parametrize("folder", ["jlt_p1", "jlt_p2"])
@pytest.mark.parametrize("name", ["x", "v"])
def test_the_authors_velocity_loss_is_reproduced(golden: Path, folder: str, name: str) -> None:
    vectors = load_file(golden / folder / "vectors.safetensors")
    found = authors.read(golden / folder / "checkpoint-last.pth")
    model = Transformer(found.config(latent_size=8))
    model.load_state_dict(found.model)
    with torch.no_grad():
        y = model(vectors["noisy"], vectors["time"], vectors["label"])
    ours = loss(y, vectors["clean"], vectors["noise"], vectors["time"], target(name), TARGETS["v"]).mean()
    torch.testing.assert_close(ours, vectors[f"loss_v_target_{name}"][0], rtol=1e-5, atol=0)
