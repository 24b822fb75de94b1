"""The paper's own system at its own size, on a CPU: FLUX.2's autoencoder (random weights), photographs, JLT-B/1."""

import importlib.util
import resource
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

from jlt.nn import checkpoint

LIMIT = 16 * 2**30  # bytes


def jlt(*arguments: object) -> str:
    done = subprocess.run([sys.executable, "-m", "jlt", *map(str, arguments)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture
def photographs(tmp_path: Path) -> Path:
    """Four of the 20 ImageNet photographs in the package foolbox, in two folders with WordNet ids."""
    package = importlib.util.find_spec("foolbox")
    assert package is not None
    assert package.origin is not None
    found = sorted((Path(package.origin).parent / "data").glob("imagenet_*.jpg"))
    assert len(found) == 20
    for k, path in enumerate(found[:4]):
        folder = tmp_path / "train" / ("n01440764", "n01443537")[k % 2]
        folder.mkdir(parents=True, exist_ok=True)
        (folder / path.name).write_bytes(path.read_bytes())
    return tmp_path / "train"


@pytest.fixture
def autoencoder(tmp_path: Path) -> Path:
    """FLUX.2's autoencoder of 84.0 M parameters, as diffusers builds and saves it, with random weights."""
    from diffusers import AutoencoderKLFlux2

    torch.manual_seed(0)
    made = AutoencoderKLFlux2()
    assert sum(p.numel() for p in made.parameters()) == 84_046_115
    made.save_pretrained(tmp_path / "vae")
    return tmp_path / "vae"


@pytest.mark.slow
def test_photographs_go_through_the_papers_system_at_full_size(
    photographs: Path, autoencoder: Path, tmp_path: Path
) -> None:
    latents, run = tmp_path / "latents", tmp_path / "run"
    representation = f"autoencoder:{autoencoder}"
    jlt("encode", photographs, latents, "--representation", representation, "--mirrored", "--batch-size", 2)
    # one image a step: few CPUs have instructions for bfloat16, and without them a step takes minutes
    recipe = ["train", "jlt-b-1", latents, run, "--batch-size", 1, "--warmup-steps", 0, "--held-out-every", 0]
    jlt(*recipe, "--steps", 1)
    first = checkpoint.read(run).tensors("model")
    jlt(*recipe, "--steps", 2)  # resumes
    saved = checkpoint.read(run)
    assert saved.step == 2
    assert sum(tensor.numel() for tensor in first.values()) == 130_508_672 - (1000 - 2) * 768  # two classes
    moved = {name for name, tensor in saved.tensors("model").items() if not torch.equal(tensor, first[name])}
    assert {"output.weight", "blocks.11.modulation.weight"} <= moved
    assert all(bool(torch.isfinite(tensor).all()) for tensor in saved.tensors("ema-0.9999").values())
    jlt("sample", run, tmp_path / "samples", "--num", 2, "--steps", 2, "--scale", 2.9)
    with Image.open(tmp_path / "samples" / "000001.png") as image:
        assert image.size == (256, 256)
        assert len(image.getcolors(2**16) or range(2**16)) > 100  # a picture, if of nothing
    assert "no channels are off" in jlt("latents", "check", latents)
    # the largest of the processes above, in KiB on Linux
    assert resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024 < LIMIT
