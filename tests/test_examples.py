"""The examples: short, their commands are understood, and all of them run."""

import itertools
import json
import math
import os
import runpy
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
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


@pytest.mark.parametrize(
    ("name", "rows", "beside"), [("manifold", 4, []), ("mixture", 10, ["fresh draws", "exact field"])]
)
def test_an_example_of_known_answer_measures_every_target_and_draws_it(
    name: str, rows: int, beside: list[str], tmp_path: Path
) -> None:
    found = runpy.run_path(str(EXAMPLES / f"{name}.py"))["main"](tmp_path / "picture.png", steps=2, count=20)
    assert {line: len(values) for line, values in found.items()} == dict.fromkeys(["x", "eps", "v", *beside], rows)
    assert all(math.isfinite(value) for values in found.values() for value in values)
    with Image.open(tmp_path / "picture.png") as picture:
        assert picture.width > 500


@pytest.mark.slow
def test_only_x_stays_near_the_manifold_where_its_dimensions_exceed_the_width(tmp_path: Path) -> None:
    names = runpy.run_path(str(EXAMPLES / "manifold.py"))
    names["main"].__globals__["DIMENSIONS"] = (2, 512)
    found = names["main"](tmp_path / "picture.png", steps=400, count=200)
    assert found["x"][1] < 0.3  # 0.07 after 800 steps
    # a rank of 256 leaves noise of deviation 1 in 256 directions of v: a distance of 16, however long it trains
    assert found["v"][1] > 15
    assert found["eps"][1] > 15


@pytest.mark.slow
def test_the_closed_form_of_the_mixture_is_a_floor_that_training_comes_near(tmp_path: Path) -> None:
    found = runpy.run_path(str(EXAMPLES / "mixture.py"))["main"](tmp_path / "picture.png", steps=1000)
    *errors, distance = found["x"]
    assert max(errors) < 0.05  # of a variance of 1: the mean of x alone would err by as much at t = 0
    assert 0.02 < distance < 0.2  # 0.026 for other draws of the mixture


SMALLER = """#!{python}
import sys
from jlt.cli import main

TRAINING = ["--size", "1x32x2", "--steps", "4", "--batch-size", "4", "--warmup-steps", "1", "--save-every", "4"]
SAMPLING = ["--num-images", "10", "--steps", "2"]
MORE = {{
    "train": [*TRAINING, "--watch-images", "10", "--watch-steps", "2"],
    "sample": ["--steps", "2"],
    "evaluate": [*SAMPLING, "--extractor", "pixels"],
    "compare": [
        *(name.replace("--", "--base.") for name in TRAINING),
        *(name.replace("--", "--sampling.") for name in SAMPLING),
        "--extractor", "pixels",
    ],
}}
others = {{"200": "8", "2500": "8", "256": "64", "autoencoder:stabilityai/sd-vae-ft-mse": "autoencoder:{autoencoder}"}}
command, *arguments = (others.get(word, word) for word in sys.argv[1:])
sys.exit(main([command, *arguments, *MORE.get(command, [])]))
"""


@pytest.mark.slow
@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_a_script_runs_on_a_few_pictures(path: Path, tmp_path: Path) -> None:
    from diffusers import AutoencoderKL

    blocks = {
        f"{way}_block_types": (f"{kind}Block2D",) * 4 for way, kind in (("down", "DownEncoder"), ("up", "UpDecoder"))
    }
    AutoencoderKL(**blocks, block_out_channels=(8,) * 4, norm_num_groups=4).save_pretrained(tmp_path / "autoencoder")
    generator = np.random.default_rng(0)
    digits = generator.integers(0, 256, (60, 28, 28), dtype=np.uint8), np.arange(60, dtype=np.uint8) % 10
    (tmp_path / "pictures").mkdir()
    if "idx:" in path.read_text():
        for split, array in itertools.product(("train", "t10k"), digits):
            header = bytes([0, 0, 8, array.ndim]) + b"".join(size.to_bytes(4, "big") for size in array.shape)
            kind = f"{'images' if array.ndim == 3 else 'labels'}-idx{array.ndim}"
            (tmp_path / "pictures" / f"{split}-{kind}-ubyte").write_bytes(header + array.tobytes())
    for i in range(0 if "idx:" in path.read_text() else 40):
        (tmp_path / "pictures" / "ab"[i % 2]).mkdir(exist_ok=True)
        pixels = generator.integers(0, 256, (70, 80, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / "pictures" / "ab"[i % 2] / f"{i}.png")
    (shim := tmp_path / "bin" / "jlt").parent.mkdir()
    shim.write_text(SMALLER.format(python=sys.executable, autoencoder=tmp_path / "autoencoder"))
    shim.chmod(0o755)
    environment = os.environ | {"PATH": f"{shim.parent}:{os.environ['PATH']}"}
    command = ["bash", path, tmp_path / "pictures", tmp_path / "out"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert list((tmp_path / "out").rglob("report.html"))


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
