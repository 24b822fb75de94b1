"""`jlt export RUN OUT`."""

from pathlib import Path
from typing import Annotated

import tyro

from jlt.experiments.export import export


def run(
    source: Annotated[Path, tyro.conf.arg(name="run"), tyro.conf.Positional],
    out: Annotated[Path, tyro.conf.Positional],
    *,
    to: str,
    weights: str = "ema",
) -> None:
    """Write a run for other programs: a pipeline of diffusers, or its denoiser alone for ONNX or torch.export.

    Args:
        source: a run folder (its last checkpoint), a checkpoint folder, or ORG/NAME of the Hub.
        out: a new folder.
        to: diffusers, onnx, or torch.
        weights: ema (the first average), model, the decay of an average, or power=LENGTH of a power average.
    """
    print(export(source, out, to, weights))
