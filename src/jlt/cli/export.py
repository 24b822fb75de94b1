"""`jlt export RUN OUT`."""

from jlt.cli.places import OutPath, RunPath
from jlt.experiments.export import export


def run(
    source: RunPath,
    out: OutPath,
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
