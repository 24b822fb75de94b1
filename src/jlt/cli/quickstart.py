"""`jlt quickstart`."""

from pathlib import Path

from jlt.evaluation import records
from jlt.experiments.quickstart import quickstart


def run(*, out: Path = Path("quickstart"), seed: int = 0) -> None:
    """Train, sample and compare two models on 5,000 real digits, and write a report; about four minutes on two cores.

    Args:
        out: folder for latents, runs, pictures, record and report; a stopped quickstart goes on there.
        seed: of weights, data order, training noise and sampling noise.
    """
    report = quickstart(out, seed)
    record = records.read(out / "record.json")
    for part in record.parts:
        print(f"\n{part.name}")
        for name, value in part.values.items():
            print(f"  {name:<28}{value}")
    print("\nreal against real")
    for name, value in record.values.items():
        if name.startswith("real against real: "):
            print(f"  {name.removeprefix('real against real: '):<28}{value}")
    print(f"\n{report.resolve()}")
