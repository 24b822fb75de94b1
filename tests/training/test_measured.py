"""Targets that the latents decide: measured once, stated by the run, resumed to the bit."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from tests.latents import encode_noise

from jlt.data import open_latents
from jlt.data.covariance import Sample, token_moments
from jlt.flow import TARGETS, capacity, convert, geometry, target
from jlt.flow.targets import CHANNELS
from jlt.nn import checkpoint
from jlt.sampling import load
from jlt.training import TrainConfig, measured, train
from jlt.training.measured import settle

CONFIG = TrainConfig(
    target=CHANNELS, loss_space=CHANNELS, size="1x16x2", steps=6, batch_size=6, warmup_steps=0, ema_decays=(0.9,),
    save_every=3, held_out_every=3,
)  # fmt: skip


@pytest.fixture(scope="module")
def latents(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return encode_noise(tmp_path_factory.mktemp("latents") / "latents")


def whole(folder: Path) -> torch.Tensor:
    data = open_latents(folder)
    return data.gather(torch.arange(len(data))).double()


def test_a_run_states_the_mean_squares_of_its_latents_channels(latents: Path, tmp_path: Path) -> None:
    opened = load(train(dataclasses.replace(CONFIG, steps=1), latents, tmp_path / "run"))
    squares = whole(latents).square().mean((0, 2, 3))
    stated = torch.tensor([float(n) for n in opened.target.name.partition(":")[2].split(",")], dtype=torch.float64)
    torch.testing.assert_close(stated, squares, rtol=5e-3, atol=0)  # n - 1 of 480 positions, and six digits
    assert opened.header["name"] == "residual=channels-1x16/1"
    assert opened.header["training"]["target"] == opened.header["training"]["loss_space"] == CHANNELS
    assert opened.header["target_reason"].startswith("residual=channels: variances of 4 channels")


def test_the_residual_is_in_units_of_the_noise(latents: Path) -> None:
    data = open_latents(latents)
    one, half = (target(settle(dataclasses.replace(CONFIG, noise_scale=s), data)[0]) for s in (1.0, 0.5))
    x, t = whole(latents), torch.linspace(0.1, 0.9, 30, dtype=torch.float64)
    assert one.name != half.name
    eps = 0.5 * torch.randn(x.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    # y of a channel has the noise's variance at every t
    y = half.mix(x, eps, t)
    assert y.square().mean().item() == pytest.approx(0.25, rel=0.1)  # 30 images


def test_a_network_that_says_0_samples_gaussian_latents_of_the_measured_variances_exactly(latents: Path) -> None:
    skip, t = target(settle(CONFIG, open_latents(latents))[0]), torch.linspace(0, 1, 5, dtype=torch.float64)
    variances = torch.tensor([float(n) for n in skip.name.partition(":")[2].split(",")], dtype=torch.float64)
    z = torch.randn((5, len(variances), 2, 2), dtype=torch.float64)
    v = convert(torch.zeros_like(z), z, t, skip, TARGETS["v"])
    exact = geometry.gaussian_velocity(z, variances[:, None, None], t[:, None, None, None])
    torch.testing.assert_close(v, exact, rtol=1e-6, atol=1e-6)  # coefficients are kept in float32


def test_a_stopped_run_of_a_measured_target_resumes_to_the_bit_and_measures_nothing(
    latents: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps = dataclasses.replace(CONFIG, steps=3)
    train(steps, latents, tmp_path / "parts")
    straight = train(CONFIG, latents, tmp_path / "straight")
    monkeypatch.setattr(measured, "MEASURES", {CHANNELS: lambda *_: pytest.fail("measured again")})
    resumed = train(CONFIG, latents, tmp_path / "parts")
    for name in ("model", "optimizer", "ema-0.9"):
        one, other = (checkpoint.read(folder).tensors(name) for folder in (straight, resumed))
        assert all(torch.equal(one[key], other[key]) for key in one)
    headers = [json.loads((folder / "checkpoint.json").read_text()) for folder in (straight, resumed)]
    assert headers[0]["target"] == headers[1]["target"]


def test_a_run_does_not_go_on_with_a_choice_where_it_was_begun_without(latents: Path, tmp_path: Path) -> None:
    config = dataclasses.replace(CONFIG, target="x", loss_space="v", steps=1)
    train(config, latents, tmp_path / "run")
    with pytest.raises(ValueError, match="target is x there and auto here"):
        train(dataclasses.replace(config, target="auto", steps=2), latents, tmp_path / "run")


@pytest.mark.parametrize(("size", "patch_size"), [("1x16x2", 1), ("1x8x1", 2)])
def test_auto_is_the_rule_on_the_covariance_of_tokens(latents: Path, size: str, patch_size: int) -> None:
    config = dataclasses.replace(CONFIG, target="auto", loss_space="v", size=size, patch_size=patch_size)
    data = open_latents(latents)
    covariance = token_moments(data, patch_size)[1]
    width = int(size.split("x")[1])
    numbers = 4 * patch_size**2
    rank = width if width < numbers else numbers // 2
    expected = capacity.recommend(torch.linalg.eigvalsh(covariance), rank)
    assert settle(config, data) == expected
    assert f"rank {rank} for {numbers} directions" in expected[1]


def test_a_run_of_auto_is_the_run_of_what_it_chose_and_says_why(
    latents: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = dataclasses.replace(CONFIG, target="auto", loss_space="x", steps=2)
    chosen, reason = settle(config, open_latents(latents))
    automatic = checkpoint.read(train(config, latents, tmp_path / "auto"))
    assert capsys.readouterr().err.splitlines()[0] == reason
    named = checkpoint.read(train(dataclasses.replace(config, target=chosen), latents, tmp_path / "named"))
    assert (automatic.header["target"], automatic.header["target_reason"]) == (chosen, reason)
    assert automatic.header["name"] == named.header["name"]
    assert "target_reason" not in named.header
    weights = [opened.tensors("model") for opened in (automatic, named)]
    assert all(torch.equal(weights[0][key], weights[1][key]) for key in weights[0])


@pytest.mark.parametrize(("name", "space"), [("residual=channels:1,2,3", "v"), ("x", "residual=channels:1,2,3")])
def test_a_target_or_a_space_of_other_channels_than_the_latents_is_refused(
    latents: Path, tmp_path: Path, name: str, space: str
) -> None:
    config = dataclasses.replace(CONFIG, target=name, loss_space=space)
    with pytest.raises(ValueError, match="residual=channels states 3 variances, the latents have 4 channels"):
        train(config, latents, tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"target": "x"}, "'residual=channels' is measured when a training begins"),
        ({"target": "auto"}, "'residual=channels' is measured when a training begins"),
        ({"target": "auto", "loss_space": "residual=channels:1,2"}, "losses of one space for all channels"),
    ],
)
def test_a_measured_space_needs_its_target(settings: dict[str, str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(CONFIG, **settings)


def test_a_sample_is_spread_over_the_whole_set() -> None:
    class Numbers:
        def __len__(self) -> int:
            return 25

        def gather(self, indices: torch.Tensor) -> torch.Tensor:
            return indices[:, None, None, None].float()

    some = Sample(Numbers(), 10)
    assert some.gather(torch.arange(10)).flatten().tolist() == [0, 2, 5, 7, 10, 12, 15, 17, 20, 22]
    assert len(Sample(Numbers(), 99)) == 25
