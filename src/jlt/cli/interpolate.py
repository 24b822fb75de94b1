"""`jlt interpolate RUN OUT`."""

from dataclasses import replace
from typing import Annotated

import torch
import tyro

from jlt.cli.places import OutPath, RunPath
from jlt.cli.sample import Opened
from jlt.experiments import plots
from jlt.sampling import slerp


def run(
    source: RunPath,
    out: OutPath,
    making: Annotated[Opened, tyro.conf.arg(name="")] = Opened(),  # noqa: B008
    *,
    first: int = 0,
    second: int = 1,
    num: int = 8,
    label: str | None = None,
) -> None:
    """Draw OUT/interpolate.png: images of one class from the noises on the arc between those of two images.

    Args:
        source: a run folder (its last checkpoint), a checkpoint folder, or ORG/NAME of the Hub.
        out: folder for the picture.
        making: how images are made; with a solver that draws noise neighbours differ.
        first: index of the left image's noise, as in `jlt sample` with the same seed.
        second: index of the right image's noise.
        num: number of images, both ends included.
        label: the class, by name or index; by default the first.
    """
    if num < 2:
        raise ValueError(f"num must be at least 2, got {num}")
    if min(first, second) < 0:
        raise ValueError(f"first and second must be at least 0, got {first} and {second}")
    generator, how = making.open(source)
    a, b = generator.noise(making.seed, torch.tensor([first, second]))
    noise = torch.stack([slerp(a, b, i / (num - 1)) for i in range(num)])
    labels = torch.full((num,), 0 if label is None else generator.label(label))
    samples = generator.sample(labels, noise=noise, **vars(replace(how, batch_size=num)))
    plots.save(out / "interpolate.png", plots.grid(samples.images, columns=num))
    print(out / "interpolate.png")
