"""The package: it builds, installs with what it promises, and keeps its rooms in order."""

import ast
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

ROOT = Path(__file__).parents[1]
ROOMS = ["flow", "nn", "data", "sampling", "training", "evaluation", "experiments", "cli"]
OPTIONAL = {
    "matplotlib",
    "mlxtend",
    "sklearn",
    "onnx",
    "onnxruntime",
    "efficientnet_lite_pytorch",
    "torch_fidelity",
    "gradio",
    "diffusers",
    "datasets",
    "fsspec",
    "huggingface_hub",
    "onnxscript",
    "pyarrow",
    "tensorboard",
    "transformers",
    "wandb",
}


def imports(tree: ast.AST) -> list[str]:
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            found += [f"{node.module}.{alias.name}" for alias in node.names]
    return found


@pytest.mark.parametrize("path", sorted((ROOT / "src" / "jlt").rglob("*.py")), ids=lambda p: str(p.relative_to(ROOT)))
def test_a_room_imports_only_from_the_rooms_before_it(path: Path) -> None:
    room = path.relative_to(ROOT / "src" / "jlt").parts[0]
    if room not in ROOMS:
        return  # jlt/__init__.py and jlt/files.py stand outside the rooms
    for name in imports(ast.parse(path.read_text())):
        parts = name.split(".")
        if parts[0] == "jlt" and len(parts) > 1 and parts[1] in ROOMS:
            assert ROOMS.index(parts[1]) <= ROOMS.index(room), f"{room} imports {name}"


@pytest.mark.parametrize("path", sorted((ROOT / "src" / "jlt").rglob("*.py")), ids=lambda p: str(p.relative_to(ROOT)))
def test_optional_packages_are_imported_only_where_they_are_used(path: Path) -> None:
    top = [node for node in ast.parse(path.read_text()).body if isinstance(node, ast.Import | ast.ImportFrom)]
    if path.relative_to(ROOT / "src" / "jlt") == Path("experiments", "pipeline.py"):
        return  # diffusers' loader imports it: its classes are made of diffusers' own
    used = {name.split(".")[0] for node in top for name in imports(node)}
    assert not used & OPTIONAL


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The wheel and the sdist."""
    folder = tmp_path_factory.mktemp("built")
    copy = folder / "copy"  # where no earlier build has left anything
    shutil.copytree(ROOT / "src", copy / "src", ignore=shutil.ignore_patterns("*.egg-info", "__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy / name)
    build = f"from setuptools.build_meta import *; build_sdist({str(folder)!r}); build_wheel({str(folder)!r})"
    subprocess.run([sys.executable, "-c", build], cwd=copy, check=True, capture_output=True)
    (wheel,), (sdist,) = folder.glob("jlt-*.whl"), folder.glob("jlt-*.tar.gz")
    return wheel, sdist


@pytest.mark.slow
def test_wheel_and_sdist_build_and_the_wheel_runs_with_the_core_packages_alone(
    built: tuple[Path, Path], tmp_path: Path
) -> None:
    wheel, sdist = built
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        (metadata,) = [name for name in names if name.endswith("METADATA")]
        required = re.findall(r"^Requires-Dist: ([\w-]+)[^;\n]*$", archive.read(metadata).decode(), re.MULTILINE)
    assert required == ["jaxtyping", "numpy", "pillow", "safetensors", "torch", "tqdm", "tyro"]
    assert {"jlt/py.typed", "jlt/data/imagenet_classes.txt", "jlt/experiments/curves.json"} <= set(names)
    assert not [name for name in names if name.startswith(("tests", "golden"))]
    with tarfile.open(sdist) as archive:
        assert {"pyproject.toml", "README.md", "LICENSE"} <= {name.split("/", 1)[-1] for name in archive.getnames()}
    pip = [sys.executable, "-m", "pip", "--quiet", "install", "--no-deps", "--target", str(tmp_path / "site")]
    subprocess.run([*pip, str(wheel)], check=True)
    done = subprocess.run(
        [sys.executable, "-c", CLEAN, *OPTIONAL, "torchvision"], env={"PYTHONPATH": str(tmp_path / "site")},
        cwd=tmp_path, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "quickstart" in done.stdout
    assert len(list((tmp_path / "samples").glob("0*.png"))) == 2
    assert "pip install 'jlt[evaluation]'" in done.stderr  # what is missing is one line


@pytest.mark.slow
def test_an_empty_environment_needs_the_wheel_alone_to_make_images(built: tuple[Path, Path], tmp_path: Path) -> None:
    subprocess.run([sys.executable, "-m", "venv", tmp_path / "venv"], check=True)
    program = tmp_path / "venv" / "bin"
    pip = [program / "python", "-m", "pip", "--quiet", "install", "-c", ROOT / "constraints.txt", built[0]]
    done = subprocess.run(pip, capture_output=True, text=True)
    if "No matching distribution" in done.stderr:
        pytest.skip(f"not run: no index has the packages: {done.stderr.strip().splitlines()[-1]}")
    assert done.returncode == 0, done.stderr
    found = (
        f"import importlib.util as u; print([name for name in {sorted(OPTIONAL - {'fsspec'})} if u.find_spec(name)])"
    )
    clean = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}

    def run(*command: str) -> str:
        done = subprocess.run(
            [program / command[0], *command[1:]], cwd=tmp_path, env=clean, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    assert run("python", "-c", found) == "[]\n"  # fsspec comes with PyTorch
    (tmp_path / "photos").mkdir()
    for k in range(12):
        pixels = np.random.default_rng(k).integers(0, 256, (32, 32, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / "photos" / f"{k:02d}.png")
    for command in (
        "encode photos latents --image-size 32 --stride 8 --num-held-out 4",
        "train small latents run --size 1x32x2 --steps 2 --batch-size 2",
        "sample run samples --num 2 --steps 2",
    ):
        run("jlt", *command.split())
    assert len(list((tmp_path / "samples").glob("0*.png"))) == 2
    assert "torch" in run("jlt", "doctor").lower()


CLEAN = """
import sys
from importlib.machinery import PathFinder

class Without:
    "Finds what is installed, but for the packages named on the command line."
    find_distributions = staticmethod(PathFinder.find_distributions)
    def find_spec(self, name, path=None, target=None):
        return None if name.split(".")[0] in sys.argv[1:] else PathFinder.find_spec(name, path, target)

sys.meta_path[sys.meta_path.index(PathFinder)] = Without()
import numpy as np
from PIL import Image
from pathlib import Path
import jlt
from jlt.cli import main

assert "site" in jlt.__file__
assert main(["--help"]) == 0
for k in range(12):
    Path("photos").mkdir(exist_ok=True)
    Image.fromarray(np.random.default_rng(k).integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(f"photos/{k:02d}.png")
assert main(["encode", "photos", "latents", "--image-size", "32", "--stride", "8", "--num-held-out", "4"]) == 0
assert main(["train", "small", "latents", "run", "--size", "1x32x2", "--steps", "2", "--batch-size", "2",
             "--held-out-every", "2"]) == 0
assert main(["sample", "run", "samples", "--num", "2", "--steps", "2"]) == 0
assert main(["evaluate", "run", "latents", "--num-images", "4", "--steps", "2"]) == 2
"""
