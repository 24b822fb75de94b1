"""`jlt train PRESET LATENTS RUN`."""

from pathlib import Path
from typing import Annotated

import tyro

from jlt.experiments.presets import PAPER, PRESETS
from jlt.training import TrainConfig, train

PRESETS = PRESETS  # the first argument names one; its settings are the defaults of `config`


def run(
    latents: Annotated[Path, tyro.conf.Positional],
    out: Annotated[Path, tyro.conf.Positional],
    config: Annotated[TrainConfig, tyro.conf.arg(name="")] = PAPER,
    *,
    device: str = "cpu",
) -> None:
    """Train a Transformer on latents; the same command again resumes where it stopped.

    The first argument names a preset, whose settings are the defaults of the options below: jlt-b-1 (the paper's),
    jlt-b-1-xmse, dit-b-1, small, digits.

    Args:
        latents: folder made by `jlt encode`.
        out: folder of the run.
        config: the recipe.
        device: where the network runs: cpu, cuda, mps.
    """
    print(train(config, latents, out, device=device))
