"""Generated images on disk: made once, whatever happens in between.

    OUT/samples.json                 what is generated: weights, labels, solver, guidance, seed; then what it took
    OUT/images-00000.safetensors     `images` (n, channels, height, width) uint8 and `latents` (n, c, h, w) of a batch

Batch k is a fixed slice of the images, so a generation that was stopped and goes on equals, to the bit, one that was
not. A folder that holds other images is refused.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int, UInt8
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor
from tqdm import tqdm

from jlt import files
from jlt.sampling.generator import Generator, Samples

HEADER = "samples.json"


def generate(
    generator: Generator,
    labels: Int[Tensor, " n"],
    out: Path,
    *,
    seed: int = 0,
    solver: str = "heun",
    grid: str = "uniform",
    steps: int = 50,
    scale: float = 1.0,
    interval: tuple[float, float] = (0.1, 1.0),
    guidance: str = "cfg",
    guide: Generator | None = None,
    batch_size: int = 100,
    title: str = "sampling",
    keep: bool = True,
) -> Samples:
    """Make one image for each label in the folder `out`, or go on where an earlier call stopped, and return all.

    Args:
        generator: from `jlt.load`.
        labels: classes in [0, num_classes].
        out: a folder of its own.
        seed, solver, grid, steps, scale, interval, guidance, guide, batch_size: as in `Generator.sample`.
        title: what the progress bar says.
        keep: hold all images in memory; else the result holds none beside its counts, and `batches` reads them.
    """
    generator.check(labels, solver, grid, steps, scale, interval, batch_size, guidance, guide)
    asked: dict[str, Any] = {
        **generator.settings(solver, grid, steps, scale, interval, generator.header["floor"], seed, guidance, guide),
        "batch_size": batch_size,
        "num_images": len(labels),
        "labels": labels.tolist(),
    }
    claim(out, asked)
    parts: list[tuple[Tensor, Tensor]] = []
    evaluations, network_passes = 0, 0
    seconds = 0.0
    progress = tqdm(total=len(labels), desc=title, unit="image", disable=None)
    with files.locked(out / HEADER):
        for k, first in enumerate(range(0, len(labels), batch_size)):
            path = out / f"images-{k:05d}.safetensors"
            if not path.is_file():
                batch = generator.sample(
                    labels[first : first + batch_size], seed=seed, solver=solver, grid=grid, steps=steps, scale=scale,
                    interval=interval, guidance=guidance, guide=guide, batch_size=batch_size,
                    first_index=first, progress=False,
                )  # fmt: skip
                stated = {
                    "seconds": f"{batch.seconds:.4f}",
                    "evaluations": str(batch.evaluations),
                    "network_passes": str(batch.network_passes),
                }
                files.write_bytes(path, save({"images": batch.images, "latents": batch.latents}, stated))
            with safe_open(path, framework="pt") as file:
                images, latents = file.get_tensor("images"), file.get_tensor("latents")
                parts.append((images, latents) if keep else (images[:0], latents[:0]))
                counts = file.metadata()
            evaluations = max(evaluations, int(counts["evaluations"]))
            network_passes = max(network_passes, int(counts["network_passes"]))
            seconds += float(counts["seconds"])
            progress.update(len(images))
    progress.close()
    spent = {"evaluations": evaluations, "network_passes": network_passes, "seconds": seconds}
    if files.read_json(out / HEADER) != asked | spent:
        files.write_json(out / HEADER, asked | spent)
    return Samples(
        images=torch.cat([images for images, _ in parts]),
        latents=torch.cat([latents for _, latents in parts]),
        labels=labels if keep else labels[:0],
        seeds=[(seed, i) for i in range(len(labels) if keep else 0)],
        settings=asked,
        evaluations=evaluations,
        network_passes=network_passes,
        seconds=seconds,
    )


def batches(out: Path) -> Iterator[UInt8[Tensor, "n c h w"]]:
    """Read a folder's images batch by batch, in order."""
    for path in sorted(out.glob("images-*.safetensors")):
        with safe_open(path, framework="pt") as file:
            yield file.get_tensor("images")


def claim(out: Path, asked: dict[str, Any]) -> None:
    """Say in the folder what it is for; one that holds anything but the same images, begun, is a ValueError."""
    if out.exists() and not out.is_dir():
        raise ValueError(f"{out} is a file; a folder for images is wanted")
    path = out / HEADER
    if path.is_file():
        found = files.read_json(path)
        differing = [name for name in asked if not isinstance(found, dict) or found.get(name) != asked[name]]
        if differing:
            raise ValueError(f"{out} holds images made with other settings: {', '.join(differing)} differ")
        return
    if files.names(out):
        raise ValueError(f"{out} is not an empty folder; images go into a folder of their own")
    files.write_json(path, asked)
