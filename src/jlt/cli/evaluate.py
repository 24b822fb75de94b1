"""`jlt evaluate RUN LATENTS`."""

from pathlib import Path
from typing import Annotated

import tyro

from jlt.evaluation import records
from jlt.experiments.evaluate import Sampling, evaluate
from jlt.experiments.report import text_table


def run(
    source: Annotated[Path, tyro.conf.arg(name="run"), tyro.conf.Positional],
    latents: Annotated[Path, tyro.conf.Positional],
    sampling: Annotated[Sampling, tyro.conf.arg(name="")] = Sampling(),  # noqa: B008
    *,
    extractor: str = "efficientnet-lite0",
    out: Path | None = None,
    json: bool = False,
) -> None:
    """Measure a run's images against held-out real images, beside real training images measured in the same way.

    Writes a record and a grid of the images; `jlt report` makes a page of them.

    Args:
        source: a run folder (its last checkpoint) or a checkpoint folder.
        latents: the folder of latents it was trained on, with a held-out split; its source gives the real images.
        sampling: how images are made.
        extractor: features that distances are taken on: efficientnet-lite0, or pixels.
        out: folder for the record and the picture; by default `evaluation` in the run folder.
        json: print the record as JSON.
    """
    path = evaluate(source, latents, out or source / "evaluation", sampling, extractor)
    print(path.read_text() if json else f"{text_table(records.read(path))}\n\n{path}")
