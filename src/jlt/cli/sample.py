"""`jlt sample RUN OUT`."""

import json as json_module
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import tyro
from PIL import Image

from jlt import files
from jlt.experiments import film, plots
from jlt.experiments.evaluate import balanced_labels
from jlt.processes import joined
from jlt.sampling import FORMATS, Generator, Making, Stored, batches, default_scale, fitting_batch_size, generate, load


@dataclass(frozen=True)
class How:
    """How images are made: what sample and interpolate share.

    Attributes:
        seed: with an image's index it determines the image's noise.
        solver: euler, heun, midpoint, rk4, ab2, dpmpp-2m, dpmpp-3m, unipc, sde-dpmpp-2m, or adaptive=TOLERANCE.
        grid: where the steps lie: uniform, shifted=3, logit=3, karras=7.
        steps: steps of the time grid; ab2 evaluates the model once a step, heun twice but in the last.
        scale: guidance scale, 1 is none; by default the paper's 2.9, or 1 for an unconditional model.
        interval: guidance applies where low < t < high.
        guidance: cfg, cfg-zero, apg or auto, with options such as cfg:schedule=linear or apg:eta=0.5,momentum=0.
        guide: for guidance auto, the run or checkpoint of a smaller or less trained model of the same latents.
        weights: ema (the first average), model, the decay of an average, or power=LENGTH of a power average.
        device: where the network runs: cpu, cuda (under torchrun each process has its own), mps.
        compile: compile the network's blocks: a minute at first, then faster.
        decoder: another autoencoder for the same latents, such as flux2-small-decoder for those of flux2.
    """

    seed: int = Making.seed
    solver: str = Making.solver
    grid: str = Making.grid
    steps: int = Making.steps
    scale: float | None = None
    interval: tuple[float, float] = Making.interval
    guidance: str = Making.guidance
    guide: Path | None = None
    weights: str = "ema"
    device: str = "cpu"
    compile: bool = False
    decoder: str | None = None

    def open(self, run: Path) -> tuple[Generator, dict[str, Any]]:
        """Open a run, and its guide; return it with the arguments of `Generator.sample`."""
        generator = load(run, self.weights, self.device, self.decoder, self.compile)
        named = {name: getattr(self, name) for name in ("seed", "solver", "grid", "steps", "interval", "guidance")}
        scale = default_scale(generator.model.config.num_classes) if self.scale is None else self.scale
        guide = None if self.guide is None else load(self.guide, device=self.device, compile=self.compile)
        return generator, {**named, "scale": scale, "guide": guide}


def run(
    source: Annotated[Path, tyro.conf.arg(name="run"), tyro.conf.Positional],
    out: Annotated[Path, tyro.conf.Positional],
    making: Annotated[How, tyro.conf.arg(name="")] = How(),
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
            batch_size = fitting_batch_size(generator, Making(**how), out, processes)
        generate(generator, labels, out, batch_size=batch_size, keep=False, processes=processes, **how)
        if processes.rank:
            return
    first = next(batches(out))[:100]
    named = ["no class" if k == classes else names[k] for k in labels.tolist()] if names and classes else None
    stored = Stored(batches(out), labels.tolist() if classes else None, num, first.shape[1:], names)
    write(out, stored)
    if channels in (1, 3):
        captions = None if named is None else [name.split(",")[0][:12] for name in named[: len(first)]]
        save(out / "grid.png", plots.grid(first, 10, captions))
    if strip or gif:
        path = film.film(generator, labels[: 4 if strip else 10], **how)
        if strip:
            save(out / "strip.png", film.strip(path))
        if gif:
            files.write_bytes(out / "path.gif", film.gif(path))
    print(json_module.dumps(files.read_json(out / "samples.json")) if json else out)


def save(path: Path, image: Image.Image) -> None:
    """Write a PNG file, whole or not at all."""
    with files.replaced(path) as temporary:
        image.save(temporary, format="PNG")
