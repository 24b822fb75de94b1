"""`jlt sample RUN OUT`."""

import json as json_module
from pathlib import Path
from typing import Annotated

import torch
import tyro
from PIL import Image

from jlt import files
from jlt.experiments import plots
from jlt.experiments.evaluate import balanced_labels
from jlt.sampling import default_scale, generate, load


def run(
    source: Annotated[Path, tyro.conf.arg(name="run"), tyro.conf.Positional],
    out: Annotated[Path, tyro.conf.Positional],
    *,
    num: int = 100,
    label: str | None = None,
    seed: int = 0,
    solver: str = "heun",
    grid: str = "uniform",
    steps: int = 50,
    scale: float | None = None,
    interval: tuple[float, float] = (0.1, 1.0),
    guidance: str = "cfg",
    guide: Path | None = None,
    weights: str = "ema",
    batch_size: int = 100,
    device: str = "cpu",
    decoder: str | None = None,
    json: bool = False,
) -> None:
    """Make images with a trained run: PNG files, a grid, and samples.json that says how; stopped, it goes on again.

    Args:
        source: a run folder (its last checkpoint) or a checkpoint folder.
        out: folder for the images; one that was begun with the same settings is continued.
        num: number of images.
        label: one class, by name or index; by default all classes in turn.
        seed: with an image's index it determines the image's noise.
        solver: euler, heun, midpoint, rk4, ab2, dpmpp-2m, dpmpp-3m, unipc, sde-dpmpp-2m, or adaptive=TOLERANCE.
        grid: where the steps lie: uniform, shifted=3, logit=3, karras=7.
        steps: steps of the time grid; heun evaluates the model 2 steps - 1 times.
        scale: guidance scale, 1 is none; by default the paper's 2.9, or 1 for an unconditional model.
        interval: guidance applies where low < t < high.
        guidance: cfg, cfg-zero, apg or auto, with options such as cfg:schedule=linear or apg:eta=0.5,momentum=0.
        guide: for guidance auto, the run or checkpoint of a smaller or less trained model of the same latents.
        weights: ema (the first average), model, or the decay of an average.
        batch_size: images at once.
        device: where the network runs: cpu, cuda, mps.
        decoder: another autoencoder for the same latents, such as flux2-small-decoder for those of flux2.
        json: print the settings and counts as JSON instead of the folder.
    """
    if num < 1:
        raise ValueError(f"num must be at least 1, got {num}")
    generator = load(source, weights, device, decoder)
    classes = generator.model.config.num_classes
    labels = balanced_labels(num, classes) if label is None else torch.full((num,), generator.label(label))
    samples = generate(
        generator, labels, out, seed=seed, solver=solver, grid=grid, steps=steps,
        scale=default_scale(classes) if scale is None else scale,
        interval=interval, guidance=guidance, guide=None if guide is None else load(guide, device=device),
        batch_size=batch_size,
    )  # fmt: skip
    for i, image in enumerate(samples.images):
        write_image(out / f"{i:06d}.png", Image.fromarray(image.permute(1, 2, 0).squeeze(2).numpy()))
    write_image(out / "grid.png", plots.grid(samples.images[:100], columns=10))
    print(json_module.dumps(files.read_json(out / "samples.json")) if json else out)


def write_image(path: Path, image: Image.Image) -> None:
    """Write a PNG file, whole or not at all."""
    with files.replaced(path) as temporary:
        image.save(temporary, format="PNG")
