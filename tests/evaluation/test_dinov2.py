"""DINOv2, end to end with a folder of random weights in the real one's format."""

import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from jlt import files
from jlt.evaluation import dinov2
from jlt.evaluation.features import metric_name, open_extractor


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    from transformers import Dinov2Config, Dinov2Model
    from transformers.utils import logging

    logging.disable_progress_bar()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Dinov2Model(
            Dinov2Config(hidden_size=24, num_hidden_layers=2, num_attention_heads=2, image_size=56, patch_size=14)
        )
    path = tmp_path_factory.mktemp("dinov2")
    model.save_pretrained(path)
    return path


def pictures(count, height=40, width=56):
    return torch.randint(0, 256, (count, 3, height, width), generator=torch.Generator().manual_seed(0)).byte()


def test_features_are_the_class_token_of_the_published_code_written_out(folder):
    """The first published network, from its tensors alone: pre-norm blocks, layer scale, and the norm at the end.

    At 56 x 56 the position embeddings are the stored ones, so no interpolation enters.
    """
    w, images = (
        {name: value.double() for name, value in load_file(folder / "model.safetensors").items()},
        torch.rand(2, 3, 56, 56),
    )
    patches = images.double().unfold(2, 14, 14).unfold(3, 14, 14).permute(0, 2, 3, 1, 4, 5).reshape(2, 16, -1)
    kernel = w["embeddings.patch_embeddings.projection.weight"].flatten(1)
    tokens = patches @ kernel.T + w["embeddings.patch_embeddings.projection.bias"]
    z = torch.cat([w["embeddings.cls_token"].expand(2, -1, -1), tokens], 1) + w["embeddings.position_embeddings"]

    def linear(x, name):
        return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]

    def norm(x, name):
        x = (x - x.mean(-1, keepdim=True)) / (x.var(-1, keepdim=True, correction=0) + 1e-6).sqrt()
        return x * w[f"{name}.weight"] + w[f"{name}.bias"]

    for k in range(2):
        layer = f"encoder.layer.{k}"
        x = norm(z, f"{layer}.norm1")
        q, key, v = (
            linear(x, f"{layer}.attention.attention.{name}").unflatten(2, (2, 12)).transpose(1, 2)
            for name in ("query", "key", "value")
        )
        mixed = ((q @ key.transpose(2, 3) / 12**0.5).softmax(-1) @ v).transpose(1, 2).flatten(2)
        z = z + linear(mixed, f"{layer}.attention.output.dense") * w[f"{layer}.layer_scale1.lambda1"]
        x = torch.nn.functional.gelu(linear(norm(z, f"{layer}.norm2"), f"{layer}.mlp.fc1"))
        z = z + linear(x, f"{layer}.mlp.fc2") * w[f"{layer}.layer_scale2.lambda1"]
    expected = norm(z, "layernorm")[:, 0]
    found = open_extractor(f"dinov2:{folder}").network(images)
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-5)  # float32


@pytest.mark.parametrize("size", [(40, 56), (224, 224), (256, 256), (300, 280)])
def test_images_are_resized_and_rounded_as_pillow_does(size):
    images = pictures(2, *size)
    images[1] = torch.nn.functional.avg_pool2d(images[1].float(), 9, 1, 4).byte()
    found = dinov2.prepare(images)
    for image, tensor in zip(images, found, strict=True):
        picture = Image.fromarray(image.permute(1, 2, 0).numpy()).resize((224, 224), Image.Resampling.BICUBIC)
        apart = np.abs(np.asarray(picture).astype(int) - tensor.permute(1, 2, 0).numpy())
        assert apart.max() <= 2  # Pillow sums in fixed point, and the second sum weighs the first one's rounding
        assert apart.mean() < 0.05
    assert torch.equal(dinov2.prepare(pictures(1, 224, 224)), pictures(1, 224, 224).float())


def test_grey_images_have_the_features_of_their_rgb_copies_and_rows_do_not_depend_on_the_batch(folder):
    extractor = open_extractor(f"dinov2:{folder}")
    grey = pictures(3)[:, :1]
    together = extractor(grey)
    assert together.shape == (3, extractor.dimension)
    alone = torch.cat([extractor(image[None].repeat(1, 3, 1, 1)) for image in grey])
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-5)  # float32, other blocking of the products
    assert (together[0] - together[1]).abs().max() > 1e-3


def test_the_name_tells_the_hash_of_the_weights_and_the_fingerprint_what_they_do_not_tell(folder, tmp_path):
    extractor = open_extractor(f"dinov2:{folder}")
    sha = files.sha256(folder / "model.safetensors")
    assert metric_name("FD", extractor) == f"FD (DINOv2 {sha[:8]})"
    other = shutil.copytree(folder, tmp_path / "other")
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps({**config, "transformers_version": "4.0.0"}))
    assert open_extractor(f"dinov2:{other}").fingerprint == extractor.fingerprint
    (other / "config.json").write_text(json.dumps({**config, "num_attention_heads": 3}))
    assert open_extractor(f"dinov2:{other}").fingerprint != extractor.fingerprint


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda path: (path / "model.safetensors").unlink(), "names no weights; fetch config.json"),
        (lambda path: (path / "model.safetensors").write_bytes(b"\x80\x04."), "does not hold the weights"),
        (lambda path: (path / "config.json").write_text('{"model_type": "vit"}'), "describes 'vit', a dinov2"),
        (lambda path: (path / "config.json").unlink(), "config.json"),
        (lambda path: drop(path / "model.safetensors", "layernorm.weight"), "lacks 1 tensors"),
    ],
)  # fmt: skip
def test_a_folder_that_holds_no_dinov2_is_one_line(folder, tmp_path, spoil, message):
    other = shutil.copytree(folder, tmp_path / "other")
    spoil(other)
    with pytest.raises((ValueError, OSError), match=message) as error:
        open_extractor(f"dinov2:{other}")
    assert "\n" not in str(error.value)


def drop(path, name):
    save_file({key: value for key, value in load_file(path).items() if key != name}, path, {"format": "pt"})


def test_without_a_folder_one_line_says_what_to_fetch():
    with pytest.raises(ValueError, match="facebook/dinov2-large and name their folder as extractor dinov2:FOLDER"):
        open_extractor("dinov2")
