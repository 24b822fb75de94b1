"""Nearest training latents: does a sample repeat an image that it was trained on?

Distances are root mean squares over a latent's numbers, between normalised latents. A sample of a class is compared
with the training images of that class, others with all; with their mirrored latents too, where there are such. Latents
are read from the disk in blocks. Samples much nearer to their neighbours than held-out images are to theirs are copies;
equal distances prove nothing.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from jlt.data import Latents

BLOCK_SIZE = 512  # latents read at once


@dataclass(frozen=True)
class Neighbours:
    """For each sample the training images nearest to it, nearest first, and how far they are."""

    numbers: Int[Tensor, "n k"]
    distances: Float[Tensor, "n k"]


def nearest(
    latents: Float[Tensor, "n c h w"], labels: Int[Tensor, " n"], training: Latents, count: int = 3
) -> Neighbours:
    """Return the `count` training images nearest to each latent, or as many as there are of the smallest class."""
    rows = latents.flatten(1).cpu()
    classes = torch.unique(labels) if training.num_classes else torch.zeros(1, dtype=torch.int64)
    least = min(int((training.labels == k).sum()) for k in classes.tolist())
    if least == 0:
        raise ValueError(f"{training.folder} holds no image of one of the classes asked for")
    count = min(count, least)
    numbers = torch.zeros(len(rows), count, dtype=torch.int64)
    distances = torch.full((len(rows), count), torch.inf)
    for k in classes.tolist():
        mine = torch.nonzero(labels == k)[:, 0] if training.num_classes else torch.arange(len(rows))
        for block in torch.nonzero(training.labels == k)[:, 0].split(BLOCK_SIZE):
            # products of matrices would lose a distance of 0, which is the one that matters
            apart = _distances(rows[mine], training.gather(block))
            if training.mirrored is not None:
                mirrored = training.gather(block, torch.ones(len(block), dtype=torch.bool))
                apart = torch.minimum(apart, _distances(rows[mine], mirrored))
            both = torch.cat([distances[mine], apart], 1)
            told = torch.cat([numbers[mine], block.expand(len(mine), -1)], 1)
            order = torch.argsort(both, dim=1, stable=True)[:, :count]
            distances[mine], numbers[mine] = both.gather(1, order), told.gather(1, order)
    return Neighbours(numbers, distances)


def _distances(a: Float[Tensor, "n d"], b: Float[Tensor, "m c h w"]) -> Float[Tensor, "n m"]:
    apart: Tensor = torch.cdist(a, b.flatten(1), compute_mode="donot_use_mm_for_euclid_dist")
    return apart / a.shape[1] ** 0.5
