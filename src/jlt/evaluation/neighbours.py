"""Nearest training latents: does a sample repeat an image that it was trained on?

Distances are root mean squares over a latent's numbers, between normalised latents. A sample of a class is compared
with the training images of that class, others with all, as are those of a class of which none is left to train on; with
their mirrored latents too, where there are such. Latents are read from the disk in blocks. Samples much nearer to their
neighbours than held-out images are to theirs are copies; equal distances prove nothing.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from jlt.data import Latents

BLOCK_SIZE = 512  # latents read at once


@dataclass(frozen=True)
class Neighbours:
    """For each sample the training images nearest to it, nearest first, how far they are, and if they are mirrored."""

    numbers: Int[Tensor, "n k"]
    distances: Float[Tensor, "n k"]
    mirrored: Bool[Tensor, "n k"]


def nearest(
    latents: Float[Tensor, "n c h w"],
    labels: Int[Tensor, " n"] | None,
    training: Latents,
    count: int = 3,
    mirrored: bool | None = None,
) -> Neighbours:
    """Return the `count` training images nearest to each latent, or as many as there are of the smallest class.

    Without labels all training images are compared; `mirrored` ones, too, by default where there are such.
    """
    rows = latents.flatten(1).cpu()
    flips = (False, True)[: 1 + (training.mirrored is not None if mirrored is None else mirrored)]
    classed = labels is not None and training.num_classes > 0
    known = training.labels if classed else torch.zeros_like(training.labels)
    asked = labels if labels is not None and classed else torch.zeros(len(rows), dtype=torch.int64)
    classes = torch.unique(asked).tolist()
    compared = {k: torch.nonzero(known == k)[:, 0] for k in classes}
    compared = {k: numbers if len(numbers) else torch.arange(len(known)) for k, numbers in compared.items()}
    count = min([count, *map(len, compared.values())])
    numbers = torch.zeros(len(rows), count, dtype=torch.int64)
    distances, flipped = torch.full((len(rows), count), torch.inf), torch.zeros(len(rows), count, dtype=torch.bool)
    for k in classes:
        mine = torch.nonzero(asked == k)[:, 0]
        for block in compared[k].split(BLOCK_SIZE):
            # products of matrices would lose a distance of 0, which is the one that matters
            sides = [_distances(rows[mine], training.gather(block, torch.full((len(block),), f))) for f in flips]
            apart, side = torch.stack(sides).min(0)
            both = torch.cat([distances[mine], apart], 1)
            order = torch.argsort(both, dim=1, stable=True)[:, :count]
            distances[mine] = both.gather(1, order)
            numbers[mine] = torch.cat([numbers[mine], block.expand(len(mine), -1)], 1).gather(1, order)
            flipped[mine] = torch.cat([flipped[mine], side > 0], 1).gather(1, order)
    return Neighbours(numbers, distances, flipped)


def _distances(a: Float[Tensor, "n d"], b: Float[Tensor, "m c h w"]) -> Float[Tensor, "n m"]:
    apart: Tensor = torch.cdist(a, b.flatten(1), compute_mode="donot_use_mm_for_euclid_dist")
    return apart / a.shape[1] ** 0.5
