import json

import numpy as np
import pytest
from PIL import Image

from jlt.cli import main
from jlt.data import open_latents


@pytest.fixture
def photos(tmp_path):
    """Two classes of three random 8 x 8 images each."""
    generator = np.random.default_rng(0)
    for name in ("cat", "dog"):
        (tmp_path / "photos" / name).mkdir(parents=True)
        for i in range(3):
            pixels = generator.integers(0, 256, (8, 8, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / "photos" / name / f"{i}.png")
    return tmp_path / "photos"


def test_encode_prints_the_folder_it_made(photos, tmp_path, capsys):
    out = tmp_path / "latents"
    assert main(["encode", str(photos), str(out), "--image-size", "8"]) == 0
    told = capsys.readouterr().out.splitlines()
    assert told[-1] == str(out)
    assert told[0].startswith("6 images: 2.3e-06 GB of latents (48, 2, 2), ")  # 6 x 48 x 2 x 2 numbers of 2 bytes
    assert len(open_latents(out)) == 6


def test_encode_prints_a_summary_for_machines(photos, tmp_path, capsys):
    out = tmp_path / "latents"
    arguments = ["encode", str(photos), str(out), "--image-size", "8", "--num-held-out", "2", "--json"]
    assert main(arguments) == 0
    summary = json.loads(capsys.readouterr().out)
    assert summary["images"] == 6
    assert summary["splits"] == {"train": 4, "held-out": 2}
    assert summary["shape"] == [48, 2, 2]
    assert summary["classes"] == 2
    assert summary["bytes"] == sum(file.stat().st_size for file in out.rglob("*") if file.is_file())


def test_every_option_of_encode_has_help(capsys):
    assert main(["encode", "--help"]) == 0
    shown = capsys.readouterr().out
    for option in ("--stride", "--channels", "--num-held-out", "--normalise", "--mirrored", "--skip-broken", "--json"):
        assert option in shown


def test_broken_images_are_left_out_and_counted_when_asked(photos, tmp_path, capsys):
    (photos / "cat" / "1.png").write_bytes(b"not an image")
    out = tmp_path / "latents"
    assert main(["encode", str(photos), str(out), "--image-size", "8", "--skip-broken"]) == 0
    assert "1 images cannot be decoded" in capsys.readouterr().out
    assert len(open_latents(out)) == 5
    assert "1.png" in (out / "skipped.json").read_text()
