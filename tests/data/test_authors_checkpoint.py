"""The authors' checkpoint, imported, gives their outputs and samples; and a run may start from it."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import jlt
from jlt.data import Pixels, encode, open_latents
from jlt.data.authors_checkpoint import import_checkpoint
from jlt.data.idx import Arrays
from jlt.nn import EMA, Transformer, checkpoint
from jlt.sampling import SOLVERS, Field, classifier_free, time_grid
from jlt.sampling.field import Passes
from jlt.training import TrainConfig, train
from jlt.training.loop import adopt
from jlt.training.step import make_optimizer

LATENTS = Pixels(16)  # the reference vectors are of latents with 16 channels and no autoencoder


@pytest.mark.parametrize("folder", ["jlt_p1", "jlt_p2"])
def test_an_imported_checkpoint_gives_the_authors_outputs_and_samples(
    golden: Path, tmp_path: Path, folder: str
) -> None:
    out = import_checkpoint(golden / folder / "checkpoint-last.pth", tmp_path / "out", LATENTS, latent_size=8)
    vectors = load_file(golden / folder / "vectors.safetensors")
    for weights, factor in (("model", 1), ("0.9999", 0.99), ("0.9996", 0.98)):
        state = checkpoint.read(out).tensors(checkpoint.read(out).resolve(weights))
        torch.testing.assert_close(
            state["output.weight"], factor * checkpoint.read(out).tensors("model")["output.weight"]
        )
    generator = jlt.load(out, "model")
    y = generator.model(vectors["noisy"], vectors["time"], vectors["label"])
    assert (y - vectors["net_output"]).norm() / y.norm() < 1e-5
    predict = classifier_free(Passes(generator.model), 10, 2.9, (0.1, 1.0))
    field = Field(predict, generator.target, vectors["sample_label"], generator.header["floor"])
    with torch.no_grad():
        z = SOLVERS["heun"](field, vectors["sample_noise"], time_grid("uniform", 6), None)
    expected = vectors["sample_heun_target_x"]
    assert (z - expected).norm() / expected.norm() < 1e-5
    images = generator.sample([3, 10], steps=2).images  # 10 is no class
    assert images.shape == (2, 16, 8, 8)


def test_an_import_that_does_not_fit_leaves_nothing(golden: Path, tmp_path: Path) -> None:
    path, out = golden / "jlt_p1" / "checkpoint-last.pth", tmp_path / "out"
    with pytest.raises(ValueError, match="latents with 16 channels, pixels has 3"):
        import_checkpoint(path, out, Pixels(3))
    with pytest.raises(ValueError, match="knows 10 classes, there are 2 names"):
        import_checkpoint(path, out, LATENTS, class_names=["a", "b"])
    with pytest.raises(ValueError, match="unknown target 'w'"):
        import_checkpoint(path, out, LATENTS, target="w")
    with pytest.raises(ValueError, match="floor must be at least 0 and finite, got -1"):
        import_checkpoint(path, out, LATENTS, floor=-1.0)
    assert not out.exists()
    out.mkdir()
    (out / "notes").write_text("mine")
    with pytest.raises(ValueError, match="is not an empty folder"):
        import_checkpoint(path, out, LATENTS)


@pytest.fixture
def latents(tmp_path: Path) -> Path:
    images = np.random.default_rng(0).integers(0, 256, (40, 16, 8, 8), dtype=np.uint8)
    source = Arrays("mnist", images, np.arange(40) % 3, ("a", "b", "c"), "test")
    encode(source, tmp_path / "latents", representation="pixels", normalise="none")
    return tmp_path / "latents"


def test_a_run_starts_from_a_checkpoint_of_other_classes(golden: Path, tmp_path: Path, latents: Path) -> None:
    base = import_checkpoint(golden / "jlt_p2" / "checkpoint-last.pth", tmp_path / "base", LATENTS, latent_size=8)
    config = TrainConfig(size="3x64x4", patch_size=2, steps=2, batch_size=4, warmup_steps=0, learning_rate=1e-30,
                         ema_decays=(0.9,), dtype="float32", flip=False)  # fmt: skip
    train(config, latents, tmp_path / "run", init=base)
    start, end = checkpoint.read(base).tensors("ema-0.9999"), checkpoint.read(tmp_path / "run").tensors("model")
    for name, tensor in start.items():
        if name != "label.weight":
            torch.testing.assert_close(end[name], tensor)
    assert end["label.weight"].shape == (4, 64)
    torch.testing.assert_close(end["label.weight"][-1], start["label.weight"][-1])  # no class
    assert (
        checkpoint.read(tmp_path / "run").header["init"]
        == checkpoint.read(base).header["files"]["ema-0.9999.safetensors"]
    )
    with pytest.raises(ValueError, match=r"init is .* there and None here"):
        train(dataclasses.replace(config, steps=3), latents, tmp_path / "run")
    train(dataclasses.replace(config, steps=3), latents, tmp_path / "run", init=base)


@pytest.mark.parametrize(("before", "after"), [(0, 3), (3, 0), (3, 2)])
def test_without_a_class_the_prediction_stays_that_of_the_base(before: int, after: int, tmp_path: Path) -> None:
    config = TrainConfig(size="1x32x2", ema_decays=(0.9,))
    base, model = (Transformer(config.model((4, 4, 4), classes), seed) for seed, classes in ((0, before), (1, after)))
    with torch.no_grad():
        for p in base.parameters():
            p.add_(torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel())), alpha=0.1)
    optimizer = make_optimizer(base, config)
    checkpoint.save(tmp_path / "base", base, EMA(base, (0.9,)), optimizer, {"step": 1})
    adopt(model, checkpoint.read(tmp_path / "base"))
    z, t = torch.randn(2, 4, 4, 4, generator=torch.Generator().manual_seed(0)), torch.tensor([0.2, 0.7])
    with torch.no_grad():
        expected, found = (m(z, t, torch.full((2,), classes)) for m, classes in ((base, before), (model, after)))
    torch.testing.assert_close(found, expected)  # to rounding: a sum in another order
    assert expected.abs().max() > 0.01


def test_weights_of_another_representation_are_no_start(tmp_path: Path, latents: Path) -> None:
    source = open_latents(latents)
    config = TrainConfig(size="1x32x4", patch_size=4, steps=1, batch_size=4, warmup_steps=0)
    train(config, latents, tmp_path / "run")
    images = np.random.default_rng(1).integers(0, 256, (20, 16, 8, 8), dtype=np.uint8)
    other = Arrays("mnist", images, np.arange(20) % 2, ("d", "e"), "other")
    encode(other, tmp_path / "scaled", representation="pixels", normalise="global")
    with pytest.raises(ValueError, match=r"trained on latents of normalisation .* encode with --representation of:"):
        train(config, tmp_path / "scaled", tmp_path / "tuned", init=tmp_path / "run")
    assert not (tmp_path / "tuned").exists()
    encode(other, tmp_path / "same", representation=f"of:{tmp_path / 'run'}")
    assert open_latents(tmp_path / "same").manifest.affine == source.manifest.affine
    train(config, tmp_path / "same", tmp_path / "tuned", init=tmp_path / "run")


def test_a_checkpoint_of_another_architecture_is_no_start(golden: Path, tmp_path: Path, latents: Path) -> None:
    base = import_checkpoint(golden / "jlt_p1" / "checkpoint-last.pth", tmp_path / "base", LATENTS, latent_size=8)
    config = TrainConfig(size="3x32x4", steps=2, batch_size=4, dtype="float32", flip=False)
    with pytest.raises(ValueError, match=r"tensor 'embed\.weight' is \[64, 16\] in .*, the model expects \[32, 16\]"):
        train(config, latents, tmp_path / "run", init=base)
