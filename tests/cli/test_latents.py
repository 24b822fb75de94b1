import json

import numpy as np
import pytest
from PIL import Image

from jlt.cli import main
from jlt.data import encode
from jlt.data.shards import VARIANCE_BOUND


@pytest.fixture
def latents(tmp_path):
    """Latents of 80 random 8 x 8 images, 16 of them held out."""
    generator = np.random.default_rng(0)
    (tmp_path / "photos").mkdir()
    for i in range(80):
        pixels = generator.integers(0, 256, (8, 8, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / "photos" / f"{i:02}.png")
    folder = tmp_path / "latents"
    encode(f"folder:{tmp_path / 'photos'}", folder, image_size=8, num_held_out=16, shard_size=32)
    return folder


def change_manifest(folder, **changes):
    path = folder / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_check_passes_what_encode_made(latents, capsys):
    assert main(["latents", "check", str(latents)]) == 0
    shown = capsys.readouterr().out
    assert "train: 64 latents" in shown
    assert "held-out: 16 latents" in shown
    assert "no channels are off" in shown


def test_check_finds_one_channel_off_that_opening_overlooks(latents, capsys):
    variance = json.loads((latents / "held-out" / "manifest.json").read_text())["variance"]
    variance[3] /= 2 * VARIANCE_BOUND  # of 48 channels, and opening judges their mean
    change_manifest(latents / "held-out", variance=variance)
    assert main(["latents", "check", str(latents)]) == 1
    shown = capsys.readouterr().out
    assert [line.split()[0] for line in shown.splitlines() if line.endswith("  off")] == ["3"]


def test_check_finds_a_flipped_bit(latents, capsys):
    shard = latents / "train" / "shard-00001.safetensors"
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(data)
    assert main(["latents", "check", str(latents)]) == 2
    complaint = capsys.readouterr().err
    assert complaint.count("\n") == 1
    assert "shard-00001" in complaint


def test_show_draws_images_their_reconstructions_and_the_difference(latents, tmp_path, capsys):
    pytest.importorskip("jlt.experiments.plots")
    picture = tmp_path / "shown.png"
    assert main(["latents", "show", str(latents), "--out", str(picture), "--num", "4"]) == 0
    with Image.open(picture) as image:
        width, height = image.size
    assert width / height == pytest.approx(4 / 3, abs=0.02)  # gaps between the tiles
    shown = capsys.readouterr().out
    assert "4 of 64 images" in shown
    assert shown.endswith(f"{picture}\n")


def test_show_asks_for_a_split_that_exists(latents, capsys):
    pytest.importorskip("jlt.experiments.plots")
    assert main(["latents", "show", str(latents), "--split", "held-ou"]) == 2
    assert "did you mean 'held-out'?" in capsys.readouterr().err
