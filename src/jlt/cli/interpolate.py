"""`jlt interpolate RUN OUT`."""

from pathlib import Path
from typing import Annotated

import torch
import tyro

from jlt import files
from jlt.experiments import plots
from jlt.sampling import default_scale, load, slerp


def run(
    source: Annotated[Path, tyro.conf.arg(name="run"), tyro.conf.Positional],
    out: Annotated[Path, tyro.conf.Positional],
    *,
    first: int = 0,
    second: int = 1,
    num: int = 8,
    label: str = "0",
    seed: int = 0,
    solver: str = "heun",
    grid: str = "uniform",
    steps: int = 50,
    scale: float | None = None,
    interval: tuple[float, float] = (0.1, 1.0),
    weights: str = "ema",
    device: str = "cpu",
) -> None:
    """Draw OUT/interpolate.png: images of one class from the noises on the arc between those of two images.

    Args:
        source: a run folder (its last checkpoint) or a checkpoint folder.
        out: folder for the picture.
        first: index of the left image's noise, as in `jlt sample` with the same seed.
        second: index of the right image's noise.
        num: number of images, both ends included.
        label: the class, by name or index.
        seed: with an image's index it determines the image's noise.
        solver: as in `jlt sample`; one that draws no noise, or neighbours differ.
        grid: where the steps lie: uniform, shifted=3, logit=3, karras=7.
        steps: steps of the time grid.
        scale: guidance scale, 1 is none; by default the paper's 2.9, or 1 for an unconditional model.
        interval: guidance applies where low < t < high.
        weights: ema (the first average), model, or the decay of an average.
        device: where the network runs: cpu, cuda, mps.
    """
    if num < 2:
        raise ValueError(f"num must be at least 2, got {num}")
    if min(first, second) < 0:
        raise ValueError(f"first and second must be at least 0, got {first} and {second}")
    generator = load(source, weights, device)
    classes = generator.model.config.num_classes
    a, b = generator.noise(seed, torch.tensor([first, second]))
    noise = torch.stack([slerp(a, b, i / (num - 1)) for i in range(num)])
    labels = torch.full((num,), generator.label(label) if classes else 0)
    samples = generator.sample(
        labels, noise=noise, solver=solver, grid=grid, steps=steps, interval=interval, seed=seed,
        scale=default_scale(classes) if scale is None else scale, batch_size=num,
    )  # fmt: skip
    with files.replaced(out / "interpolate.png") as temporary:
        plots.grid(samples.images, columns=num).save(temporary, format="PNG")
    print(out / "interpolate.png")
