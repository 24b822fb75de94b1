"""`jlt sample RUN OUT`."""

import json as json_module
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Literal

import torch
import tyro

from jlt import files
from jlt.cli.places import OutPath, RunPath
from jlt.experiments import film, plots
from jlt.experiments.asking import How, balanced_labels
from jlt.processes import joined
from jlt.sampling import FORMATS, Generator, Making, Stored, batches, fitting_batch_size, generate, load


@dataclass(frozen=True)
class Opened(How):
    """How images are made, and what with: what sample and interpolate share.

    Attributes:
        device: where the network runs: cpu, cuda (under torchrun each process has its own), mps.
        compile: compile the network's blocks: a minute at first, then faster.
        decoder: another autoencoder for the same latents, such as flux2-small-decoder for those of flux2.
    """

    device: str = "cpu"
    compile: bool = False
    decoder: str | None = None

    def open(self, run: Path) -> tuple[Generator, Making]:
        """Open a run, and its guide."""
        generator = load(run, self.weights, self.device, self.decoder, self.compile)
        return generator, self.making(generator.model.config.num_classes, self.device, self.compile)


def run(
    source: RunPath,
    out: OutPath,
    making: Annotated[Opened, tyro.conf.arg(name="")] = Opened(),
    *,
    num: int = 100,
    label: str = "balanced",
    batch_size: int | Literal["auto"] = 100,
    format: str = "png",
    strip: bool = False,
    gif: bool = False,
    json: bool = False,
) -> None:
    """Make images with a trained run: files, a grid, and samples.json that says how; stopped, it goes on again.

    On several GPUs: torchrun --nproc-per-node 8 -m jlt sample ... --device cuda

    Args:
        source: a run folder (its last checkpoint), a checkpoint folder, or ORG/NAME of the Hub.
        out: folder for the images; one that was begun with the same settings is continued.
        making: how images are made.
        num: number of images.
        label: one class, by name or index, or balanced: all classes in turn.
        batch_size: images at once, or auto: as many as half of the free memory takes, at most 256.
        format: png (a file an image), tar (WebDataset), or npz (arr_0 as the ADM evaluator reads it).
        strip: also draw strip.png, the path of 4 images: z above the predicted x, a column a time.
        gif: also animate the path as path.gif.
        json: print the settings and counts as JSON instead of the folder.
    """
    if num < 1:
        raise ValueError(f"num must be at least 1, got {num}")
    write = files.choose("format", format, FORMATS)
    with joined() as processes:
        generator, how = making.open(source)
        classes, names = generator.model.config.num_classes, generator.class_names
        channels = generator.representation.image_channels
        if channels not in (1, 3) and (format != "npz" or strip or gif):
            raise ValueError(f"images have {channels} channels, pictures 1 or 3; --format npz takes any number")
        labels = balanced_labels(num, classes) if label == "balanced" else torch.full((num,), generator.label(label))
        if batch_size == "auto":
            batch_size = fitting_batch_size(generator, how, out, processes)
        how = replace(how, batch_size=batch_size)
        generate(generator, labels, out, keep=False, processes=processes, **vars(how))
        if processes.rank:
            return
    first = next(batches(out))[:100]
    named = ["no class" if k == classes else names[k] for k in labels.tolist()] if names and classes else None
    stored = Stored(batches(out), labels.tolist() if classes else None, num, first.shape[1:], names)
    write(out, stored)
    if channels in (1, 3):
        captions = None if named is None else [name.split(",")[0][:12] for name in named[: len(first)]]
        plots.save(out / "grid.png", plots.grid(first, 10, captions))
    if strip or gif:
        path = film.film(generator, labels[: 4 if strip else 10], how)
        if strip:
            plots.save(out / "strip.png", film.strip(path))
        if gif:
            files.write_bytes(out / "path.gif", film.gif(path))
    print(json_module.dumps(files.read_json(out / "samples.json")) if json else out)
