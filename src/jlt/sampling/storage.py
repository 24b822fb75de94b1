"""Generated images on disk: made once, whatever happens in between.

    OUT/samples.json                 what is generated: weights, labels, solver, guidance, seed; then what it took
    OUT/images-00000.safetensors     `images` (n, channels, height, width) uint8 and `latents` (n, c, h, w) of a batch

Batch k is a fixed slice of the images, so a generation that was stopped and goes on equals, to the bit, one that was
not. A folder that holds other images is refused.
"""

import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int, UInt8
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor
from tqdm import tqdm

from jlt import files
from jlt.sampling.generator import Generator, Making, Samples

HEADER = "samples.json"


def generate(
    generator: Generator,
    labels: Int[Tensor, " n"],
    out: Path,
    *,
    title: str = "sampling",
    keep: bool = True,
    **settings: Any,
) -> Samples:
    """Make one image for each label in the folder `out`, or go on where an earlier call stopped, and return all.

    Args:
        generator: from `jlt.load`.
        labels: classes in [0, num_classes].
        out: a folder of its own.
        title: what the progress bar says.
        keep: hold all images in memory; else the result holds none beside its counts, and `batches` reads them.
        settings: the fields of `Making`, as in `Generator.sample`.
    """
    how = Making(**settings)
    asked = begin(generator, labels, out, how)
    parts: list[tuple[Tensor, Tensor]] = []
    progress = tqdm(total=len(labels), desc=title, unit="image", disable=None)
    with files.locked(out / HEADER):
        for k in range(-(-len(labels) // how.batch_size)):
            images, latents = batch(generator, labels, out, how, k)
            parts.append((images, latents) if keep else (images[:0], latents[:0]))
            progress.update(len(images))
    progress.close()
    spent = finish(out, asked)
    return Samples(
        images=torch.cat([images for images, _ in parts]),
        latents=torch.cat([latents for _, latents in parts]),
        labels=labels if keep else labels[:0],
        seeds=[(how.seed, i) for i in range(len(labels) if keep else 0)],
        settings=asked,
        evaluations=spent.evaluations,
        network_passes=spent.network_passes,
        seconds=spent.seconds,
    )


@dataclass(frozen=True)
class Spent:
    """What images took: counts an image, and the seconds of all batches, one after the other."""

    evaluations: int
    network_passes: int
    seconds: float


def begin(generator: Generator, labels: Int[Tensor, " n"], out: Path, how: Making) -> dict[str, Any]:
    """Check that the images can be made and claim the folder for them; return what was asked for."""
    generator.check(labels, how)
    asked: dict[str, Any] = {
        **generator.settings(how),
        "batch_size": how.batch_size,
        "num_images": len(labels),
        "labels": labels.tolist(),
    }
    files.claim(out, HEADER, asked, "images")
    return asked


def batch(
    generator: Generator, labels: Int[Tensor, " n"], out: Path, how: Making, k: int
) -> tuple[UInt8[Tensor, "b c h w"], Float[Tensor, "b _ _ _"]]:
    """Return images and latents of batch `k`, made and stored if they are not there yet."""
    path = out / f"images-{k:05d}.safetensors"
    first = k * how.batch_size
    if not path.is_file():
        mine = labels[first : first + how.batch_size]
        made = generator.sample(mine, first_index=first, progress=False, **vars(how))
        stated = {
            "seconds": f"{made.seconds:.4f}",
            "evaluations": str(made.evaluations),
            "network_passes": str(made.network_passes),
        }
        files.write_bytes(path, save({"images": made.images, "latents": made.latents}, stated))
    with safe_open(path, framework="pt") as file:
        return file.get_tensor("images"), file.get_tensor("latents")


def finish(out: Path, asked: Mapping[str, Any]) -> Spent:
    """Return what all batches took, and state it in the folder."""
    counts = []
    for path in sorted(out.glob("images-*.safetensors")):
        with safe_open(path, framework="pt") as file:
            counts.append(file.metadata())
    evaluations, passes = (max(int(each[name]) for each in counts) for name in ("evaluations", "network_passes"))
    spent = Spent(evaluations, passes, sum(float(each["seconds"]) for each in counts))
    stated = {**asked, **dataclasses.asdict(spent)}
    if files.read_json(out / HEADER) != stated:
        files.write_json(out / HEADER, stated)
    return spent


def batches(out: Path) -> Iterator[UInt8[Tensor, "n c h w"]]:
    """Read a folder's images batch by batch, in order."""
    for path in sorted(out.glob("images-*.safetensors")):
        with safe_open(path, framework="pt") as file:
            yield file.get_tensor("images")
