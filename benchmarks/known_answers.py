"""The figures of "Two cases of known answer" in docs/ablation.md: both examples with seeds 0, 1 and 2, in six minutes.

    python benchmarks/known_answers.py

Writes docs/records/known-answers.json, and the pictures of seed 0 to docs/ablation.
"""

import runpy
from pathlib import Path

from jlt.evaluation import records
from jlt.evaluation.records import Record, Value, over_seeds

ROOT = Path(__file__).parents[1]
COMMAND = "python benchmarks/known_answers.py"
COLUMNS = {
    "manifold": [f"distance from the spiral, D = {dimension}" for dimension in (2, 8, 16, 512)],
    "mixture": [*(f"squared distance from E[x | z], t = 0.{k}" for k in range(1, 10)), "sliced distance"],
}
SEEDS = (2, 1, 0)  # the last picture is kept


def measure(example: str, columns: list[str]) -> list[Record]:
    """Run an example with each seed; return a record a line of its table."""
    run = runpy.run_path(str(ROOT / "examples" / f"{example}.py"))["main"]
    found = [run(ROOT / "docs" / "ablation" / f"{example}.png", seed=seed) for seed in SEEDS]
    return [
        Record(
            "known answer",
            f"{example}, {name}",
            over_seeds([dict(zip(columns, map(Value, each[name]), strict=True)) for each in found]),
            {"example": example, "seeds": sorted(SEEDS)},
            command=COMMAND,
        )
        for name in found[0]
    ]


def main() -> None:
    """Write the record."""
    parts = [part for example, columns in COLUMNS.items() for part in measure(example, columns)]
    record = Record("known answers", "Two cases of known answer", {}, {}, parts=tuple(parts), command=COMMAND)
    records.write(record, ROOT / "docs" / "records" / "known-answers.json")


if __name__ == "__main__":
    main()
