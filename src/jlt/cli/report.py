"""`jlt report`: a page to look at, made from a record."""

from pathlib import Path
from typing import Annotated

import tyro


def run(
    record: Annotated[Path, tyro.conf.arg(metavar="RECORD"), tyro.conf.Positional],
    out: Path | None = None,
    figures: Path | None = None,
) -> None:
    """Make a self-contained HTML page from a record and the pictures beside it; print its path last.

    Args:
        record: A record.json, or the folder that holds it.
        out: The page to write; report.html beside the record without it.
        figures: Folder to write the figures to as well, as PNG files, and the pictures beside each other.
    """
    from jlt.experiments.report import write_figures, write_report

    if figures is not None:
        for path in write_figures(record, figures):
            print(path)
    print(write_report(record, out))
