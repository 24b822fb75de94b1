"""The examples: short, their commands are understood, and the notebooks run."""

import json
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.test_docs import commands, understood

from jlt.flow import TARGETS
from jlt.sampling import SOLVERS

EXAMPLES = Path(__file__).parents[1] / "examples"
SCRIPTS, NOTEBOOKS = sorted(EXAMPLES.glob("*.sh")), sorted(EXAMPLES.glob("*.ipynb"))
FULL, TINY = 'steps, size = 600, "4x128x4"', 'steps, size = 2, "1x32x2"'


def cells(path: Path) -> list[str]:
    """Return the code of a notebook's cells, with a training of two steps."""
    sources = ["".join(cell["source"]) for cell in read(path) if cell["cell_type"] == "code"]
    assert sum(FULL in source for source in sources) == 1
    return [source.replace(FULL, TINY) for source in sources]


def read(path: Path) -> list[dict[str, Any]]:
    return json.loads(path.read_text())["cells"]


def test_an_example_has_at_most_a_hundred_lines_and_a_notebook_no_outputs() -> None:
    assert len(SCRIPTS) >= 3
    assert len(NOTEBOOKS) == 2
    for path in (*SCRIPTS, *EXAMPLES.glob("*.py")):
        assert len(path.read_text().splitlines()) <= 100, path
    for path in NOTEBOOKS:
        assert sum(len(cell["source"]) for cell in read(path)) <= 100
        assert not any(cell.get("outputs") or cell.get("execution_count") for cell in read(path))


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_the_commands_of_a_script_are_understood(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    subprocess.run(["bash", "-n", path], check=True)
    found = commands(f"```bash\n{path.read_text()}```")
    assert len(found) == sum(line.startswith("jlt ") for line in path.read_text().splitlines()) >= 4
    for command in found:
        understood(command, monkeypatch)


@pytest.fixture
def added() -> Iterator[None]:
    """Take out again what an example adds to a table."""
    kept = [(table, dict(table)) for table in (TARGETS, SOLVERS)]
    yield
    for table, before in kept:
        table.clear()
        table.update(before)


def run(name: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    monkeypatch.chdir(folder)
    names: dict[str, Any] = {}
    for source in cells(EXAMPLES / name):
        exec(source, names)
    return names


@pytest.mark.usefixtures("added")
def test_the_target_of_the_example_trains_and_samples_beside_x(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    images = run("target.ipynb", tmp_path, monkeypatch)["images"]
    assert {name: made.shape for name, made in images.items()} == dict.fromkeys(("x", "late-v"), (10, 1, 32, 32))
    config = json.loads((tmp_path / "own-target" / "late-v" / "config.json").read_text())
    assert config["target"] == "late-v"


@pytest.mark.usefixtures("added")
def test_the_solver_of_the_example_is_of_order_two_and_samples(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = run("solver.ipynb", tmp_path, monkeypatch)
    assert names["ratios"] == pytest.approx([4, 4, 4], rel=0.1)  # 4 in the limit; the rest of order 1 / steps
    assert names["samples"].evaluations == 12 == SOLVERS["ralston-2"].evaluations(6)
    assert torch.isfinite(names["samples"].images.float()).all()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of the kernel's own libraries
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.name)
def test_a_notebook_runs_in_a_kernel_and_shows_its_pictures(path: Path, tmp_path: Path) -> None:
    import nbclient
    import nbformat

    text = path.read_text().replace(json.dumps(FULL)[1:-1], json.dumps(TINY)[1:-1])
    notebook = nbformat.reads(text, as_version=4)
    nbclient.NotebookClient(notebook, resources={"metadata": {"path": str(tmp_path)}}, timeout=300).execute()
    shown = [output.get("data", {}) for cell in notebook.cells for output in cell.get("outputs", [])]
    assert any("image/png" in data for data in shown)
