"""Classifier-free guidance as a wrapper: what it computes, and what it costs."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from jlt.flow import TARGETS, convert, target
from jlt.flow.targets import channel_residual
from jlt.sampling import SCHEDULES, Field, Guide, classifier_free, guided, heun, time_grid
from jlt.sampling.field import Passes, Prediction, Rescaled

NO_CLASS = 3


def network(z: Tensor, t: Tensor, label: Tensor | None) -> Tensor:
    assert label is not None
    return z * t.reshape(-1, 1) + label.reshape(-1, 1)


def test_guidance_extrapolates_from_no_class_to_the_class() -> None:
    z, label = torch.randn(4, 2), torch.tensor([0, 1, 2, 0])
    predict = classifier_free(Passes(network), NO_CLASS, scale=2.5, interval=(0.0, 1.0))
    plain, uncond = (network(z, torch.full((4,), 0.5), k) for k in (label, torch.full((4,), NO_CLASS)))
    torch.testing.assert_close(predict(z, 0.5, label), uncond + 2.5 * (plain - uncond))


@pytest.mark.parametrize("name", ["x", "eps", "v", "k=0.3", "k=0..1"])
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
    heun(field, torch.zeros(1, 2), time_grid("uniform", 50))
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


@pytest.mark.parametrize("scale", [float("nan"), float("inf"), -float("inf")])
def test_a_scale_that_is_not_finite_is_refused(scale: float) -> None:
    with pytest.raises(ValueError, match=f"the guidance scale must be finite, got {scale}"):
        classifier_free(Passes(network), NO_CLASS, scale)


def other_network(z: Tensor, t: Tensor, label: Tensor | None) -> Tensor:
    assert label is not None
    return 0.5 * z + 0.3 * t.reshape(-1, 1) - 0.1 * label.reshape(-1, 1)


def as_target(kind: str, network: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """A network of clean latents, read as one of another target."""

    def predict(z: Tensor, t: Tensor, label: Tensor | None) -> Tensor:
        x, time = network(z, t, label), t.reshape(-1, 1)
        return target(kind).mix(x, (z - time * x) / (1 - time), time)

    return predict


def read(kind: str, t: float, guidance: str, scale: float = 2.5, guide: Guide | None = None) -> Prediction:
    z = torch.linspace(-1, 2, 12, dtype=torch.float64).reshape(4, 3)
    passes = Passes(as_target(kind, network))
    predict = guided(passes, target(kind), NO_CLASS, scale, (0.0, 1.0), guidance, guide)
    return Field(predict, target(kind), torch.tensor([0, 1, 2, 0]), floor=0.0)(z, t)


@pytest.mark.parametrize("kind", ["eps", "v", "k=0.5", "k=0..1"])
@pytest.mark.parametrize(
    "guidance", ["cfg", "cfg-zero", "apg", "apg:eta=0.3,threshold=0.2", "auto", "cfg:schedule=cosine"]
)
def test_guidance_does_not_depend_on_the_target(kind: str, guidance: str) -> None:
    guides = [Guide(Passes(as_target(k, other_network)), target(k)) for k in ("x", "v")]  # its own, converted
    first, second = guides if guidance == "auto" else (None, None)
    for found, expected in zip(
        read(kind, 0.4, guidance, 2.5, first), read("x", 0.4, guidance, 2.5, second), strict=True
    ):
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("guidance", ["cfg", "cfg-zero", "apg:threshold=0.3"])
def test_guidance_does_not_depend_on_a_target_by_channel_either(guidance: str) -> None:
    z, label, t = torch.randn(4, 3, 2, 2, dtype=torch.float64), torch.tensor([0, 1, 2, 0]), 0.4
    clean = torch.randn(NO_CLASS + 1, 3, 2, 2, dtype=torch.float64)  # what the network takes each class for
    found = []
    for kind in (TARGETS["x"], channel_residual([4.0, 0.5, 0.05])):
        model = lambda z, time, label, kind=kind: kind.mix(clean[label], (z - t * clean[label]) / (1 - t), t)  # noqa: E731
        predict = guided(Passes(model), kind, NO_CLASS, 2.5, (0.0, 1.0), guidance)
        found.append(Field(predict, kind, label, floor=0.0)(z, t).x)
    torch.testing.assert_close(found[0], found[1], rtol=1e-5, atol=1e-5)  # variances are float32's


@pytest.mark.parametrize("kind", ["x", "eps", "v"])
def test_projected_guidance_with_all_of_the_change_is_classifier_free(kind: str) -> None:
    found, expected = read(kind, 0.4, "apg:eta=1,momentum=0"), read(kind, 0.4, "cfg")
    torch.testing.assert_close(found.x, expected.x, rtol=1e-12, atol=1e-12)


def test_projected_guidance_moves_x_across_itself_and_no_further_than_allowed() -> None:
    plain, found = read("x", 0.4, "cfg", 1.0).x, read("x", 0.4, "apg").x
    torch.testing.assert_close(
        ((found - plain) * plain).sum(1), torch.zeros(4, dtype=torch.float64), atol=1e-12, rtol=0
    )
    moved = read("v", 0.4, "apg:eta=1,threshold=0.2").x - plain
    # labels 0, 1, 2, 0 against none (3) differ by 3, 2, 1, 3 in every number, all above the threshold
    torch.testing.assert_close(moved.square().mean(1).sqrt(), torch.full((4,), 1.5 * 0.2, dtype=torch.float64))


def test_momentum_adds_what_the_change_was() -> None:
    z, label = torch.randn(4, 2, dtype=torch.float64), torch.tensor([0, 1, 2, 0])
    predict = guided(Passes(network), TARGETS["x"], NO_CLASS, 2.0, guidance="apg:eta=1,momentum=-0.5")
    first, second = (predict(z, 0.5, label) - network(z, torch.full((4,), 0.5), label) for _ in range(2))
    torch.testing.assert_close(second, 0.5 * first)


def test_the_optimised_scale_is_the_nearest_multiple_of_the_other_velocity() -> None:
    y, other, z = torch.randn(3, 5, 6, dtype=torch.float64)
    v = lambda y: z - y  # noqa: E731 the velocity of x at t = 0
    share = (v(y) * v(other)).sum(1, keepdim=True) / v(other).square().sum(1, keepdim=True)
    expected = z - (share * v(other) + 3 * (v(y) - share * v(other)))
    torch.testing.assert_close(Rescaled(TARGETS["x"])(y, other, z, 0.0, 3.0), expected)
    for step in (-0.01, 0.01):
        assert ((v(y) - share * v(other)).norm(dim=1) < (v(y) - (share + step) * v(other)).norm(dim=1)).all()


@pytest.mark.parametrize("kind", ["x", "eps", "v", "k=0.5", "k=0..1"])
def test_zero_init_stands_still_at_no_cost(kind: str) -> None:
    passes = Passes(as_target(kind, network))
    predict = guided(passes, target(kind), NO_CLASS, 2.0, guidance="cfg-zero:until=0.1")
    field, z, label = Field(predict, target(kind), torch.tensor([0, 1])), torch.randn(2, 3), torch.tensor([0, 1])
    assert field(z, 0.0).v.abs().max() < 1e-5
    assert field(z, 0.09).v.abs().max() < 1e-5
    assert passes.count == 0
    predict(z, 0.1, label)
    assert passes.count == 2


def test_a_guide_is_extrapolated_from_and_costs_a_pass() -> None:
    z, label, t = torch.randn(4, 2), torch.tensor([0, 1, 2, 0]), torch.full((4,), 0.5)
    passes, guide = Passes(network), Guide(Passes(other_network), TARGETS["x"])
    predict = guided(passes, TARGETS["x"], NO_CLASS, 2.0, (0.2, 1.0), "auto", guide)
    expected = 2 * network(z, t, label) - other_network(z, t, label)
    torch.testing.assert_close(predict(z, 0.5, label), expected)
    assert (passes.count, guide.passes.count) == (1, 1)
    predict(z, 0.1, label)
    assert (passes.count, guide.passes.count) == (2, 1)
    alone = guided(passes, TARGETS["x"], 0, 1.0, (0.0, 1.0), "auto", guide)
    assert alone is passes  # to the bit, and at one pass


def test_a_guide_that_says_nothing_at_the_start_is_not_asked() -> None:
    guide = Guide(Passes(other_network), TARGETS["eps"])
    z, label = torch.randn(2, 2), torch.tensor([0, 1])
    y = guided(Passes(network), TARGETS["x"], 0, 2.0, (0.0, 1.0), "auto", guide)(z, 0.0, label)
    assert torch.equal(y, network(z, torch.zeros(2), label))


def test_a_guide_may_predict_a_residual_of_channels() -> None:
    z, y, skip = torch.randn(2, 2, 1, 1), torch.randn(2, 2, 1, 1), channel_residual([4.0, 0.5])
    guide = Guide(Passes(lambda z, t, label: torch.zeros_like(z)), skip)
    predict = guided(Passes(lambda z, t, label: y), TARGETS["x"], 0, 3.0, (0.0, 1.0), "auto", guide)
    for t in (0.0, 0.4):
        other = convert(torch.zeros_like(z), z, t, skip, TARGETS["x"])
        torch.testing.assert_close(predict(z, t, None), other + 3 * (y - other))


@pytest.mark.parametrize("name", SCHEDULES)
def test_a_schedule_keeps_the_mean_scale(name: str) -> None:
    values = [SCHEDULES[name]((i + 0.5) / 1000) for i in range(1000)]
    assert sum(values) / 1000 == pytest.approx(1, abs=1e-6)
    z, label, t = torch.randn(4, 2), torch.tensor([0, 1, 2, 0]), 0.3
    found = guided(Passes(network), TARGETS["x"], NO_CLASS, 3.0, guidance=f"cfg:schedule={name}")(z, t, label)
    expected = guided(Passes(network), TARGETS["x"], NO_CLASS, 1 + 2 * SCHEDULES[name](t))(z, t, label)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("guidance", ["cfg", "cfg-zero", "apg", "cfg:schedule=linear"])
def test_every_rule_at_scale_one_is_the_plain_network(guidance: str) -> None:
    passes = Passes(network)
    assert guided(passes, TARGETS["v"], NO_CLASS, 1.0, guidance=guidance) is passes


@pytest.mark.parametrize(("guidance", "message"), [
    ("cgf", "unknown guidance 'cgf', did you mean 'cfg'"),
    ("apg:etta=1", "unknown option of guidance apg 'etta', did you mean 'eta'"),
    ("apg:eta=much", "eta must be a finite number, got 'much'"),
    ("apg:threshold=-1", "threshold must be at least 0, got '-1'"),
    ("cfg-zero:until=-0.1", "until must be at least 0, got '-0.1'"),
    ("cfg:schedule=liner", "unknown schedule 'liner', did you mean 'linear'"),
    ("auto", "guidance 'auto' needs a guide"),
])  # fmt: skip
def test_unknown_guidance_is_refused(guidance: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        guided(Passes(network), TARGETS["x"], NO_CLASS, 2.0, guidance=guidance)
