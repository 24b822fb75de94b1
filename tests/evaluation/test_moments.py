import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from jlt.evaluation.moments import Moments


def draw(count, seed=0, dimension=4):
    return torch.randn(count, dimension, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * 3 + 100


def of(features):
    result = Moments(features.shape[1])
    result.update(features)
    return result


def assert_equal(a, b, tolerance=1e-12):
    assert a.count == b.count
    torch.testing.assert_close(a.mean, b.mean, rtol=tolerance, atol=0)
    # relative to the largest entry: the small ones are sums that cancel
    torch.testing.assert_close(a.scatter, b.scatter, rtol=0, atol=tolerance * max(1.0, b.scatter.abs().max().item()))


def test_moments_are_those_of_numpy():
    features = draw(50)
    ours = of(features)
    np.testing.assert_allclose(ours.mean, features.numpy().mean(0), rtol=1e-14)
    np.testing.assert_allclose(ours.covariance, np.cov(features.numpy(), rowvar=False), rtol=1e-12, atol=1e-12)


@settings(deadline=None)
@given(st.lists(st.integers(0, 9), min_size=1, max_size=8), st.integers(0, 2**31))
def test_moments_do_not_depend_on_the_split_into_batches(sizes, seed):
    features = draw(sum(sizes), seed)
    split, merged = Moments(4), Moments(4)
    for batch in features.split(sizes):
        split.update(batch)
        merged.merge(of(batch))
    assert_equal(split, of(features))
    assert_equal(merged, of(features))


def test_a_large_mean_does_not_cost_the_covariance_its_digits():
    features, shifted = Moments(4), Moments(4)
    for batch in (draw(600) - 100).round(decimals=6).split(7):
        features.update(batch)
        shifted.update(batch + 2.0**20)
    # a sum of squares would lose 2^40 of 2^53, that is all but four digits
    torch.testing.assert_close(shifted.scatter, features.scatter, rtol=0, atol=1e-9 * features.scatter.max().item())


def test_float32_features_are_summed_in_float64():
    features = draw(1000).float()
    one_by_one = Moments(4)
    for row in features.split(1):
        one_by_one.update(row)
    assert_equal(one_by_one, of(features.double()))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_number_that_is_not_finite_is_refused_and_nothing_is_added(bad):
    result = of(draw(5))
    features = draw(3)
    features[1, 2] = bad
    with pytest.raises(ValueError, match="features of 1 of 3 images are NaN or infinite"):
        result.update(features)
    assert_equal(result, of(draw(5)), 0)


def test_other_dimensions_are_refused_with_both_values():
    with pytest.raises(ValueError, match=r"features are \(3, 5\), expected \(images, 4\)"):
        Moments(4).update(draw(3, dimension=5))
    with pytest.raises(ValueError, match="dimension 5 cannot join those of dimension 4"):
        Moments(4).merge(Moments(5))


def test_one_image_has_no_covariance():
    with pytest.raises(ValueError, match="at least 2 images, got 1"):
        _ = of(draw(1)).covariance
