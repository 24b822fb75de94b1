"""A run in the formats of other programs gives them the numbers that it gives us."""

import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import jlt
from jlt.data import Pixels, Representation, open_autoencoder
from jlt.data.representations import fit_patch_pca
from jlt.experiments.export import FORMATS, export
from jlt.nn import EMA, Transformer, TransformerConfig, checkpoint


def write(folder: Path, config: TransformerConfig, representation: Representation, target: str = "x") -> Path:
    """Write a checkpoint with random weights everywhere, so that every path through the network counts."""
    model, generator = Transformer(config), torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.05, generator=generator)
    k = config.latent_channels
    affine = {"shift": [0.1 * i for i in range(k)], "scale": [1 + 0.1 * i for i in range(k)]}
    names = [f"class {i}" for i in range(config.num_classes)] or None
    header = {
        "name": "small",
        "target": target,
        "floor": 0.05,
        "noise_scale": 1.5,
        "step": 7,
        "latents": {"affine": affine, "class_names": names},
    }
    checkpoint.save(
        folder, model, EMA(model, [0.5]), None, header, lambda inner: representation.save(inner / "representation")
    )
    return folder


def flux2(folder: Path) -> Representation:
    """Return a small autoencoder of FLUX.2's kind, with 16 channels at 1/4 of the size."""
    from diffusers import AutoencoderKLFlux2

    blocks = {"block_out_channels": (8, 8), "layers_per_block": 1, "norm_num_groups": 4, "latent_channels": 4}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = AutoencoderKLFlux2(
            down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2, **blocks
        )
        network.bn.running_mean.normal_()
        network.bn.running_var.uniform_(0.5, 2)
    network.save_pretrained(folder)
    return open_autoencoder(f"autoencoder:{folder}")


def patch_pca() -> Representation:
    return fit_patch_pca(
        [torch.randint(0, 256, (4, 3, 8, 8), generator=torch.Generator().manual_seed(0)).byte()], 2, 12
    )


