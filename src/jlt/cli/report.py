"""`jlt report`: a page to look at, made from a record."""

from pathlib import Path
from typing import Annotated

import tyro


def run(record: Annotated[Path, tyro.conf.Positional], out: Path | None = None) -> None:
    """Make a self-contained HTML page from a record and the pictures beside it; print its path last.

    Args:
        record: A record.json, or the folder that holds it.
        out: The page to write; report.html beside the record without it.
    """
    from jlt.experiments.report import write_report

    print(write_report(record, out))
