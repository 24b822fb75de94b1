"""`jlt quickstart`."""

from pathlib import Path

from jlt.evaluation import records
from jlt.experiments.quickstart import quickstart
from jlt.experiments.report import text_table


def run(*, out: Path = Path("quickstart"), seed: int = 0) -> None:
    """Train, sample and compare two models on 5,000 real digits, and write a report; about four minutes on two cores.

    Args:
        out: folder for latents, runs, pictures, record and report; a stopped quickstart goes on there.
        seed: of weights, data order, training noise and sampling noise.
    """
    report = quickstart(out, seed)
    print(f"\n{text_table(records.read(out / 'record.json'))}\n\n{report.resolve()}")
