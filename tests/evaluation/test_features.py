import importlib.util
import logging
import re

import pytest
import torch
import torch.nn.functional as F

from jlt.evaluation import features
from jlt.evaluation.features import ENGINES, EXTRACTORS, Pixels, efficientnet_lite0

PACKAGED = [name for name in EXTRACTORS if name not in features.WITH_FILE]


@pytest.fixture(scope="module")
def extractor():
    return efficientnet_lite0()


@pytest.fixture(scope="module")
def images():
    noise = torch.randint(0, 256, (3, 3, 40, 56), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    noise[1] = F.avg_pool2d(noise[1].float(), 9, 1, 4).byte()
    noise[2, :, :, :28] = 0
    return noise


def test_both_engines_and_the_package_itself_agree(images):
    network = features.load_network()
    resized = F.interpolate(images.float(), (224, 224), mode="bicubic", antialias=True)
    expected = network.extract_features((resized - 127) / 128).mean((2, 3))
    assert expected.std() > 0.1
    for engine in ENGINES:
        # float32 through 50 layers, features up to about 6
        torch.testing.assert_close(efficientnet_lite0(engine)(images), expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize(("photograph", "label"), [("flower.jpg", 985), ("china.jpg", 698)], ids=["daisy", "palace"])
def test_weights_are_those_of_a_classifier_of_imagenet(extractor, photograph, label):
    """The network's own last layer names photographs that it has not seen, among 1,000 classes."""
    from sklearn.datasets import load_sample_image

    image = torch.from_numpy(load_sample_image(photograph).copy()).permute(2, 0, 1)[None]
    logits = features.load_network()._fc(extractor(image))
    assert label in logits.topk(5).indices


def test_grey_images_have_the_features_of_their_rgb_copies(extractor, images):
    grey = images[:, :1]
    torch.testing.assert_close(extractor(grey), extractor(grey.repeat(1, 3, 1, 1)), rtol=0, atol=1e-5)  # float32


@pytest.mark.parametrize("name", PACKAGED)
def test_features_of_an_image_do_not_depend_on_its_batch(name, images):
    extractor = EXTRACTORS[name]()
    together = extractor(images)
    assert together.shape == (3, extractor.dimension)
    assert together.dtype == torch.float32
    alone = torch.cat([extractor(image[None]) for image in images])
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-4)  # float32, other blocking of the products


@pytest.mark.parametrize(("shape", "dtype"), [((2, 3, 8, 8), "float32"), ((2, 2, 8, 8), "uint8"), ((3, 8, 8), "uint8")])
def test_images_that_are_no_uint8_grey_or_rgb_batch_are_refused(shape, dtype):
    with pytest.raises(ValueError, match=re.escape(f"images are {shape} {dtype}, features need (n, 1 or 3, ")):
        features.check_images(torch.zeros(shape, dtype=getattr(torch, dtype)))


@pytest.mark.parametrize("name", PACKAGED)
def test_images_of_two_channels_have_no_features(name):
    with pytest.raises(ValueError, match=r"images are \(2, 2, 8, 8\) uint8"):
        EXTRACTORS[name]()(torch.zeros(2, 2, 8, 8, dtype=torch.uint8))


def test_pixels_of_their_own_size_are_the_pixels():
    image = torch.arange(64, dtype=torch.uint8).reshape(1, 1, 8, 8)
    assert torch.equal(Pixels(8)(image)[0], torch.arange(64) / 255)


def test_fingerprints_tell_extractors_apart_and_engines_not(extractor):
    assert len({Pixels(8).fingerprint, Pixels(4).fingerprint, extractor.fingerprint}) == 3
    assert efficientnet_lite0("torch").fingerprint == extractor.fingerprint


def test_weights_of_another_sum_are_refused_before_they_are_read(monkeypatch):
    monkeypatch.setattr(features, "WEIGHTS_SHA256", "0" * 64)
    monkeypatch.setattr(torch, "load", None)
    with pytest.raises(ValueError, match=r"has SHA-256 57934424\w+, EfficientNet-Lite0's weights have 0000"):
        features.load_network()


def test_without_onnxruntime_one_line_says_that_pytorch_runs(monkeypatch, caplog):
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "onnxruntime" else find_spec(name))
    with caplog.at_level(logging.WARNING):
        efficientnet_lite0()
    assert [record.getMessage() for record in caplog.records] == [
        "EfficientNet-Lite0 runs in PyTorch, several times slower: onnxruntime not installed"
    ]


def test_pytorchs_engine_rounds_no_input_on_a_gpu():
    class Network(torch.nn.Module):
        def extract_features(self, images):
            assert not torch.backends.cudnn.allow_tf32
            return images

    with torch.backends.cudnn.flags(allow_tf32=True):
        assert torch.equal(ENGINES["torch"](Network())(torch.ones(2, 3, 4, 4)), torch.ones(2, 3))


def test_an_unknown_engine_is_refused_with_the_nearest_name():
    with pytest.raises(ValueError, match="did you mean 'onnxruntime'"):
        efficientnet_lite0("onnx-runtime")
