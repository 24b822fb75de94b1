"""The doctor: findings are what the checks say, and the rehearsal is a real training."""

import importlib.metadata
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from jlt.data import open_latents
from jlt.experiments import doctor
from jlt.experiments.presets import PRESETS, Expected


def test_what_a_check_raises_is_its_finding() -> None:
    def broken() -> str:
        raise RuntimeError("driver\nis too old")

    assert doctor.examine("a", broken) == doctor.Finding("a", False, "RuntimeError: driver is too old")
    assert doctor.examine("b", lambda: "not run: there is one GPU").good is None
    assert doctor.examine("c", lambda: "fine").good is True


def test_extras_that_lack_a_package_are_named_with_it(monkeypatch: pytest.MonkeyPatch) -> None:
    lines = [
        "torch>=2.6", "numpy>=1; extra == 'one'", 'jlt-absent>=2,<3; extra == "two"', "jlt[one,two]; extra == 'all'",
    ]  # fmt: skip
    assert [doctor.missing(extra, lines) for extra in ("one", "two", "all")] == [[], ["jlt-absent"], ["jlt-absent"]]
    monkeypatch.setattr(doctor, "EXTRAS", ("one", "two"))
    monkeypatch.setattr(importlib.metadata, "requires", lambda name: lines)
    assert doctor.extras() == "one; two lacks jlt-absent"


def test_weights_are_told_where_they_are_and_where_they_would_be(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setenv("JLT_HOME", str(tmp_path))
    inception = tmp_path / "hub" / "checkpoints" / "weights-inception-2015-12-05-6726825d.pth"
    flux2 = "black-forest-labs/FLUX.2-klein-4B/vae/diffusion_pytorch_model.safetensors"
    assert f"Inception (FID) not in {inception}" in doctor.weights()
    assert f"flux2 not in {tmp_path / 'autoencoders' / flux2}" in doctor.weights()
    inception.parent.mkdir(parents=True)
    inception.touch()
    assert f"Inception (FID) in {inception}" in doctor.weights()
    assert "EfficientNet-Lite0 in " in doctor.weights()


def test_synthetic_latents_are_what_a_preset_expects(tmp_path: Path) -> None:
    expected = PRESETS["jlt-b-1"].expected
    doctor.synthetic_latents(tmp_path, expected, 4)
    latents = open_latents(tmp_path, verify=True)
    assert latents.shape == expected.shape
    assert latents.num_classes == 1000
    mean, variance = latents.statistics()
    spread = (4 * 16 * 16) ** -0.5  # a channel's mean has this deviation, its variance sqrt(2) of it
    assert mean.abs().max() < 5 * spread
    assert (variance - 1).abs().max() < 5 * 2**0.5 * spread


def test_a_rehearsal_trains_saves_resumes_and_leaves_nothing(tmp_path: Path) -> None:
    config = replace(PRESETS["digits"].config, size="1x32x2", held_out_every=0)
    told = doctor.rehearse(config, Expected((4, 4, 4), 3, 100), tmp_path, "cpu", steps=6, micro_batch_size=2)
    assert told.startswith("JLT-1x32/1, 6 steps of 2 images on cpu in float32, saved and resumed after 2: ")
    assert not list(tmp_path.iterdir())


def test_two_processes_agree_and_fsdp_equals_the_plain_step() -> None:
    assert doctor.collectives(torch.device("cpu")).startswith("2 processes over gloo")


@pytest.mark.slow
def test_a_compiled_network_agrees_with_the_plain_one() -> None:
    assert "agrees" in doctor.compiled(torch.device("cpu"))
