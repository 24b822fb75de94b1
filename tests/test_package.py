"""The package: it builds, installs with what it promises, and keeps its rooms in order."""

import ast
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

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


@pytest.mark.slow
def test_the_wheel_builds_installs_and_runs(tmp_path: Path) -> None:
    pip = [sys.executable, "-m", "pip", "--quiet"]
    subprocess.run([*pip, "wheel", "--no-deps", "--wheel-dir", str(tmp_path), str(ROOT)], check=True)
    (wheel,) = tmp_path.glob("jlt-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    assert {"jlt/py.typed", "jlt/data/imagenet_classes.txt", "jlt/experiments/curves.json"} <= set(names)
    assert not [name for name in names if name.startswith(("tests", "golden"))]
    subprocess.run([*pip, "install", "--no-deps", "--target", str(tmp_path / "site"), str(wheel)], check=True)
    program = "import jlt, sys; assert 'site' in jlt.__file__; from jlt.cli import main; sys.exit(main(['--help']))"
    done = subprocess.run(
        [sys.executable, "-c", program], env={"PYTHONPATH": str(tmp_path / "site")}, cwd=tmp_path, check=True,
        capture_output=True, text=True,
    )  # fmt: skip
    assert "quickstart" in done.stdout
