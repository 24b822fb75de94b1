"""Writing a split: shards one by one, in any order and by any process, and the manifest last.

    shard-00000.safetensors      see jlt.data.shards
    shard-00000.json             what it holds: its SHA-256, its number of images, and by channel the sum and the sum of
                                 squares of its latents as stored (float64; without the mirrored ones)

A shard whose bytes are those of the hash beside it is whole. Means and variances come from the shards' sums in their
order, so they do not depend on who wrote what.
"""

import dataclasses
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save
from torch import Tensor

from jlt import files
from jlt.data.representations import Representation
from jlt.data.shards import Affine, Manifest, shard_name


@dataclass(frozen=True)
class Summary:
    """What a written shard holds; `total` and `square` are sums by channel."""

    sha256: str
    num_images: int
    total: tuple[float, ...]
    square: tuple[float, ...]


def write_shard(folder: Path, k: int, tensors: dict[str, Tensor]) -> None:
    """Write shard k (`latents`, `labels` and perhaps `mirrored`), then its summary."""
    data = save({name: tensor.contiguous() for name, tensor in tensors.items()})
    files.write_bytes(folder / shard_name(k), data)
    total, square = sums(tensors["latents"])
    digest = hashlib.sha256(data).hexdigest()
    summary = Summary(digest, len(tensors["labels"]), tuple(total.tolist()), tuple(square.tolist()))
    files.write_json(summary_path(folder, k), dataclasses.asdict(summary))


def summary_path(folder: Path, k: int) -> Path:
    return (folder / shard_name(k)).with_suffix(".json")


def read_summary(folder: Path, k: int, verify: bool = True) -> Summary | None:
    """Return the summary of shard k; None where the shard is missing, half-written or damaged (`verify`: its bytes)."""
    path, told = folder / shard_name(k), summary_path(folder, k)
    if not (path.is_file() and told.is_file()):
        return None
    try:
        found = files.read_json(told)
        summary = Summary(str(found["sha256"]), int(found["num_images"]), *(tuple(map(float, found[key])) for key in
                          ("total", "square")))  # fmt: skip
    except (ValueError, TypeError, KeyError):
        return None
    return summary if not verify or files.sha256(path) == summary.sha256 else None


def sums(latents: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Return sums and sums of squares by channel, in float64; NumPy's do not depend on the number of threads."""
    total, square = np.zeros(latents.shape[1]), np.zeros(latents.shape[1])
    for part in latents.split(64):
        values = part.numpy().astype(np.float64)
        total, square = total + values.sum((0, 2, 3)), square + np.square(values).sum((0, 2, 3))
    return total, square


def read_summaries(folder: Path, count: int) -> list[Summary]:
    """Return the summaries of a split's shards, all of which have been written."""
    found = [read_summary(folder, k, verify=False) for k in range(count)]
    assert all(found), "every shard is written before any is read"
    return [summary for summary in found if summary]


def moments(summaries: Sequence[Summary], positions: int) -> tuple[Tensor, Tensor]:
    """Return mean and variance by channel over all shards, of latents with that many `positions` each, in float64."""
    count = positions * sum(summary.num_images for summary in summaries)
    total, square = (
        torch.tensor([getattr(summary, name) for summary in summaries], dtype=torch.float64).sum(0) / count
        for name in ("total", "square")
    )
    return total, (square - total**2).clamp(min=0)


def to_half(raw: Tensor, folder: Path) -> Tensor:
    """Round to 16 bits; what does not fit, or is not finite, is a ValueError."""
    half = raw.half()
    if not torch.isfinite(half).all():
        raise ValueError(f"{folder}: raw latents reach {raw.abs().max().item():.3g}, float16 holds up to 65504")
    return half


def identity(channels: int) -> Affine:
    """Return the affine of latents that are normalised already."""
    return Affine((0.0,) * channels, (1.0,) * channels)


def fit_affine(mean: Tensor, variance: Tensor, normalise: str) -> Affine:
    """Return the affine that makes channel means 0 and their mean variance ("global"), or every variance, 1."""
    least, typical = variance.min().item(), variance.mean().item()
    if typical < 1e-10:
        raise ValueError(f"the latents' channel variance is {typical:.3g}: all images are the same")
    if normalise == "channel" and least < 1e-9 * typical:
        raise ValueError(
            f"a channel's variance is {least:.3g} where the mean is {typical:.3g}, scaled to 1 it would be noise; "
            f"keep the first {int((variance > 1e-9 * typical).sum())} channels, or normalise by one scale for all"
        )
    used = variance if normalise == "channel" else variance.mean().expand_as(variance)
    return Affine(tuple(mean.tolist()), tuple(used.rsqrt().tolist()))


def write_manifest(
    folder: Path,
    summaries: Sequence[Summary],
    shape: tuple[int, int, int],
    shard_size: int,
    class_names: tuple[str, ...] | None,
    source: dict[str, Any],
    representation: Representation,
    affine: Affine,
    mirrored: bool,
) -> None:
    """Write the manifest of the split `folder`, whose shards are written; it promises what the summaries hold."""
    mean, variance = moments(summaries, shape[1] * shape[2])
    shift, scale = (torch.tensor(side, dtype=torch.float64) for side in (affine.shift, affine.scale))
    Manifest(
        split=folder.name,
        num_images=sum(summary.num_images for summary in summaries),
        shard_size=shard_size,
        shape=shape,
        class_names=class_names,
        source=source,
        representation=representation.name,
        representation_fingerprint=representation.fingerprint,
        affine=affine,
        mean=tuple(((mean - shift) * scale).tolist()),
        variance=tuple((variance * scale**2).tolist()),
        mirrored=mirrored,
        shards=tuple((shard_name(k), summary.num_images, summary.sha256) for k, summary in enumerate(summaries)),
    ).write(folder)
