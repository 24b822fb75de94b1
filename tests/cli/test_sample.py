"""`jlt sample`: labels, formats and pictures of one small run."""

import json
import subprocess
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from safetensors.torch import load_file

from jlt.cli import main
from jlt.data import encode
from jlt.data.idx import Arrays
from jlt.training import TrainConfig, train


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    images = np.random.default_rng(0).integers(0, 256, (24, 3, 8, 8), dtype=np.uint8)
    encode(Arrays("mnist", images, np.arange(24) % 3, ("ant", "bee", "cat"), "test"), folder / "latents", stride=2)
    train(TrainConfig(size="1x16x1", steps=4, batch_size=4, ema_decays=(0.9, 0.5)), folder / "latents", folder / "run")
    return folder / "run"


def sample(run: Path, out: Path, *options: str) -> int:
    return main(["sample", str(run), str(out), "--num", "5", "--steps", "3", *options])


@pytest.mark.parametrize(("name", "files"), [
    ("png", {f"00000{i}.png" for i in range(5)}), ("tar", {"images.tar", "classes.txt"}), ("npz", {"images.npz"}),
])  # fmt: skip
def test_a_format_is_written_beside_the_stored_images(run: Path, tmp_path: Path, name: str, files: set[str]) -> None:
    assert sample(run, tmp_path / "out", "--format", name, "--batch-size", "2") == 0
    batches = {f"images-0000{k}.safetensors" for k in range(3)}
    assert {path.name for path in (tmp_path / "out").iterdir()} == files | batches | {"samples.json", "grid.png"}


def test_pictures_of_the_path_are_drawn(run: Path, tmp_path: Path) -> None:
    assert sample(run, tmp_path / "out", "--strip", "--gif", "--format", "npz", "--solver", "unipc") == 0
    with Image.open(tmp_path / "out" / "path.gif") as animation:
        assert animation.format == "GIF"
    with Image.open(tmp_path / "out" / "strip.png") as strip:
        assert strip.mode == "RGBA"
        assert strip.width < strip.height  # four columns, eight rows


def test_solver_grid_and_guidance_are_stated(run: Path, tmp_path: Path) -> None:
    options = ["--solver", "dpmpp-2m", "--grid", "shifted=2", "--guidance", "auto", "--guide", str(run), "--scale", "2"]
    assert sample(run, tmp_path / "out", *options, "--weights", "0.5", "--label", "bee") == 0
    stated = json.loads((tmp_path / "out" / "samples.json").read_text())
    assert (stated["solver"], stated["grid"], stated["guidance"]) == ("dpmpp-2m", "shifted=2", "auto")
    assert stated["labels"] == [1] * 5
    assert (stated["evaluations"], stated["network_passes"]) == (3, 5)
    assert stated["guide"][1] == "ema-0.9"


@pytest.mark.parametrize(("options", "message"), [
    (["--format", "zip"], "unknown format 'zip'"),
    (["--grid", "shifted=0"], "the value must be a number above 0, got '0'"),
    (["--guidance", "auto"], "guidance 'auto' needs a guide"),
    (["--solver", "heun=2"], "solver 'heun' takes no value, got '2'"),
])  # fmt: skip
def test_an_impossible_wish_is_one_line(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], options: list[str], message: str
) -> None:
    assert sample(run, tmp_path / "out", *options) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_latents_go_to_their_noise_and_back(run: Path, tmp_path: Path) -> None:
    latents = str(run.parent / "latents")
    options = ["--split", "train", "--num", "3", "--steps", "20", "--solver", "rk4"]
    assert main(["invert", str(run), latents, str(tmp_path), *options]) == 0
    found = json.loads((tmp_path / "invert.json").read_text())
    assert found["round_trip_rms"] < 0.1 * found["latent_rms"]
    assert found["evaluations_forth"] == 79
    assert (tmp_path / "invert.png").is_file()
    assert main(["invert", str(run), latents, str(tmp_path), "--split", "train", "--solver", "sde-dpmpp-2m"]) == 2


def test_images_between_two_are_drawn(run: Path, tmp_path: Path) -> None:
    assert main(["interpolate", str(run), str(tmp_path), "--num", "4", "--steps", "2", "--label", "bee"]) == 0
    with Image.open(tmp_path / "interpolate.png") as picture:
        assert picture.size == (4 * 64 + 3 * 2, 64)


RANKS = """
import sys
import torch
from jlt.cli import main
torch.set_num_threads(1)
sys.exit(max(forked(3, lambda rank: sys.exit(main(sys.argv[1:])))))
"""


def test_no_image_depends_on_the_number_of_processes(
    run: Path, tmp_path: Path, fork: Callable[..., subprocess.CompletedProcess[str]]
) -> None:
    options = ["--batch-size", "2"]  # 3 batches, and a stopped making has left the first
    assert sample(run, tmp_path / "one", *options) == 0
    (tmp_path / "many").mkdir()
    for name in ("samples.json", "images-00000.safetensors"):
        (tmp_path / "many" / name).write_bytes((tmp_path / "one" / name).read_bytes())
    done = fork(RANKS, "sample", run, tmp_path / "many", "--num", 5, "--steps", 3, *options)
    assert done.returncode == 0, done.stderr
    one, many = ({path.name: path for path in (tmp_path / name).iterdir()} for name in ("one", "many"))
    assert one.keys() == many.keys()
    for name in one:
        if name.endswith(".safetensors"):  # their headers tell how long each took
            first, second = load_file(one[name]), load_file(many[name])
            assert all((first[key] == second[key]).all() for key in ("images", "latents"))
        elif name.endswith(".png"):
            assert one[name].read_bytes() == many[name].read_bytes()


def test_a_batch_size_is_found_once_and_kept(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("jlt.sampling.memory.free_bytes", lambda device: 2**18)
    assert sample(run, tmp_path / "out", "--batch-size", "auto") == 0
    found = json.loads((tmp_path / "out" / "samples.json").read_text())["batch_size"]
    assert 1 <= found < 256
    monkeypatch.setattr("jlt.sampling.memory.free_bytes", lambda device: 2**30)
    assert sample(run, tmp_path / "out", "--batch-size", "auto") == 0  # another would be refused as other settings


@pytest.mark.parametrize("stated", ["{}", "[]", '{"batch_size": null}'])
def test_a_batch_size_is_not_looked_for_in_another_folders_file(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], stated: str
) -> None:
    (tmp_path / "samples.json").write_text(stated)
    assert sample(run, tmp_path, "--batch-size", "auto") == 2
    assert f"{tmp_path}" in capsys.readouterr().err
    assert (tmp_path / "samples.json").read_text() == stated


def test_images_of_four_channels_are_numbers_and_not_pictures(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    images = np.random.default_rng(0).integers(0, 256, (12, 4, 8, 8), dtype=np.uint8)
    encode(Arrays("mnist", images, np.arange(12) % 3, ("a", "b", "c"), "test"), tmp_path / "latents", stride=2)
    train(TrainConfig(size="1x16x1", steps=1, batch_size=4), tmp_path / "latents", tmp_path / "run")
    assert sample(tmp_path / "run", tmp_path / "out") == 2
    assert "images have 4 channels, pictures 1 or 3; --format npz takes any number" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    assert sample(tmp_path / "run", tmp_path / "out", "--format", "npz") == 0
    with np.load(tmp_path / "out" / "images.npz") as file:
        assert file["arr_0"].shape == (5, 8, 8, 4)
