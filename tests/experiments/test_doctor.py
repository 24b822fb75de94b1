"""The doctor: findings are what the checks say, and the rehearsal is a real training."""

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
