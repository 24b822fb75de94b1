"""The covariance of latents by token, summed in float64.

A token is one position's channels, one p x p patch in (row, column, channel) order, which is what the network's input
layer sees, or the whole image.
"""

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int64
from torch import Tensor
from tqdm import tqdm


@runtime_checkable
class Measurable(Protocol):
    """What is measured: a set of latents that knows its size and gathers batches."""

    def __len__(self) -> int: ...

    def gather(self, indices: Int64[Tensor, " b"]) -> Float[Tensor, "b c h w"]:
        """Return the latents at `indices`."""


@dataclass(frozen=True)
class Sample:
    """At most `count` of some latents, evenly spread over them."""

    latents: Measurable
    count: int

    def __len__(self) -> int:
        return min(len(self.latents), self.count)

    def gather(self, indices: Int64[Tensor, " b"]) -> Float[Tensor, "b c h w"]:
        """Return the latents at `indices` of the sample."""
        return self.latents.gather(indices * len(self.latents) // len(self))


def token_moments(
    latents: Measurable, patch_size: int | None = 1, batch_size: int = 256
) -> tuple[Float[Tensor, " d"], Float[Tensor, "d d"], int]:
    """Return mean, covariance (n - 1) and number of the tokens, d = patch_size^2 channels, in float64.

    Sums are taken about the first batch's mean, so that a large common offset costs no digits.
    """
    if len(latents) < 1 or batch_size < 1:
        raise ValueError(f"moments need at least 1 latent and a batch of 1, got {len(latents)} and {batch_size}")
    origin = total = products = None
    num_tokens = 0
    for start in tqdm(range(0, len(latents), batch_size), desc="covariance", unit="batch", disable=None):
        batch = latents.gather(torch.arange(start, min(start + batch_size, len(latents))))
        tokens = patches(batch.double(), patch_size)
        if origin is None or total is None or products is None:
            origin = tokens.mean(0)
            total, products = torch.zeros_like(origin), origin.new_zeros(len(origin), len(origin))
        tokens = tokens - origin
        total += tokens.sum(0)
        products += tokens.T @ tokens
        num_tokens += len(tokens)
    assert origin is not None
    assert total is not None
    assert products is not None
    if num_tokens <= len(origin) and (patch_size is not None or num_tokens < 2):
        raise ValueError(f"a covariance of {len(origin)} directions needs more tokens than that, got {num_tokens}")
    if not products.isfinite().all():
        raise ValueError(f"{int((~products.diagonal().isfinite()).sum())} of {len(origin)} directions are not finite")
    covariance = (products - torch.outer(total, total) / num_tokens) / (num_tokens - 1)
    return origin + total / num_tokens, covariance, num_tokens


def spectrum(covariance: Float[Tensor, "d d"]) -> Float[Tensor, " d"]:
    """Return a covariance's eigenvalues in falling order; what rounding brings below 0 is 0."""
    return torch.linalg.eigvalsh(covariance).flip(0).clamp(min=0)


def patches(latents: Float[Tensor, "b c h w"], patch_size: int | None) -> Float[Tensor, "n d"]:
    """Cut latents into p x p patches, flattened in (row, column, channel) order; None leaves each image whole."""
    _, channels, height, width = latents.shape
    if patch_size is None:
        return latents.permute(0, 2, 3, 1).flatten(1)
    if patch_size < 1 or height % patch_size or width % patch_size:
        raise ValueError(f"patch_size must divide the latents' {height} x {width}, got {patch_size}")
    rows = latents.unfold(2, patch_size, patch_size).unfold(3, patch_size, patch_size)  # (b, c, h/p, w/p, p, p)
    return rows.permute(0, 2, 3, 4, 5, 1).reshape(-1, patch_size**2 * channels)
