import numpy as np
import pytest
import scipy.linalg
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.datasets import load_digits

from jlt.evaluation.distances import frechet_distance, kernel_distance
from jlt.evaluation.features import Pixels
from jlt.evaluation.moments import Moments


def draw(count, dimension, seed, scale=1.0, shift=0.0):
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(dimension, dimension, generator=generator, dtype=torch.float64) / dimension**0.5
    return torch.randn(count, dimension, generator=generator, dtype=torch.float64) @ mixing * scale + shift


def of(features):
    result = Moments(features.shape[1])
    result.update(features)
    return result


def known(mean, covariance, count=1000):
    """Moments that are given, not measured."""
    result = Moments(len(mean))
    result.count, result.mean, result.scatter = count, mean, covariance * (count - 1)
    return result


def traces(a, b):
    return (a.covariance.trace() + b.covariance.trace()).item()


def test_frechet_distance_of_commuting_gaussians_has_its_closed_form():
    rotation = torch.linalg.qr(draw(6, 6, 0)).Q
    p, q = torch.tensor([9.0, 4, 1, 1, 0.25, 0], dtype=torch.float64), torch.tensor([1.0, 4, 0, 9, 1, 0]).double()
    mean = torch.arange(6).double()
    a = known(mean, rotation @ p.diag() @ rotation.T)
    b = known(mean + 2, rotation @ q.diag() @ rotation.T)
    expected = 6 * 2.0**2 + (p.sqrt() - q.sqrt()).square().sum().item()
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-9)  # null directions cost half of the 16 digits


def test_frechet_distance_at_full_rank_is_that_of_scipys_matrix_square_root():
    a, b = of(draw(400, 40, 0)), of(draw(300, 40, 1, scale=1.5, shift=0.1))
    root = scipy.linalg.sqrtm(a.covariance.numpy() @ b.covariance.numpy())
    expected = (a.mean - b.mean).square().sum().item() + traces(a, b) - 2 * np.trace(root).real
    assert frechet_distance(a, b) == pytest.approx(float(expected), rel=1e-6)


@pytest.mark.parametrize(("n", "m"), [(20, 30), (2, 90), (2, 2), (300, 20), (61, 60)])
def test_frechet_distance_of_singular_covariances_is_that_of_the_data_matrices(n, m):
    x, y = draw(n, 60, 0), draw(m, 60, 1, shift=0.3)
    a, b = of(x), of(y)
    centred_x, centred_y = (x - x.mean(0)) / (n - 1) ** 0.5, (y - y.mean(0)) / (m - 1) ** 0.5
    nuclear = torch.linalg.matrix_norm(centred_x @ centred_y.T, "nuc").item()  # tr sqrt(S_x S_y)
    expected = (x.mean(0) - y.mean(0)).square().sum().item() + traces(a, b) - 2 * nuclear
    assert abs(frechet_distance(a, b) - expected) <= 1e-6 * traces(a, b)


def test_constant_and_repeated_features_do_no_harm():
    x, y = draw(200, 10, 0), draw(200, 10, 1)
    x[:, 3] = y[:, 3] = 7.0
    x[:, 4], y[:, 4] = x[:, 5], y[:, 5]
    x[:, 6] = -1.0  # constant on one side only
    xc, yc = x - x.mean(0), y - y.mean(0)
    nuclear = torch.linalg.matrix_norm(xc @ yc.T, "nuc").item() / 199
    expected = (x.mean(0) - y.mean(0)).square().sum().item() + traces(of(x), of(y)) - 2 * nuclear
    assert abs(frechet_distance(of(x), of(y)) - expected) <= 1e-6 * traces(of(x), of(y))


@settings(deadline=None, max_examples=40)
@given(st.integers(2, 40), st.integers(2, 40), st.integers(1, 20), st.floats(0, 1e4), st.integers(0, 10**6))
def test_frechet_distance_is_symmetric_real_and_never_negative(n, m, dimension, scale, seed):
    a, b = of(draw(n, dimension, seed)), of(draw(m, dimension, seed + 1, scale=scale))
    there, back = frechet_distance(a, b), frechet_distance(b, a)
    assert np.isfinite(there)
    assert there >= 0
    assert there == pytest.approx(back, abs=1e-6 * traces(a, b), rel=1e-9)


@pytest.mark.parametrize("count", [2, 20, 500])
def test_equal_sets_are_at_distance_zero(count):
    x = draw(count, 60, 0, shift=50)
    assert frechet_distance(of(x), of(x)) <= 1e-12 * traces(of(x), of(x))  # rounding


def test_frechet_distance_does_not_see_translations_and_rotations():
    x, y = draw(100, 20, 0), draw(120, 20, 1, scale=1.3)
    rotation = torch.linalg.qr(draw(20, 20, 2)).Q
    expected = frechet_distance(of(x), of(y))
    assert frechet_distance(of(x @ rotation + 10), of(y @ rotation + 10)) == pytest.approx(expected, rel=1e-9)


