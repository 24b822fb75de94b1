"""`jlt latents show LATENTS` and `jlt latents check LATENTS`."""

import math
from pathlib import Path
from typing import Annotated, Literal

import torch
import tyro

from jlt.cli.places import LatentsPath
from jlt.data import Latents, open_latents, reconstruct, splits
from jlt.data.shards import MEAN_BOUND, VARIANCE_BOUND


def run(
    action: Annotated[Literal["show", "check"], tyro.conf.Positional],
    latents: LatentsPath,
    *,
    out: Path = Path("latents.png"),
    num: int = 8,
    split: str = "train",
) -> int:
    """Look at latents on disk, or check them against what their manifests promise.

    Args:
        action: show draws images, what their latents decode to, and the difference; check reads everything.
        latents: folder made by `jlt encode`.
        out: the PNG file that show writes.
        num: number of images shown, spread over the split.
        split: the split shown.
    """
    return show(latents, out, num, split) if action == "show" else check(latents)


def show(folder: Path, out: Path, num: int, split: str) -> int:
    """Write a grid of three rows: originals, decoded latents, and the difference stretched to the full range."""
    from jlt.experiments import plots

    if num < 1:
        raise ValueError(f"num must be at least 1, got {num}")
    if out.is_dir():
        raise ValueError(f"{out} is a folder; a PNG file is wanted")
    size = len(open_latents(folder, split))
    originals, decoded = reconstruct(folder, split, torch.linspace(0, size - 1, min(num, size)).long())
    difference = (decoded.int() - originals.int()).abs()
    largest, squared = int(difference.max()), float(difference.double().square().mean())
    stretched = (difference * 255 // max(largest, 1)).to(torch.uint8)
    plots.save(out, plots.grid(torch.cat([originals, decoded, stretched]), columns=len(originals)))
    ratio = "without loss" if squared == 0 else f"PSNR {10 * math.log10(255**2 / squared):.1f} dB"
    print(f"{len(originals)} of {size} images: {ratio}, off by at most {largest} of 255 (white in the last row)")
    print(out)
    return 0


def check(folder: Path) -> int:
    """Verify every shard, and print each split's statistics by channel beside the promised ones; 1 if any is off."""
    wrong = 0
    for split in splits(folder):
        opened = open_latents(folder, split, verify=True)
        print(f"{split}: {len(opened)} latents of shape {opened.shape} in {len(opened.shards)} shards, hashes agree")
        wrong += check_channels(opened)
    print(
        f"{wrong or 'no'} channels are off by more than {MEAN_BOUND:g} standard deviations in the mean "
        f"or a factor of {VARIANCE_BOUND:g} in the variance"
    )
    return 1 if wrong else 0


def check_channels(latents: Latents) -> int:
    """Print the table of a split; return how many channels are off."""
    promise = latents.manifest
    means, variances = latents.statistics()
    typical = sum(promise.variance) / len(promise.variance)
    least = 1e-6 * typical  # a channel without variance, such as a grey image's colour, is no fault
    print(f"  {'channel':>7}{'mean':>12}{'promised':>12}{'variance':>12}{'promised':>12}")
    wrong = 0
    for k, (mean, variance) in enumerate(zip(means.tolist(), variances.tolist(), strict=True)):
        off = abs(mean - promise.mean[k]) / math.sqrt(typical)
        ratio = (variance + least) / (promise.variance[k] + least)
        good = off <= MEAN_BOUND and 1 / VARIANCE_BOUND < ratio < VARIANCE_BOUND
        wrong += not good
        row = "".join(f"{value:>12.4g}" for value in (mean, promise.mean[k], variance, promise.variance[k]))
        print(f"  {k:>7}{row}{'' if good else '  off'}")
    return wrong
