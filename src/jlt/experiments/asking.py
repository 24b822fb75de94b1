"""How images are asked for: the options that commands share, the labels, and the seeds."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
import tyro
from jaxtyping import Int
from torch import Tensor

from jlt.sampling import Making, default_scale, load


@dataclass(frozen=True)
class How:
    """How images are made, as every command asks for it.

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

    def making(self, num_classes: int, device: str | torch.device = "cpu", compile: bool = False) -> Making:
        """Return how a model of so many classes makes images, the guide opened as it is.

        A scale asked for on an unconditional model is refused where it is used.
        """
        return Making(
            seed=self.seed,
            solver=self.solver,
            grid=self.grid,
            steps=self.steps,
            scale=default_scale(num_classes) if self.scale is None else self.scale,
            interval=self.interval,
            guidance=self.guidance,
            guide=None if self.guide is None else load(self.guide, device=device, compile=compile),
        )


@dataclass(frozen=True)
class Sampling(How):
    """How a run is sampled to be measured.

    Attributes:
        num_images: images a run, their labels in turn over the classes; --num for short.
        batch_size: images at once.
    """

    num_images: Annotated[int, tyro.conf.arg(aliases=("--num",))] = 500
    batch_size: int = Making.batch_size

    def __post_init__(self) -> None:
        if self.num_images < 2:
            raise ValueError(f"num_images must be at least 2, got {self.num_images}")

    def making(self, num_classes: int, device: str | torch.device = "cpu", compile: bool = False) -> Making:
        return dataclasses.replace(super().making(num_classes, device, compile), batch_size=self.batch_size)


def balanced_labels(count: int, num_classes: int) -> Int[Tensor, " n"]:
    """Return the classes in turn; for an unconditional model, zeros."""
    return torch.arange(count) % max(num_classes, 1)


def by_seed(sampling: Sampling, seeds: Sequence[int], out: Path) -> list[tuple[Sampling, Path]]:
    """Return how images are made for each seed, and the folder that they are kept in."""
    if len(set(seeds)) < len(seeds):
        raise ValueError(f"seeds must differ, got {', '.join(map(str, seeds))}")
    if len(seeds) < 2:
        return [(dataclasses.replace(sampling, seed=seeds[0] if seeds else sampling.seed), out / "samples")]
    return [(dataclasses.replace(sampling, seed=seed), out / f"samples-seed-{seed}") for seed in seeds]