@pytest.fixture
def modules(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Give diffusers a cache of its own for the code in a pipeline's folder."""
    from diffusers.utils import dynamic_modules_utils, logging

    monkeypatch.setattr(dynamic_modules_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr(sys, "path", [*sys.path])
    logging.set_verbosity_error()
    logging.disable_progress_bar()


@pytest.mark.parametrize("kind", ["patch-pca", "pixels", "flux2"])
@pytest.mark.usefixtures("modules")
def test_diffusers_loads_the_folder_and_makes_the_images_of_the_same_seeds(tmp_path: Path, kind: str) -> None:
    from diffusers import DiffusionPipeline

    made = {"patch-pca": patch_pca, "pixels": lambda: Pixels(3), "flux2": lambda: flux2(tmp_path / "vae")}
    representation = made[kind]()
    config = TransformerConfig(4, representation.channels, 1, 16, 2, 2, num_classes=3)
    run = write(tmp_path / "run", config, representation)
    out = export(run, tmp_path / "out", "diffusers")
    if kind == "flux2":  # the folder is whole without the autoencoder that it was made with
        (tmp_path / "vae" / "config.json").rename(tmp_path / "elsewhere.json")
    pipeline = DiffusionPipeline.from_pretrained(out, trust_remote_code=True)
    how: dict[str, Any] = {"solver": "dpmpp-2m", "interval": (0.2, 0.9), "batch_size": 2}
    found = pipeline([0, "class 2", 1], num_inference_steps=4, guidance_scale=2.0, seed=5, **how).images
    (latents,) = pipeline([0, 2, 1], 4, 2.0, seed=5, output_type="latent", return_dict=False, **how)
    if kind == "flux2":
        (tmp_path / "elsewhere.json").rename(tmp_path / "vae" / "config.json")
    expected = jlt.load(run).sample([0, 2, 1], steps=4, scale=2.0, seed=5, **how)
    # the same operations on the same numbers, but where they lie in memory changes the order of summation
    torch.testing.assert_close(latents, expected.latents, rtol=0, atol=1e-5)
    assert np.abs(np.stack(found).astype(int) - expected.images.permute(0, 2, 3, 1).numpy()).max() <= 1
    arrays = pipeline(1, 4, 2.0, seed=5, first_index=2, output_type="np", **how).images
    assert np.abs(arrays[0] * 255 - np.asarray(found[2])).max() <= 1  # another batch, rounded otherwise


@pytest.mark.usefixtures("modules")
def test_a_pipeline_folder_runs_no_code_unless_it_is_trusted_and_then_one_import_a_class(tmp_path: Path) -> None:
    from diffusers import DiffusionPipeline

    out = export(
        write(tmp_path / "run", TransformerConfig(4, 3, 2, 8, 1, 1, 0), Pixels(3), "v"), tmp_path / "o", "diffusers"
    )
    with pytest.raises(ValueError, match="trust_remote_code=True"):
        DiffusionPipeline.from_pretrained(out)
    for path in out.rglob("*.py"):
        lines = path.read_text().splitlines()
        assert len(lines) == 1
        assert lines[0].startswith("from jlt.experiments.pipeline import JLT")
    pipeline = DiffusionPipeline.from_pretrained(out, trust_remote_code=True)
    y = pipeline.transformer(torch.ones(1, 3, 4, 4), torch.ones(1)).sample
    expected = jlt.load(out.parent / "run").model(torch.ones(1, 3, 4, 4), torch.ones(1))
    torch.testing.assert_close(y, expected, rtol=0, atol=1e-6)  # where they lie in memory changes the last bits
    assert pipeline.generator().target.name == "v"


CONFIGS = {
    "classes": TransformerConfig(4, 3, 2, 16, 1, 2, num_classes=3),
    "unconditional": TransformerConfig(4, 3, 1, 16, 1, 2, num_classes=0),
    "options": TransformerConfig(
        4, 3, 1, 16, 4, 2, num_classes=3, bottleneck=8, in_context_tokens=2, in_context_start=1, dropout=0.1
    ),
}


@pytest.mark.parametrize(("to", "name"), [
    ("onnx", "classes"), ("torch", "unconditional"),
    *(pytest.param(*rest, marks=pytest.mark.slow) for rest in (
        ("onnx", "options"), ("onnx", "unconditional"), ("torch", "options"), ("torch", "classes"),
    )),
])  # fmt: skip
def test_the_exported_denoiser_agrees_with_ours_at_any_batch_size(tmp_path: Path, to: str, name: str) -> None:
    config = CONFIGS[name]
    run = write(tmp_path / "run", config, Pixels(3))
    out = export(run, tmp_path / "out", to, "0.5")
    model = jlt.load(run, "0.5").model
    for size in (1, 2, 5):
        generator = torch.Generator().manual_seed(size)
        z = torch.randn(size, *config.shape, generator=generator)
        t = torch.rand(size, generator=generator)
        label = torch.arange(size) % (config.num_classes + 1)
        given = (z, t, label)[: 3 if config.num_classes else 2]
        if to == "onnx":
            import onnxruntime

            session = onnxruntime.InferenceSession(out / "denoiser.onnx", providers=["CPUExecutionProvider"])
            names = [entry.name for entry in session.get_inputs()]
            assert names == ["z", "t", "label"][: len(given)]
            y = torch.from_numpy(session.run(["y"], {n: a.numpy() for n, a in zip(names, given, strict=True)})[0])
        else:
            y = torch.export.load(out / "denoiser.pt2").module()(*given)
        torch.testing.assert_close(y, model(*given), rtol=0, atol=1e-5)  # float32, other orders of summation
    stated = json.loads((out / "export.json").read_text())
    assert (stated["weights"], stated["step"], stated["target"]) == ("ema-0.5", 7, "x")
    assert stated["model"] == json.loads(json.dumps(dataclasses.asdict(config)))


@pytest.mark.parametrize(("to", "package"), [("diffusers", "diffusers"), ("onnx", "onnxscript")])
def test_a_format_without_its_package_is_one_line_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, to: str, package: str
) -> None:
    run = write(tmp_path / "run", CONFIGS["classes"], Pixels(3))
    monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.delitem(sys.modules, "jlt.experiments.pipeline", raising=False)
    with pytest.raises(ValueError, match=r"pip install 'jlt\[export\]'"):
        export(run, tmp_path / "out", to)
    assert not (tmp_path / "out").exists()


def test_an_export_has_a_known_format_and_a_folder_of_its_own(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "notes").write_text("mine")
    with pytest.raises(ValueError, match="is not an empty folder"):
        export(tmp_path / "run", tmp_path / "out", "onnx")
    with pytest.raises(ValueError, match=f"the options are {', '.join(FORMATS)}"):
        export(tmp_path / "run", tmp_path / "new", "tflite")
