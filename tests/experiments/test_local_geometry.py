import math

import numpy as np
import pytest
import torch
from torch import Tensor

from jlt.experiments.local_geometry import gaussian_distance, measure_local_geometry, two_nn


class Stored:
    def __init__(self, latents: Tensor, labels: Tensor) -> None:
        self.latents, self.labels = latents, labels

    def __len__(self) -> int:
        return len(self.latents)

    def gather(self, indices: Tensor) -> Tensor:
        return self.latents[indices]


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("dimension", [1, 2, 5])
def test_two_nn_finds_the_dimension_of_a_flat_sheet_in_a_large_space(dimension):
    sheet = draw(3000, dimension) @ draw(dimension, 20, seed=1)
    estimate, error, count = two_nn(sheet)
    assert count == 3000
    assert abs(estimate - dimension) < 5 * error + 0.02 * dimension  # the density is not constant, as is assumed


def test_two_nn_leaves_out_copies_and_refuses_when_nothing_else_is_there():
    points = draw(500, 3)
    assert two_nn(torch.cat([points, points[:100]]))[2] == 400
    with pytest.raises(ValueError, match="10 points that differ, got 0"):
        two_nn(torch.ones(50, 3))


def test_the_distance_from_gaussian_is_that_of_known_laws_and_small_for_a_gaussian():
    uniform, gauss = (torch.arange(100_000, dtype=torch.float64) + 0.5) / 100_000, draw(100_000)
    distance = gaussian_distance(torch.stack([uniform, gauss], 1))
    # W2^2 between unit variances is 2 - 2 cov(quantiles); of a uniform law sqrt(12) E[U Phi^-1(U)] = sqrt(3/pi)
    assert distance[0].item() == pytest.approx(math.sqrt(2 - 2 * math.sqrt(3 / math.pi)), abs=1e-3)
    assert distance[1] < 0.02


def test_classes_that_differ_in_their_mean_alone_have_the_variance_within_them():
    label = torch.arange(400) % 2
    latents = draw(400, 3, 4, 4) + 3 * label[:, None, None, None]
    record = measure_local_geometry(Stored(latents, label), num_points=800, num_anchors=5)
    everything, inside, _, near, gaussian = record.parts
    # one unit of variance in each of 3 channels, and 9/4 more between classes: 3 / (3 + 3 * 9/4) within
    share = inside.values["variance / that of all tokens"]
    assert share.count == 2
    assert share.value == pytest.approx(4 / 13, rel=0.05)
    assert inside.values["effective rank"].value == pytest.approx(3, abs=0.02)
    assert everything.values["effective rank"].value < 2
    assert near.values["variance / that of all tokens"].value < share.value
    assert gaussian.name == "in a neighbourhood of a Gaussian"


def test_the_close_up_of_a_gaussian_is_that_of_its_own_draws():
    record = measure_local_geometry(Stored(draw(400, 3, 4, 4), torch.zeros(400, dtype=torch.int64)), num_points=2000)
    everything, differing, near, gaussian = record.parts  # one class is no class
    assert differing.values["effective rank"].value == pytest.approx(everything.values["effective rank"].value)
    for name in ("effective rank", "variance / that of all tokens"):
        assert near.values[name].value == pytest.approx(gaussian.values[name].value, rel=0.15)
    assert differing.values["intrinsic dimension (TwoNN)"].value == pytest.approx(3, abs=0.4)
    figure = record.figures["distance from Gaussian"]
    assert np.max(figure.lines["latents"][1]) < 0.1


def test_copies_of_a_token_change_the_whole_set_and_nothing_close_up():
    plain, background = draw(300, 3, 4, 4), torch.full((100, 3, 4, 4), 0.5, dtype=torch.float64)
    label = torch.arange(300) % 2
    copied = Stored(torch.cat([plain, background]), torch.cat([label, label[:100]]))
    with_copies, without = (measure_local_geometry(each) for each in (copied, Stored(plain, label)))
    assert with_copies.values["copies of another token"].value == pytest.approx(100 * 1599 / 6400)
    assert without.values["copies of another token"].value == 0
    named = [{part.name: part for part in record.parts} for record in (with_copies, without)]
    for parts in named:
        assert parts["all tokens"].values["variance / that of all tokens"].value == pytest.approx(1)
    for name in ("tokens that differ", "in a neighbourhood", "in a neighbourhood of a Gaussian"):
        ours, theirs = (parts[name].values["effective rank"] for parts in named)
        assert (ours.value, ours.count) == (pytest.approx(theirs.value, rel=0.05), theirs.count)
    dimension, alone = (parts["tokens that differ"].values["intrinsic dimension (TwoNN)"] for parts in named)
    assert dimension.value == pytest.approx(alone.value, rel=0.05)
    distances = [
        np.mean(record.figures["distance from Gaussian"].lines["latents"][1]) for record in (with_copies, without)
    ]
    assert distances == [pytest.approx(0, abs=0.1)] * 2


def test_a_class_of_copies_has_no_dimension_and_a_thousand_classes_have_enough_points_each():
    blank = torch.zeros(20, 3, 4, 4, dtype=torch.float64)
    copies = Stored(torch.cat([draw(200, 3, 4, 4), blank]), torch.cat([torch.arange(200) % 2, torch.full((20,), 2)]))
    many = Stored(draw(1000, 3, 4, 4), torch.arange(1000))
    for stored, counts in ((copies, (2, 2)), (many, (1000, 1000))):
        inside = measure_local_geometry(stored).parts[1]
        assert inside.name == "in a class"
        names = ("variance / that of all tokens", "intrinsic dimension (TwoNN)")
        assert tuple(inside.values[name].count for name in names) == counts


def test_too_few_tokens_are_refused():
    with pytest.raises(ValueError, match="at least 100 that differ, got 16; --no-local leaves them out"):
        measure_local_geometry(Stored(draw(1, 3, 4, 4), torch.zeros(1, dtype=torch.int64)))


def test_tokens_whose_covariance_does_not_fit_are_refused_before_it_is_tried():
    stored = Stored(torch.zeros(2, 17, 16, 16), torch.zeros(2, dtype=torch.int64))
    with pytest.raises(ValueError, match="may have 4096 numbers, these have 4352"):
        measure_local_geometry(stored, None)
