"""Images from seeds: `load`, and what they do not depend on."""

import dataclasses
import re
from pathlib import Path

import numpy as np
import pytest
import torch

import jlt
from jlt.data import Affine, encode
from jlt.data.idx import Arrays
from jlt.data.representations import Pixels
from jlt.flow import random, target
from jlt.flow.random import Stream
from jlt.nn import Transformer, TransformerConfig
from jlt.sampling import SOLVERS, Generator, invert
from jlt.training import TrainConfig, train


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    images = np.random.default_rng(0).integers(0, 256, (40, 3, 8, 8), dtype=np.uint8)
    encode(Arrays("mnist", images, np.arange(40) % 4, ("ant", "bee", "cat", "2"), "test"), folder / "latents", stride=2)
    config = TrainConfig(
        size="2x32x2", steps=30, batch_size=8, learning_rate=1e-2, warmup_steps=3, ema_decays=(0.9, 0.5)
    )
    train(config, folder / "latents", folder / "run")
    return folder / "run"


@pytest.mark.parametrize("batch_size", [1, 3, 100])
def test_an_image_does_not_depend_on_its_batch(run: Path, batch_size: int) -> None:
    generator, labels = jlt.load(run), [0, 1, 2, 3, 4, 0, 1]
    whole = generator.sample(labels, seed=5, steps=4, scale=2.0)
    parts = generator.sample(labels, seed=5, steps=4, scale=2.0, batch_size=batch_size)
    torch.testing.assert_close(parts.latents, whole.latents, rtol=0, atol=1e-4)
    assert (parts.images.int() - whole.images.int()).abs().max() <= 1
    tail = generator.sample(labels[4:], seed=5, steps=4, scale=2.0, first_index=4)
    torch.testing.assert_close(tail.latents, whole.latents[4:], rtol=0, atol=1e-4)
    assert list(tail.seeds) == list(whole.seeds[4:])


def test_the_noise_of_a_stochastic_solver_belongs_to_the_image(run: Path) -> None:
    generator, labels = jlt.load(run), [0, 1, 2, 3, 0]
    whole = generator.sample(labels, seed=5, steps=6, solver="sde-dpmpp-2m", grid="shifted=2")
    parts = generator.sample(labels, seed=5, steps=6, solver="sde-dpmpp-2m", grid="shifted=2", batch_size=2)
    torch.testing.assert_close(parts.latents, whole.latents, rtol=0, atol=1e-4)
    other = generator.sample(labels, seed=6, steps=6, solver="sde-dpmpp-2m", grid="shifted=2")
    assert (other.latents - whole.latents).abs().max() > 0.1


@pytest.mark.parametrize("solver", SOLVERS)
def test_every_solver_makes_images_and_states_what_they_took(run: Path, solver: str) -> None:
    samples = jlt.load(run).sample([0, 1], steps=3, scale=2.0, interval=(0.0, 1.0), solver=solver, grid="logit")
    assert samples.latents.isfinite().all()
    assert samples.evaluations == (SOLVERS[solver].evaluations(3) or samples.evaluations)
    assert samples.network_passes == 2 * samples.evaluations
    assert samples.settings["grid"] == "logit"


def test_a_model_is_guided_by_an_earlier_average_of_itself(run: Path) -> None:
    model, guide = jlt.load(run), jlt.load(run, "0.5")
    samples = model.sample([0, 1], steps=4, solver="euler", scale=2.0, guidance="auto", guide=guide)
    assert (samples.evaluations, samples.network_passes) == (4, 1 + 2 * 3)  # t = 0 is outside the interval
    assert samples.settings["guide"][1] == "ema-0.5"
    plain = model.sample([0, 1], steps=4, solver="euler", scale=1.0, guidance="auto", guide=guide)
    assert plain.network_passes == 4
    assert torch.equal(plain.latents, model.sample([0, 1], steps=4, solver="euler").latents)
    with pytest.raises(ValueError, match=r"the guide has affine .*, the model"):
        model.sample([0], scale=2.0, guidance="auto", guide=dataclasses.replace(guide, affine=Affine((1.0,), (1.0,))))


def test_the_same_seed_gives_the_same_images_and_another_does_not(run: Path) -> None:
    generator = jlt.load(run)
    first, again, other = (generator.sample([0, 1], seed=s, steps=3).latents for s in (1, 1, 2))
    assert torch.equal(first, again)
    assert (first - other).abs().max() > 0.1


def test_the_weights_are_those_that_were_asked_for(run: Path) -> None:
    names = [jlt.load(run, weights).weights for weights in ("ema", "0.9", "0.5", "model")]
    assert names == ["ema-0.9", "ema-0.9", "ema-0.5", "model"]
    samples = [jlt.load(run, weights).sample([0], steps=2).latents for weights in ("ema", "0.5", "model")]
    assert not torch.equal(samples[0], samples[1])
    assert not torch.equal(samples[1], samples[2])


