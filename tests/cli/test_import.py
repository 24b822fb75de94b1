"""The authors' release through the command line."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import jlt
from jlt.cli import main
from jlt.data import open_latents


@pytest.fixture
def theirs(tmp_path: Path) -> Path:
    """Two files as the authors write them: normalised latents of 128 channels in 16 bits."""
    generator, folder = torch.Generator().manual_seed(0), tmp_path / "theirs"
    folder.mkdir()
    for k in range(2):
        latents, flipped = torch.randn(2, 24, 128, 4, 4, generator=generator).half()
        tensors = {"latents": latents, "latents_flip": flipped, "labels": torch.arange(24) % 3}
        save_file(tensors, folder / f"latents_rank00_shard{k:03}.safetensors")
    return folder


def test_the_authors_latents_are_imported_and_trained_on(golden: Path, theirs: Path, tmp_path: Path, capsys) -> None:
    out, run = tmp_path / "latents", tmp_path / "run"
    autoencoder = f"autoencoder:{golden / 'flux2_vae' / 'vae'}"
    arguments = ["import", str(theirs), str(out), "--representation", autoencoder, "--num-held-out", "6"]
    assert main(arguments) == 0
    assert capsys.readouterr().out.splitlines()[-1] == str(out)
    latents = open_latents(out, verify=True)
    assert (len(latents), latents.shape, latents.num_classes) == (42, (128, 4, 4), 3)
    assert latents.manifest.mirrored
    assert main(arguments) == 0  # nothing is left to do
    recipe = ["--size", "1x32x2", "--steps", "1", "--batch-size", "4", "--dtype", "float32"]
    assert main(["train", "jlt-b-1", str(out), str(run), *recipe]) == 0
    assert jlt.load(run).sample([0], steps=1, progress=False).images.shape == (1, 3, 64, 64)  # by FLUX.2's decoder
    assert main(["evaluate", str(run), str(out), "--extractor", "pixels"]) == 2
    assert "was imported from latents" in capsys.readouterr().err


def test_an_authors_checkpoint_takes_representation_and_names_from_latents(
    golden: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from jlt.data import encode
    from jlt.data.idx import Arrays

    images = torch.randint(0, 256, (30, 16, 8, 8), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    source = Arrays("mnist", images.numpy(), (torch.arange(30) % 10).numpy(), tuple("abcdefghij"), "test")
    encode(source, tmp_path / "latents", representation="pixels")
    checkpoint = golden / "jlt_p1" / "checkpoint-last.pth"
    options = ["--latents", str(tmp_path / "latents"), "--latent-size", "8"]
    arguments = ["import", str(checkpoint), str(tmp_path / "out"), *options]
    assert main(arguments) == 0
    assert capsys.readouterr().out == f"{tmp_path / 'out'}\n"
    generator = jlt.load(tmp_path / "out", "0.9996")
    assert generator.class_names == tuple("abcdefghij")
    assert generator.header["origin"]["file"] == "checkpoint-last.pth"
    assert main(arguments) == 2
    assert "is not an empty folder" in capsys.readouterr().err


def test_a_file_that_is_not_there_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["import", str(tmp_path / "none.pth"), str(tmp_path / "out")]) == 2
    assert "none.pth is not there; a checkpoint's file or a folder of latents is wanted" in capsys.readouterr().err


def test_where_the_autoencoder_is_absent_one_line_says_what_to_put_where(
    golden: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("JLT_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert main(["import", str(golden / "jlt_p1" / "checkpoint-last.pth"), str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    folder = tmp_path / "home" / "autoencoders" / "black-forest-labs" / "FLUX.2-klein-4B" / "vae"
    source = "huggingface.co/black-forest-labs/FLUX.2-klein-4B"
    for part in ("config.json", "diffusion_pytorch_model.safetensors", source, str(folder)):
        assert part in error


def test_the_doctor_says_what_is_here(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(["doctor", "--folder", str(tmp_path), "--json"]) == 0
    found = {finding["check"]: finding for finding in json.loads(capsys.readouterr().out)}
    assert found.keys() == {"versions", "extras", "weights", "devices", "disk", "attention"}
    assert f"torch {torch.__version__}" in found["versions"]["told"]
    assert "math" in found["attention"]["told"]
    assert main(["doctor", "--train", "jlt-b-11"]) == 2
    assert "did you mean 'jlt-b-1'" in capsys.readouterr().err
