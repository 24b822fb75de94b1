"""Scores that are no distance: the Inception Score, and how two sets of features cover each other.

Precision is the share of generated images inside the ball of a real one, recall the share of real images inside the
ball of a generated one; an image's ball reaches to its k-th nearest neighbour in its own set (Kynkaanniemi et al. 2019,
arXiv 1904.06991). Density counts the real balls around a generated image, over k, and coverage is the share of real
images whose ball holds a generated one (Naeem et al. 2020, arXiv 2002.09797); both forgive an outlier among the real
images, which precision does not. All grow with the number of images, so they are stated with it.
"""

import torch
from jaxtyping import Float, Float64
from torch import Tensor

from jlt.evaluation.moments import check_features
from jlt.evaluation.records import Value, mean_and_spread

NEIGHBOURS = 3
BLOCK_SIZE = 1024  # rows of a block of distances: 80 MB against 10,000 images


class InceptionScore:
    """exp of the mean of KL(p(class | image) | p(class)), over `splits` shares of the images (arXiv 1606.03498).

    The shares must be drawn at random: in order of class, each would hold a tenth of the classes and score far less.
    """

    def __init__(self, num_classes: int, splits: int = 10) -> None:
        self.counts: Float64[Tensor, " s"] = torch.zeros(splits, dtype=torch.float64)
        self.probabilities: Float64[Tensor, "s c"] = torch.zeros(splits, num_classes, dtype=torch.float64)
        self.entropies: Float64[Tensor, " s"] = torch.zeros(
            splits, dtype=torch.float64
        )  # of p(class | image), negative

    def update(self, logits: Float[Tensor, "b c"], split: Tensor) -> None:
        """Add images by their logits and the number of the share that each belongs to."""
        check_features(logits, self.probabilities.shape[1])
        log_p = logits.detach().cpu().double().log_softmax(1)
        self.counts.index_add_(0, split, torch.ones(len(split), dtype=torch.float64))
        self.probabilities.index_add_(0, split, log_p.exp())
        self.entropies.index_add_(0, split, (log_p.exp() * log_p).sum(1))

    def value(self) -> Value:
        """Return mean and standard deviation over the shares, each of which must hold an image."""
        if not bool((self.counts > 0).all()):
            raise ValueError(f"an Inception Score needs {len(self.counts)} images, got {int(self.counts.sum())}")
        marginal = self.probabilities / self.counts[:, None]
        divergence = self.entropies / self.counts - torch.special.xlogy(marginal, marginal).sum(1)
        return mean_and_spread(divergence.exp().tolist())


def coverage_scores(
    generated: Float[Tensor, "n d"], real: Float[Tensor, "m d"], neighbours: int = NEIGHBOURS
) -> dict[str, float]:
    """Return precision, recall, density and coverage; a set of no more than `neighbours` images is a ValueError."""
    if min(len(generated), len(real)) <= neighbours:
        raise ValueError(
            f"precision and recall with {neighbours} neighbours need more images than that a side, "
            f"got {len(generated)} and {len(real)}"
        )
    check_features(generated, real.shape[1])
    check_features(real, real.shape[1])
    real_radii, generated_radii = radii(real, neighbours), radii(generated, neighbours)
    inside_real = torch.zeros(len(generated))  # real balls around each generated image
    found, covered = [], []
    for block, radius in zip(real.split(BLOCK_SIZE), real_radii.split(BLOCK_SIZE), strict=True):
        apart = distances(block, generated)
        inside = apart <= radius[:, None]
        inside_real += inside.sum(0)
        covered.append(inside.any(1))
        found.append((apart <= generated_radii).any(1))
    return {
        "precision": (inside_real > 0).double().mean().item(),
        "recall": torch.cat(found).double().mean().item(),
        "density": inside_real.double().mean().item() / neighbours,
        "coverage": torch.cat(covered).double().mean().item(),
    }


def radii(features: Float[Tensor, "n d"], neighbours: int) -> Float64[Tensor, " n"]:
    """Return the distance of each row to its nearest neighbours' last, itself not counted."""
    return torch.cat([distances(rows, features).kthvalue(neighbours + 1).values for rows in features.split(BLOCK_SIZE)])


def distances(a: Float[Tensor, "n d"], b: Float[Tensor, "m d"]) -> Float64[Tensor, "n m"]:
    """Return Euclidean distances, by products of matrices: in float64, where that costs half of 16 digits near 0."""
    return torch.cdist(a.double(), b.double(), compute_mode="use_mm_for_euclid_dist")
