"""Every mean with its spread that a page states is that of a committed record, rounded as it stands there."""

import collections
import json
import re
from pathlib import Path

import pytest

from jlt.evaluation import records
from jlt.evaluation.records import mean_and_spread, over_seeds

ROOT = Path(__file__).parents[1]
RECORDS = ROOT / "docs" / "records"
PAGES = [page for page in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))) if " ± " in page.read_text()]
FIGURE = re.compile(r"(-?\d+(?:\.\d+)?)\s±\s(\d+(?:\.\d+)?)")


@pytest.fixture(scope="module")
def measured() -> list[tuple[float, float]]:
    """Return all means and spreads: those of records, and those over seeds of what has a record or a line a seed."""
    parts = (part for path in RECORDS.glob("*.json") for part in records.walk(records.read(path)))
    found = [value for part in parts for value in part.values.values()]
    runs = [records.read(path).parts for path in RECORDS.glob("quickstart-seed-*.json")]
    found += [
        value for same in zip(*runs, strict=True) for value in over_seeds([part.values for part in same]).values()
    ]
    lines: dict[str, list[float]] = collections.defaultdict(list)
    for line in (json.loads(line) for path in RECORDS.glob("*.jsonl") for line in path.read_text().splitlines()):
        what = {name: value for name, value in line.items() if name not in ("seed", "value", "seconds", "commit")}
        if "seed" in line:
            lines[json.dumps(what, sort_keys=True)].append(line["value"])
    found += map(mean_and_spread, lines.values())
    return [(value.value, value.spread or 0.0) for value in found if value.count > 1]


def rounded(text: str, value: float) -> bool:
    """Say whether a number's text is a value with as many decimals."""
    return text == f"{value:.{len(text.partition('.')[2])}f}"


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_a_mean_with_its_spread_is_that_of_a_record(page: Path, measured: list[tuple[float, float]]) -> None:
    stated = [match.groups() for match in FIGURE.finditer(page.read_text())]
    unknown = [
        f"{mean} ± {spread}"
        for mean, spread in stated
        if not any(rounded(mean, value) and rounded(spread, deviation) for value, deviation in measured)
    ]
    assert stated
    assert not unknown


def test_a_figure_that_no_record_has_would_be_found(measured: list[tuple[float, float]]) -> None:
    assert rounded("38.1", 38.14)
    assert not rounded("38.1", 38.16)
    assert not any(rounded("38.1", value) and rounded("9.9", deviation) for value, deviation in measured)
