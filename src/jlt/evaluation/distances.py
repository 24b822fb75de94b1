"""Distances between two sets of features.

The Frechet distance compares mean and covariance and is biased upwards for few images; the kernel distance is unbiased
at any number, and may therefore come out slightly negative. Both are 0 for equal distributions and grow with noise,
blur and missing classes. Formulas: Heusel et al. 2017 (arXiv 1706.08500), Binkowski et al. 2018 (arXiv 1801.01401).
"""

from collections.abc import Sequence

import torch
from jaxtyping import Float, Float64
from torch import Tensor

from jlt.evaluation.moments import Moments, Stated, check_features

BLOCK_SIZE = 1024  # rows of a kernel block: 8 MB, and long enough for the matrix product to be fast


def frechet_distance(a: Moments | Stated, b: Moments | Stated) -> float:
    """Return |mean_a - mean_b|^2 + tr(S_a + S_b - 2 (S_a S_b)^(1/2)), at least 0, for n images any n >= 2.

    With S = A A^T, tr (S_a S_b)^(1/2) is the sum of the singular values of A_a^T A_b. That is real and accurate for
    singular covariances too, where the square root of the product loses half of the digits.
    """
    return frechet_distances([a], b)[0]


def frechet_distances(many: Sequence[Moments | Stated], b: Moments | Stated) -> list[float]:
    """Return the distance of each from `b`, whose square root is worked out once."""
    for a in many:
        if a.dimension != b.dimension:
            raise ValueError(f"a Frechet distance between features of dimensions {a.dimension} and {b.dimension}")
        if any(side.count is not None and side.count < 2 for side in (a, b)):
            raise ValueError(f"a Frechet distance needs at least 2 images a side, got {a.count} and {b.count}")
    root, trace = square_root(b), b.covariance.trace().item()
    distances = []
    for a in many:
        cross = torch.linalg.svdvals(square_root(a).T @ root).sum().item()
        means = (a.mean - b.mean).square().sum().item()
        distances.append(max(0.0, means + (a.covariance.trace().item() + trace) - 2 * cross))
    return distances


def square_root(moments: Moments | Stated) -> Float64[Tensor, "d rank"]:
    """Return A with A A^T the covariance, of at most count - 1 columns."""
    covariance, d = moments.covariance, moments.dimension
    rounding = d * torch.finfo(torch.float64).eps  # of the largest eigenvalue
    most = d if moments.count is None else min(d, moments.count - 1)
    if most == d:
        triangle, failed = torch.linalg.cholesky_ex(covariance)  # twenty times as fast as the eigenvectors
        largest = covariance.abs().sum(1).max()  # no eigenvalue is above it
        if not failed and triangle.diagonal().square().min() > rounding * largest:
            return triangle
    eigenvalues, vectors = torch.linalg.eigh(covariance)  # ascending
    # The eigenvalues past the rank are rounding errors, and their roots would not be small.
    real = int((eigenvalues > rounding * eigenvalues[-1].clamp(min=0)).sum())
    kept = slice(d - min(real, most), None)
    root: Tensor = vectors[:, kept] * eigenvalues[kept].sqrt()
    return root


def kernel_distance(a: Float[Tensor, "n d"], b: Float[Tensor, "m d"]) -> float:
    """Return the unbiased squared maximum mean discrepancy over all pairs, kernel (x.y/d + 1)^3."""
    if min(len(a), len(b)) < 2:
        raise ValueError(f"a kernel distance needs at least 2 images a side, got {len(a)} and {len(b)}")
    check_features(a, a.shape[1])
    check_features(b, a.shape[1])
    n, m = len(a), len(b)
    within_a = (kernel_sum(a, a) - diagonal_sum(a)) / (n * (n - 1))
    within_b = (kernel_sum(b, b) - diagonal_sum(b)) / (m * (m - 1))
    return within_a + within_b - 2 * kernel_sum(a, b) / (n * m)


def kernel_sum(a: Float[Tensor, "n d"], b: Float[Tensor, "m d"]) -> float:
    """Sum the kernel over all pairs, a block at a time."""
    total = 0.0
    for x in torch.split(a, BLOCK_SIZE):
        for y in torch.split(b, BLOCK_SIZE):
            total += ((x.double() @ y.double().T) / a.shape[1] + 1).pow(3).sum().item()
    return total


def diagonal_sum(a: Float[Tensor, "n d"]) -> float:
    """Sum the kernel of each row with itself."""
    return sum((x.double().square().sum(1) / a.shape[1] + 1).pow(3).sum().item() for x in torch.split(a, BLOCK_SIZE))
