"""Randomness as a pure function: the Philox counter-based generator (Salmon et al. 2011), in plain tensor operations.

Nothing here has a state. A number is a function of (seed, stream, step, index): `stream` says what it is for (noise,
time, label drop, ...), `step` when, `index` which image. So no result depends on batch size, rank, device, or the order
in which images are made. Philox-4x32 with 10 rounds turns a 128-bit counter and a 64-bit key into 128 random bits.
"""

import enum
import math
from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

MASK = 0xFFFFFFFF


class Stream(enum.IntEnum):
    """What a random number is for; a number never changes, since runs resume on them."""

    INITIAL_WEIGHTS = 0
    DATA_ORDER = 1
    TIME = 2
    NOISE = 3
    LABEL_DROP = 4
    FLIP = 5
    SAMPLE_NOISE = 6
    HELD_OUT_NOISE = 7
    DROPOUT = 8
    SOLVER_NOISE = 9


def philox(
    counter: tuple[Int[Tensor, "*n"], Int[Tensor, "*n"] | int, Int[Tensor, "*#n"] | int, Int[Tensor, "*n"] | int],
    key: tuple[int, int],
) -> tuple[Int[Tensor, "*n"], Int[Tensor, "*n"], Int[Tensor, "*n"], Int[Tensor, "*n"]]:
    """Return four words of 32 random bits for each counter; words are int64 tensors in [0, 2^32)."""
    c0 = counter[0]
    c1, c2, c3 = (torch.as_tensor(c, dtype=torch.int64, device=c0.device).expand_as(c0) for c in counter[1:])
    k0, k1 = key
    for _ in range(10):
        # a signed 64-bit product wraps to the right bits, and the mask after the shift drops the sign's copies
        p0, p1 = c0 * 0xD2511F53, c2 * 0xCD9E8D57
        c0, c1, c2, c3 = ((p1 >> 32) & MASK) ^ c1 ^ k0, p1 & MASK, ((p0 >> 32) & MASK) ^ c3 ^ k1, p0 & MASK
        k0, k1 = (k0 + 0x9E3779B9) & MASK, (k1 + 0xBB67AE85) & MASK
    return c0, c1, c2, c3


def words(
    seed: int, stream: Stream, step: int | Int[Tensor, ""], index: Int[Tensor, " b"], count: int, site: int = 0
) -> Int[Tensor, "b count"]:
    """Return `count` random 32-bit words for each index, as int64; every argument may be up to 2^32 - 1.

    `site`, below 2^24, tells places apart that draw from one stream.
    """
    blocks = torch.arange(-(-count // 4), device=index.device)  # a counter for every four words
    counter = (
        blocks.expand(len(index), -1),
        index[:, None].expand(-1, len(blocks)),
        step & MASK,
        int(stream) + (site << 8),
    )
    return torch.stack(philox(counter, (seed & MASK, (seed >> 32) & MASK)), dim=-1).flatten(1)[:, :count]


def uniform(seed: int, stream: Stream, step: int, index: Int[Tensor, " b"]) -> Float[Tensor, " b"]:
    """Return one float32 in (0, 1), ends excluded, for each index."""
    # 23 bits and a half: every value is exact in float32 and none is 0 or 1
    return ((words(seed, stream, step, index, 1)[:, 0] >> 9).float() + 0.5) * 2.0**-23


def normal(
    seed: int, stream: Stream, step: int, index: Int[Tensor, " b"], shape: Sequence[int]
) -> Float[Tensor, "b *shape"]:
    """Return a float32 tensor of independent N(0, 1) numbers for each index, by the Box-Muller transform.

    It is worked out in float64 and rounded once, so that an image's noise is the same to the bit at any batch size;
    on a device without float64 (MPS) it is worked out on the CPU.
    """
    device, size = index.device, math.prod(shape)
    if device.type == "mps":
        index = index.cpu()
    pairs = -(-size // 2)
    u = (words(seed, stream, step, index, 2 * pairs).double() + 0.5) * 2.0**-32
    radius, angle = torch.sqrt(-2 * torch.log(u[:, :pairs])), 2 * math.pi * u[:, pairs:]
    numbers = torch.cat([radius * torch.cos(angle), radius * torch.sin(angle)], dim=1)[:, :size]
    return numbers.float().reshape(len(index), *shape).to(device)


def kept(
    seed: int, step: int | Int[Tensor, ""], index: Int[Tensor, " b"], site: int, shape: Sequence[int], rate: float
) -> Bool[Tensor, "b *shape"]:
    """Return what dropout keeps at one site: independently, each number with probability 1 - rate (to 2^-17)."""
    size = math.prod(shape)
    drawn = words(seed, Stream.DROPOUT, step, index, -(-size // 2), site)
    halves = torch.stack([drawn >> 16, drawn & 0xFFFF], dim=-1).flatten(1)[:, :size]  # 16 bits a number will do
    return (halves >= round(rate * 2**16)).reshape(len(index), *shape)


def permutation(seed: int, stream: Stream, step: int, size: int) -> Int[Tensor, " size"]:
    """Return a random order of `size` things."""
    high, low = words(seed, stream, step, torch.arange(size), 2).unbind(1)
    return torch.argsort((high << 31) | (low >> 1), stable=True)
