import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from jlt.evaluation.scores import BLOCK_SIZE, InceptionScore, coverage_scores


def draw(count, dimension=5, seed=0, shift=0.0):
    return torch.randn(count, dimension, generator=torch.Generator().manual_seed(seed)) + shift


def by_pairs(generated, real, k):
    """The definitions, written out over all pairs."""
    apart = np.linalg.norm(real.double().numpy()[:, None] - generated.double().numpy()[None], axis=2)
    reach = [
        np.sort(np.linalg.norm(x.double().numpy()[:, None] - x.double().numpy()[None], axis=2), axis=1)[:, k]
        for x in (real, generated)
    ]
    in_real, in_generated = apart <= reach[0][:, None], apart <= reach[1][None]
    return {
        "precision": in_real.any(0).mean(),
        "recall": in_generated.any(1).mean(),
        "density": in_real.sum(0).mean() / k,
        "coverage": in_real.any(1).mean(),
    }


@pytest.mark.parametrize("k", [1, 3])
@pytest.mark.parametrize("shift", [0.0, 0.7, 3.0])
def test_coverage_scores_are_their_definitions_over_all_pairs(k, shift):
    generated, real = draw(90, shift=shift), draw(120, seed=1)
    assert coverage_scores(generated, real, k) == pytest.approx(by_pairs(generated, real, k), abs=1e-12)


def test_coverage_scores_do_not_depend_on_blocks(monkeypatch):
    generated, real = draw(50, shift=0.5), draw(70, seed=1)
    whole = coverage_scores(generated, real)
    monkeypatch.setattr("jlt.evaluation.scores.BLOCK_SIZE", 7)
    assert coverage_scores(generated, real) == pytest.approx(whole, abs=1e-12)
    assert BLOCK_SIZE > 70


def test_a_set_covers_itself_entirely():
    scores = coverage_scores(draw(200), draw(200))
    assert (scores["precision"], scores["recall"], scores["coverage"]) == (1, 1, 1)


def test_sets_far_apart_cover_nothing():
    assert coverage_scores(draw(50, shift=100), draw(50, seed=1)) == dict.fromkeys(
        ("precision", "recall", "density", "coverage"), 0
    )


def test_precision_and_recall_change_places_with_the_sets():
    a, b = draw(80, shift=0.8), draw(100, seed=1)
    there, back = coverage_scores(a, b), coverage_scores(b, a)
    assert (there["precision"], there["recall"]) == (back["recall"], back["precision"])


def test_missing_modes_cost_recall_and_noise_costs_precision():
    real = torch.cat([draw(100, seed=1), draw(100, seed=2, shift=10)])
    half = coverage_scores(draw(200, seed=3), real)
    noisy = coverage_scores(torch.cat([draw(100, seed=4), draw(100, seed=5, shift=10)]) * 3, real)
    assert half["precision"] > 0.8 > 0.55 > half["recall"]
    assert noisy["precision"] < 0.4


def test_too_few_images_are_refused_with_both_counts():
    with pytest.raises(ValueError, match="with 3 neighbours need more images than that a side, got 3 and 9"):
        coverage_scores(draw(3), draw(9))


def score(logits, split, splits=10):
    result = InceptionScore(logits.shape[1], splits)
    result.update(logits, split)
    return result.value()


def test_inception_score_of_certain_and_balanced_images_is_the_number_of_classes():
    labels = torch.arange(200) % 20
    value = score(torch.eye(20)[labels] * 1e4, torch.arange(200) // 20)
    assert value.value == pytest.approx(20, rel=1e-12)
    assert value.spread == pytest.approx(0, abs=1e-12)
    assert value.count == 10


def test_inception_score_of_unsure_or_of_equal_images_is_1():
    split = torch.arange(100) % 10
    assert score(torch.zeros(100, 7), split).value == pytest.approx(1, rel=1e-12)
    assert score(draw(1, 7).expand(100, 7), split).value == pytest.approx(1, rel=1e-12)


def test_inception_score_is_its_definition_and_does_not_depend_on_batches():
    logits = draw(230, 12) * 3
    split = torch.randperm(230, generator=torch.Generator().manual_seed(1)) * 10 // 230
    parts = InceptionScore(12)
    for rows, numbers in zip(logits.split(33), split.split(33), strict=True):
        parts.update(rows, numbers)
    expected = []
    for k in range(10):
        raised = np.exp(logits[split == k].double().numpy())
        p = raised / raised.sum(1, keepdims=True)
        expected.append(math.exp((p * np.log(p / p.mean(0))).sum(1).mean()))
    assert parts.value().value == pytest.approx(np.mean(expected), rel=1e-12)
    assert parts.value().spread == pytest.approx(np.std(expected, ddof=1), rel=1e-9)


def test_inception_score_in_the_order_of_classes_is_far_too_low():
    logits = torch.eye(20)[torch.arange(200) // 10] * 1e4
    assert score(logits, torch.arange(200) // 20).value == pytest.approx(2, rel=1e-12)  # two classes a share


@given(st.integers(10, 60), st.integers(2, 9), st.integers(0, 1000))
def test_inception_score_lies_between_1_and_the_number_of_classes(count, classes, seed):
    value = score(draw(count, classes, seed) * 5, torch.arange(count) % 10).value
    assert 1 - 1e-12 <= value <= classes


def test_a_share_without_an_image_is_refused():
    with pytest.raises(ValueError, match="an Inception Score needs 10 images, got 9"):
        score(torch.zeros(9, 4), torch.arange(9))
