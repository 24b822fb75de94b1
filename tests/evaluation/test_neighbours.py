"""Nearest training latents."""

import numpy as np
import pytest
import torch

from jlt.data import encode, open_latents
from jlt.data.idx import Arrays
from jlt.evaluation.neighbours import nearest


@pytest.fixture(scope="module")
def training(tmp_path_factory):
    images = np.random.default_rng(0).integers(0, 256, (40, 1, 8, 8), dtype=np.uint8)
    source = Arrays("mnist", images, np.arange(40) % 3, ("a", "b", "c"), "test")
    folder = tmp_path_factory.mktemp("latents")
    encode(source, folder / "latents", stride=2, mirrored=True, shard_size=16)
    return open_latents(folder / "latents")


def test_a_training_latent_and_a_mirrored_one_are_found_at_distance_0(training):
    picked = torch.tensor([3, 17, 38])
    for mirrored in (None, torch.ones(3, dtype=torch.bool)):
        found = nearest(training.gather(picked, mirrored), training.labels[picked], training)
        assert torch.equal(found.numbers[:, 0], picked)
        assert torch.equal(found.distances[:, 0], torch.zeros(3))
        assert (found.distances[:, 1] > 0.1).all()


def test_neighbours_are_the_nearest_of_the_class_whatever_the_blocks(training, monkeypatch):
    z = torch.randn(5, *training.shape, generator=torch.Generator().manual_seed(0))
    labels = torch.tensor([0, 1, 2, 1, 0])
    everything = torch.arange(len(training))
    sides = [training.gather(everything), training.gather(everything, torch.ones(len(training), dtype=torch.bool))]
    apart = torch.stack([(z[:, None] - side[None]).square().flatten(2).mean(2).sqrt() for side in sides]).amin(0)
    apart[labels[:, None] != training.labels[None]] = torch.inf
    expected = apart.topk(3, largest=False)
    for size in (512, 4):
        monkeypatch.setattr("jlt.evaluation.neighbours.BLOCK_SIZE", size)
        found = nearest(z, labels, training)
        assert torch.equal(found.numbers, expected.indices)
        torch.testing.assert_close(found.distances, expected.values, rtol=1e-5, atol=0)  # float32 sums


@pytest.mark.parametrize("size", [7, 1000])
def test_without_labels_the_nearest_latent_is_the_one_of_least_distance_of_all(training, size, monkeypatch):
    monkeypatch.setattr("jlt.evaluation.neighbours.BLOCK_SIZE", size)
    everything = torch.arange(len(training))
    z = training.gather([5, 33, 8]) * 0.9 + 0.01
    found = nearest(z, None, training, 1, mirrored=False)
    every = (z[:, None] - training.gather(everything)).square().mean((2, 3, 4)).sqrt()
    torch.testing.assert_close(found.distances[:, 0], every.min(1).values)
    assert torch.equal(found.numbers[:, 0], every.argmin(1))
    assert not found.mirrored.any()
    copy = training.gather([4], torch.tensor([True]))
    assert nearest(copy, None, training, 1, mirrored=False).distances.item() > 0.1
    both = nearest(copy, None, training, 1)
    assert (both.distances.item(), both.numbers.item(), both.mirrored.item()) == (0, 4, True)


def test_a_sample_of_a_class_without_training_images_is_compared_with_all(training):
    z = training.gather([0, 1]) * 0.9
    found, of_all = nearest(z, torch.tensor([7, 7]), training), nearest(z, None, training)
    assert torch.equal(found.numbers, of_all.numbers)
    assert torch.equal(found.distances, of_all.distances)
