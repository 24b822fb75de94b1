"""`jlt train PRESET LATENTS RUN`."""

from pathlib import Path
from typing import Annotated

import tyro

from jlt.experiments.presets import PAPER
from jlt.experiments.presets import PRESETS as PRESETS
from jlt.training import TrainConfig, train


def run(
    latents: Annotated[Path, tyro.conf.Positional],
    out: Annotated[Path, tyro.conf.arg(name="run"), tyro.conf.Positional],
    config: Annotated[TrainConfig, tyro.conf.arg(name="")] = PAPER,
    *,
    device: str = "cpu",
) -> None:
    """Train a Transformer on latents; the same command again resumes where it stopped.

    The first argument names a preset, whose settings are the defaults of the options below.

    Args:
        latents: folder made by `jlt encode`.
        out: folder of the run.
        config: the recipe.
        device: where the network runs: cpu, cuda, mps.
    """
    print(train(config, latents, out, device=device))
