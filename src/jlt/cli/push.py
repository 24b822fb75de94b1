"""`jlt push RUN REPOSITORY`."""

from pathlib import Path
from typing import Annotated

import tyro

from jlt.cli.places import RunPath
from jlt.experiments.publish import publish


def run(
    source: RunPath,
    repository: Annotated[str, tyro.conf.arg(metavar="ORG/NAME"), tyro.conf.Positional],
    *,
    weights: tuple[str, ...] = ("ema",),
    license: str | None = None,
    record: Path | None = None,
    private: bool = False,
    to: Path | None = None,
) -> None:
    """Upload a run to the Hugging Face Hub: weights, what decodes them, and a model card made from its record.

    `hf auth login` gives the client its token. `jlt.load("ORG/NAME")` opens what was uploaded, or the folder of --to.

    Args:
        source: a run folder (its last checkpoint), a checkpoint folder, or ORG/NAME of the Hub.
        repository: ORG/NAME, made if it is not there.
        weights: ema (the first average), model, or decays of averages; several are kept side by side.
        license: the Hub's name of a license for the card, such as apache-2.0.
        record: what an evaluation measured; by default RUN/evaluation/record.json, if it is there.
        private: make a new repository private.
        to: upload nothing; write what would be uploaded into this new folder.
    """
    print(publish(source, repository, weights, license, record, private, to))
