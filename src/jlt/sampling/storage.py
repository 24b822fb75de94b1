"""Generated images on disk: made once, whatever happens in between.

    OUT/samples.json                 what is generated: weights, labels, solver, guidance, seed; then what it took
    OUT/images-00000.safetensors     `images` (n, channels, height, width) uint8 and `latents` (n, c, h, w) of a batch

Batch k is a fixed slice of the images, so a generation that was stopped and goes on equals, to the bit, one that was
not, and so does one that several processes share: they take batches in turn. A folder that holds other images is
refused.
"""

import contextlib
import dataclasses
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int, UInt8
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor
from tqdm import tqdm

from jlt import files
from jlt.processes import Processes
from jlt.sampling.generator import Generator, Making, Samples

HEADER = "samples.json"


def generate(
    generator: Generator,
    labels: Int[Tensor, " n"],
    out: Path,
    *,
    title: str = "sampling",
    keep: bool = True,
    processes: Processes = Processes(),  # noqa: B008
    **settings: Any,
) -> Samples:
    """Make one image for each label in the folder `out`, or go on where an earlier call stopped, and return all.

    A batch is written while the next one is made.

    Args:
        generator: from `jlt.load`.
        labels: classes in [0, num_classes].
        out: a folder of its own.
        title: what the progress bar says.
        keep: hold all images in memory; else the result holds none beside its counts, and `batches` reads them.
        processes: those that share the work; all of them have to call, and return once all images are there.
        settings: the fields of `Making`, as in `Generator.sample`.
    """
    how = Making(**settings)
    with contextlib.ExitStack() as held, ThreadPoolExecutor(1) as writer:
        processes.first(lambda: begin(generator, labels, out, how))
        processes.first(lambda: held.enter_context(files.locked(out / HEADER)))
        numbers = range(-(-len(labels) // how.batch_size))[processes.rank :: processes.count]
        written: Future[None] | None = None
        progress = tqdm(total=len(labels), desc=title, unit="image", disable=processes.rank > 0 or None)
        for k in numbers:
            mine = labels[k * how.batch_size : (k + 1) * how.batch_size]
            if not (path := batch_path(out, k)).is_file():
                made = generator.sample(mine, first_index=k * how.batch_size, progress=False, **vars(how))
                if written:
                    written.result()
                written = writer.submit(write_batch, path, made)
            progress.update(len(mine) * processes.count)
        if written:
            written.result()
        progress.close()
        processes.wait()
        asked = {**generator.settings(how), **particulars(labels, how)}
        spent = finish(out, asked, state=processes.rank == 0)
    parts = list(stored(out)) if keep else [next(stored(out))]
    end = None if keep else 0
    return Samples(
        images=torch.cat([images[:end] for images, _ in parts]),
        latents=torch.cat([latents[:end] for _, latents in parts]),
        labels=labels[:end],
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
    asked = {**generator.settings(how), **particulars(labels, how)}
    files.claim(out, HEADER, asked, "images")
    return asked


def particulars(labels: Int[Tensor, " n"], how: Making) -> dict[str, Any]:
    """Return what a folder states of its images beside how they are made."""
    return {"batch_size": how.batch_size, "num_images": len(labels), "labels": labels.tolist()}


def batch_path(out: Path, k: int) -> Path:
    """Return where batch `k` lies."""
    return out / f"images-{k:05d}.safetensors"


def batch_paths(out: Path) -> list[Path]:
    """Return the batches that are there, in order: names grow longer from the 100,000th on."""
    return sorted(out.glob("images-*.safetensors"), key=lambda path: (len(path.name), path.name))


def write_batch(path: Path, made: Samples) -> None:
    """Store a batch, and what it took."""
    took = {"seconds": f"{made.seconds:.4f}"}
    took |= {name: str(getattr(made, name)) for name in ("evaluations", "network_passes")}
    files.write_bytes(path, save({"images": made.images, "latents": made.latents}, took))


@contextlib.contextmanager
def opened(path: Path) -> Iterator[Any]:
    """Open a stored batch; a damaged file, or one of something else, is a ValueError."""
    try:
        with safe_open(path, framework="pt") as file:
            if "evaluations" not in (file.metadata() or {}):
                raise ValueError(f"{path} holds no images that this command made; move it out of the folder")
            yield file
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged ({error}); remove it, and the same command makes it again") from None


def batch(
    generator: Generator, labels: Int[Tensor, " n"], out: Path, how: Making, k: int
) -> tuple[UInt8[Tensor, "b c h w"], Float[Tensor, "b _ _ _"]]:
    """Return images and latents of batch `k`, made and stored if they are not there yet."""
    path, first = batch_path(out, k), k * how.batch_size
    if not path.is_file():
        mine = labels[first : first + how.batch_size]
        write_batch(path, generator.sample(mine, first_index=first, progress=False, **vars(how)))
    with opened(path) as file:
        return file.get_tensor("images"), file.get_tensor("latents")


def finish(out: Path, asked: Mapping[str, Any], state: bool = True) -> Spent:
    """Return what all batches took, and state it in the folder."""
    counts = []
    for path in batch_paths(out):
        with opened(path) as file:
            counts.append(file.metadata())
    evaluations, passes = (max(int(each[name]) for each in counts) for name in ("evaluations", "network_passes"))
    spent = Spent(evaluations, passes, sum(float(each["seconds"]) for each in counts))
    stated = {**asked, **dataclasses.asdict(spent)}
    if state and files.read_json(out / HEADER) != stated:
        files.write_json(out / HEADER, stated)
    return spent


def stored(out: Path) -> Iterator[tuple[UInt8[Tensor, "b c h w"], Float[Tensor, "b _ _ _"]]]:
    """Read a folder's images and latents batch by batch, in order."""
    for path in batch_paths(out):
        with opened(path) as file:
            yield file.get_tensor("images"), file.get_tensor("latents")


def batches(out: Path) -> Iterator[UInt8[Tensor, "n c h w"]]:
    """Read a folder's images batch by batch, in order."""
    return (images for images, _ in stored(out))
