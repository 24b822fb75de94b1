"""Classifier-free guidance as a wrapper: what it computes, and what it costs."""

import pytest
import torch
from torch import Tensor

from jlt.flow import TARGETS, target
from jlt.sampling import Field, classifier_free, heun
from jlt.sampling.field import Passes
from jlt.sampling.grids import uniform_grid

NO_CLASS = 3


def network(z: Tensor, t: Tensor, label: Tensor | None) -> Tensor:
    assert label is not None
    return z * t.reshape(-1, 1) + label.reshape(-1, 1)


def test_guidance_extrapolates_from_no_class_to_the_class() -> None:
    z, label = torch.randn(4, 2), torch.tensor([0, 1, 2, 0])
    predict = classifier_free(Passes(network), NO_CLASS, scale=2.5, interval=(0.0, 1.0))
    plain, uncond = (network(z, torch.full((4,), 0.5), k) for k in (label, torch.full((4,), NO_CLASS)))
    torch.testing.assert_close(predict(z, 0.5, label), uncond + 2.5 * (plain - uncond))


@pytest.mark.parametrize("name", ["x", "eps", "v", "k=0.3"])
def test_guiding_the_prediction_guides_the_velocity(name: str) -> None:
    z, label, t = torch.randn(4, 2), torch.tensor([0, 1, 2, 0]), 0.4
    guided = Field(classifier_free(Passes(network), NO_CLASS, 3.0, (0.0, 1.0)), target(name), label)(z, t)
    single = [Field(Passes(network), target(name), k)(z, t) for k in (label, torch.full((4,), NO_CLASS))]
    for found, conditional, unconditional in zip(guided, *single, strict=True):
        torch.testing.assert_close(found, unconditional + 3 * (conditional - unconditional), rtol=1e-4, atol=1e-4)


def test_scale_one_is_the_plain_network_to_the_bit_at_one_pass() -> None:
    passes = Passes(network)
    assert classifier_free(passes, NO_CLASS, scale=1.0) is passes


@pytest.mark.parametrize(
    ("interval", "t", "passes"),
    [((0.1, 1.0), 0.0, 1), ((0.1, 1.0), 0.1, 1), ((0.1, 1.0), 0.11, 2), ((0.0, 1.0), 0.0, 2), ((0.0, 0.5), 0.5, 1),
     ((0.1, 1.0), 1.0, 1)],
)  # fmt: skip
def test_outside_its_interval_the_second_pass_is_skipped(interval: tuple[float, float], t: float, passes: int) -> None:
    counted = Passes(network)
    z, label = torch.randn(2, 2), torch.tensor([0, 1])
    y = classifier_free(counted, NO_CLASS, 2.0, interval)(z, t, label)
    assert counted.count == passes
    if passes == 1:
        assert torch.equal(y, network(z, torch.full((2,), t), label))


def test_the_papers_sampler_makes_99_evaluations_and_187_passes() -> None:
    # Heun 50 reads the field at i/50 (50 times) and at its step's end (49 times). t <= 0.1 comes 6 + 5 times and is not
    # guided; the other 88 evaluations are two passes each.
    counted = Passes(network)
    field = Field(classifier_free(counted, NO_CLASS, 2.9, (0.1, 1.0)), TARGETS["x"], torch.tensor([0]))
    heun(field, torch.zeros(1, 2), uniform_grid(50))
    assert (field.evaluations, counted.count) == (99, 187)


@pytest.mark.parametrize(
    ("classes", "interval", "message"),
    [
        (3, (0.9, 0.1), r"0 <= low < high <= 1, got \(0\.9, 0\.1\)"),
        (3, (-0.1, 1.0), "0 <= low < high <= 1"),
        (0, (0.0, 1.0), "guidance scale 2.0 needs a class-conditional model, this one has num_classes = 0"),
    ],
)
def test_impossible_guidance_is_refused(classes: int, interval: tuple[float, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        classifier_free(Passes(network), classes, 2.0, interval)