def test_a_checkpoint_alone_can_make_images(run: Path, tmp_path: Path) -> None:
    import shutil

    alone = tmp_path / "alone"
    shutil.copytree(run / "checkpoints" / "step-00000030", alone)
    a, b = (jlt.load(path).sample([2], steps=2) for path in (run, alone))
    assert torch.equal(a.images, b.images)


def test_what_was_spent_is_stated(run: Path) -> None:
    samples = jlt.load(run).sample([0, 1], steps=5, scale=3.0, interval=(0.0, 1.0), solver="heun")
    assert (samples.evaluations, samples.network_passes) == (9, 18)
    assert samples.images.dtype == torch.uint8
    assert samples.images.shape == (2, 3, 8, 8)
    assert samples.seconds > 0
    assert samples.settings["guidance_scale"] == 3.0


def test_classes_go_by_name_or_by_index(run: Path) -> None:
    generator = jlt.load(run)
    assert [generator.label(name) for name in ("bee", "0", "2")] == [1, 0, 3]  # a name goes before an index
    with pytest.raises(ValueError, match="unknown class 'bea', did you mean 'bee'"):
        generator.label("bea")
    with pytest.raises(ValueError, match="label 7 is not below the model's num_classes 4"):
        generator.label("7")


def test_an_unconditional_model_ignores_its_labels() -> None:
    model = Transformer(TransformerConfig(4, 3, 1, 8, 1, 1, num_classes=0))
    torch.nn.init.normal_(model.output.weight, generator=torch.Generator().manual_seed(0))
    affine, header = Affine((0.0,) * 3, (1.0,) * 3), {"name": "unconditional", "step": 0, "floor": 0.05}
    generator = Generator(model, target("x"), Pixels(3), affine, None, header, "model", "0")
    found, expected = (generator.sample(labels, steps=2) for labels in ([0, 1, 9, -1], [0] * 4))
    assert torch.equal(found.latents, expected.latents)
    assert torch.equal(*(invert(generator, expected.latents, labels, steps=2) for labels in ([0, 1, 9, -1], [0] * 4)))


def test_latents_that_are_not_one_of_the_models_for_each_label_are_refused(run: Path) -> None:
    generator = jlt.load(run)
    for shape in ((1, 12, 4, 4), (2, 12, 8, 8), (2, 3, 4, 4)):
        message = re.escape(f"is {shape}, expected (2, 12, 4, 4)")
        with pytest.raises(ValueError, match=f"the shape of noise {message}"):
            generator.sample([0, 1], noise=torch.zeros(shape), steps=1)
        with pytest.raises(ValueError, match=f"the shape of latents {message}"):
            invert(generator, torch.zeros(shape), [0, 1], steps=1)


class Exact(Transformer):
    """Predicts E[x|z] for x ~ N(0, variance) and noise of a scale: what a perfect network would learn."""

    def __init__(self, variance: float, scale: float) -> None:
        super().__init__(TransformerConfig(8, 3, 1, 8, 1, 1, 0))
        self.variance, self.scale = variance, scale

    def forward(self, z: torch.Tensor, t: torch.Tensor, *_: object, **__: object) -> torch.Tensor:
        t = t[:, None, None, None]
        return t * self.variance / (t**2 * self.variance + (1 - t) ** 2 * self.scale**2) * z


@pytest.mark.parametrize("scale", [0.5, 1.0, 2.0])
def test_sampling_starts_from_noise_of_the_trained_scale(scale: float) -> None:
    variance = 0.3
    affine = Affine(shift=(0.0,) * 3, scale=(1.0,) * 3)
    header = {"name": "exact", "step": 0, "floor": 0.0, "noise_scale": scale}
    generator = Generator(Exact(variance, scale), target("x"), Pixels(3), affine, None, header, "model", "0")
    found = generator.sample([0] * 20, seed=1, steps=100, progress=False).latents
    # the exact flow multiplies by the ratio of standard deviations; Heun's error with 100 steps is below a percent
    noise = random.normal(1, Stream.SAMPLE_NOISE, 0, torch.arange(20), (3, 8, 8))
    torch.testing.assert_close(found, variance**0.5 * noise, rtol=0.01, atol=1e-5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"solver": "huen"}, "unknown solver 'huen', did you mean 'heun'"),
        ({"steps": 0}, "steps must be at least 1, got 0"),
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"floor": -0.05}, "floor must be at least 0 and finite, got -0.05"),
        ({"floor": float("nan")}, "floor must be at least 0 and finite, got nan"),
        ({"labels": [5]}, r"labels must be in \[0, 4\], got 5 to 5"),
        ({"scale": 2.0, "interval": (1.0, 0.5)}, "0 <= low < high <= 1"),
    ],
)
def test_an_impossible_wish_is_refused(run: Path, arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        jlt.load(run).sample(**{"labels": [0], **arguments})  # type: ignore[arg-type]