def test_frechet_distance_scales_with_the_square_of_the_features():
    x, y = draw(100, 20, 0), draw(120, 20, 1, scale=1.3)
    assert frechet_distance(of(x * 3), of(y * 3)) == pytest.approx(9 * frechet_distance(of(x), of(y)), rel=1e-9)


def test_kernel_distance_is_the_mean_over_pairs_written_out():
    x, y = draw(7, 5, 0), draw(6, 5, 1, shift=0.5)

    def kernel(u, v):
        return (float(u @ v) / 5 + 1) ** 3

    within_x = np.mean([kernel(u, v) for i, u in enumerate(x) for j, v in enumerate(x) if i != j])
    within_y = np.mean([kernel(u, v) for i, u in enumerate(y) for j, v in enumerate(y) if i != j])
    across = np.mean([kernel(u, v) for u in x for v in y])
    assert kernel_distance(x, y) == pytest.approx(within_x + within_y - 2 * across, rel=1e-12)


def test_kernel_distance_does_not_depend_on_its_blocks(monkeypatch):
    x, y = draw(50, 5, 0), draw(33, 5, 1)
    expected = kernel_distance(x, y)
    monkeypatch.setattr("jlt.evaluation.distances.BLOCK_SIZE", 7)
    assert kernel_distance(x, y) == pytest.approx(expected, rel=1e-10)


def test_kernel_distance_of_equal_distributions_is_zero_on_average():
    distances = [
        kernel_distance(*torch.randn(2, 12, 6, generator=torch.Generator().manual_seed(i))) for i in range(400)
    ]
    standard_error = np.std(distances, ddof=1) / len(distances) ** 0.5
    assert abs(np.mean(distances)) < 4 * standard_error
    assert min(distances) < 0  # unbiased, so some are negative
    # the biased estimate keeps each image's kernel with itself and would be far off
    biased = 2 * ((1 + 1) ** 3 - 1) / 12
    assert biased > 20 * standard_error


def test_kernel_distance_of_shifted_gaussians_has_its_closed_form():
    """With d = 1, x ~ N(0, 1), y ~ N(m, 1), the cubic kernel compares the moments of order 1, 2 and 3."""
    m = 1.0
    moments_x, moments_y = np.array([0, 1, 0]), np.array([m, 1 + m**2, 3 * m + m**3])
    expected = float(np.array([3, 3, 1]) @ (moments_x - moments_y) ** 2)  # binomial coefficients of the cube
    generator = torch.Generator().manual_seed(0)
    found = []
    for _ in range(50):
        x, y = torch.randn(2, 400, 1, generator=generator, dtype=torch.float64)
        found.append(kernel_distance(x, y + m))
    assert abs(np.mean(found) - expected) < 4 * np.std(found, ddof=1) / len(found) ** 0.5


@pytest.fixture(scope="module")
def digits():
    data = load_digits()
    images = torch.from_numpy((data.images * (255 / 16)).round().astype("uint8"))[:, None]
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    return images[order], torch.from_numpy(data.target)[order]


def both_distances(a, b):
    x, y = Pixels(8)(a), Pixels(8)(b)
    return frechet_distance(of(x), of(y)), kernel_distance(x, y)


def noisy(images, sigma):
    noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(1)) * sigma
    return (images + noise).clamp(0, 255).round().byte()


def blurred(images, sigma):
    kernel = torch.exp(-(torch.arange(-3.0, 4) ** 2) / (2 * max(sigma, 1e-3) ** 2))
    kernel = (kernel[:, None] * kernel)[None, None] / kernel.sum() ** 2
    return F.conv2d(images.float(), kernel, padding=3).round().byte()


@pytest.mark.parametrize("damage", ["noise", "blur", "missing classes"])
def test_both_distances_grow_with_damage(digits, damage):
    images, labels = digits
    real, other, other_labels = images[:800], images[800:], labels[800:]
    series = {
        "noise": [noisy(other, sigma) for sigma in (0, 16, 32, 64, 128)],
        "blur": [blurred(other, sigma) for sigma in (0, 0.5, 0.7, 1.0, 1.5)],
        "missing classes": [other[other_labels < classes] for classes in (10, 7, 5, 3, 1)],
    }[damage]
    distances = np.array([both_distances(real, images) for images in series])
    assert (np.diff(distances, axis=0) > 0).all()


def test_bad_features_are_refused_with_both_values():
    x = draw(5, 4, 0)
    with pytest.raises(ValueError, match="at least 2 images a side, got 5 and 1"):
        frechet_distance(of(x), of(x[:1]))
    with pytest.raises(ValueError, match="at least 2 images a side, got 1 and 5"):
        kernel_distance(x[:1], x)
    with pytest.raises(ValueError, match="dimensions 4 and 3"):
        frechet_distance(of(x), of(x[:, :3]))
    with pytest.raises(ValueError, match="features of 2 of 5 images are NaN or infinite"):
        kernel_distance(x, torch.where(torch.arange(5)[:, None] < 2, torch.nan, x))
