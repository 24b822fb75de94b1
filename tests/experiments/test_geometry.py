import json
import sys
from types import ModuleType

import numpy as np
import pytest
import torch

from jlt.cli import geometry as cli
from jlt.data.covariance import patches, token_moments
from jlt.evaluation import records
from jlt.experiments.geometry import _leading_record, leading_spectrum, measure_geometry
from jlt.experiments.report import page


class Stored:
    def __init__(self, latents: torch.Tensor) -> None:
        self.latents, self.labels = latents, torch.arange(len(latents)) % 2

    def __len__(self) -> int:
        return len(self.latents)

    def gather(self, indices: torch.Tensor) -> torch.Tensor:
        return self.latents[indices]


def latents(count: int = 50, offset: float = 0.0) -> Stored:
    generator = torch.Generator().manual_seed(0)
    mixing = torch.randn(3, 3, generator=generator)
    return Stored(offset + torch.einsum("ij,bjhw->bihw", mixing, torch.randn(count, 3, 4, 4, generator=generator)))


@pytest.mark.parametrize("batch_size", [1, 7, 50, 64])
@pytest.mark.parametrize("patch_size", [1, 2])
def test_streamed_moments_are_those_of_numpy(batch_size, patch_size):
    stored = latents()
    mean, covariance, num_tokens = token_moments(stored, patch_size, batch_size)
    tokens = patches(stored.latents.double(), patch_size).numpy()
    assert num_tokens == len(tokens) == 50 * 16 // patch_size**2
    np.testing.assert_allclose(mean, tokens.mean(0), atol=1e-12)
    np.testing.assert_allclose(covariance, np.cov(tokens, rowvar=False), atol=1e-12)


def test_a_large_common_offset_costs_no_digits():
    plain = latents().latents.double()
    shifted = token_moments(Stored(plain + 1e6))[1]
    # Adding 1e6 rounds each number to 1e6 * 2^-53 = 1e-10; sums of uncentred squares would lose 1e12 * 2^-53 = 1e-4.
    torch.testing.assert_close(shifted, token_moments(Stored(plain))[1], rtol=0, atol=1e-8)


def test_patches_flatten_as_row_column_channel():
    image = torch.arange(2 * 4 * 4.0).reshape(1, 2, 4, 4)  # channel 0 holds 0..15, channel 1 16..31
    cut = patches(image, 2)
    assert cut[0].tolist() == [0, 16, 1, 17, 4, 20, 5, 21]
    assert cut[1, 0] == 2  # the next patch lies to the right
    assert cut[2, 0] == 8


def test_the_record_states_the_spectra_of_all_three_targets():
    stored = latents()
    record = measure_geometry(stored)
    x, eps, v = record.parts
    spectrum = np.linalg.eigvalsh(np.cov(patches(stored.latents.double(), 1).numpy(), rowvar=False))[::-1]
    assert x.values["condition number"].value == pytest.approx(spectrum[0] / spectrum[-1])
    assert x.values["effective rank"].value == pytest.approx(spectrum.sum() ** 2 / (spectrum**2).sum())
    assert eps.values["condition number"].value == 1
    assert v.values["condition number"].value == pytest.approx((spectrum[0] + 1) / (spectrum[-1] + 1))
    lines = [line for _, line in record.figures["spectrum"].lines.values()]
    np.testing.assert_allclose(lines, [spectrum, np.ones(3), spectrum + 1])


def test_a_target_of_constant_coefficients_has_the_spectrum_of_its_mixture():
    record = measure_geometry(latents(), targets=("x", "k=0.5", "v"))
    x, between, _ = record.parts
    assert between.settings["covariance"] == "Σ + 0.25 I"
    assert between.values["largest eigenvalue"].value == pytest.approx(x.values["largest eigenvalue"].value + 0.25)
    assert list(record.figures["spectrum"].lines) == ["x: Σ", "k=0.5: Σ + 0.25 I", "v: Σ + I"]
    with pytest.raises(
        ValueError, match=r"covariance of k=0\.\.1 changes with t: c_x, c_eps are .* at t = 0, .* at t = 1"
    ):
        measure_geometry(latents(), targets=("k=0..1",))
    with pytest.raises(ValueError, match="covariance of residual=channels changes with t"):
        measure_geometry(latents(), targets=("residual=channels:4,1,0.1",))


def test_the_figures_keep_the_ratio_of_ambiguities():
    time, x = measure_geometry(latents()).figures["ambiguity"].lines["x"]
    _, v = measure_geometry(latents()).figures["ambiguity"].lines["v"]
    np.testing.assert_allclose(np.array(v) / np.array(x), 1 / (1 - np.array(time)) ** 2)


def test_a_singular_covariance_is_counted_and_can_be_stored(tmp_path):
    stored = latents()
    stored.latents[:, 2] = 0.5  # a channel that never changes
    record = measure_geometry(stored)
    assert record.values["singular directions"].value == 1
    assert "condition number" not in record.parts[0].values
    assert "condition number" in record.parts[2].values
    records.write(record, tmp_path / "record.json")
    assert records.read(tmp_path / "record.json").parts == record.parts
    assert "x: Σ" in page(record, tmp_path)


@pytest.mark.parametrize(
    ("count", "patch_size", "message"),
    [(0, 1, "at least 1 latent"), (50, 3, "must divide the latents' 4 x 4, got 3"), (1, 4, "48 directions .* got 1")],
)
def test_what_has_no_covariance_is_refused(count, patch_size, message):
    with pytest.raises(ValueError, match=message):
        measure_geometry(latents(count), patch_size)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_latents_that_are_not_finite_are_refused(bad):
    stored = latents()
    stored.latents[20, 1, 0, 0] = bad
    with pytest.raises(ValueError, match="not finite"):
        measure_geometry(stored)


def test_the_command_prints_a_table_or_json_and_writes_the_record(tmp_path, capsys, monkeypatch):
    data = ModuleType("jlt.data")
    data.open_latents = lambda folder, split: latents()  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "jlt.data", data)
    cli.run(tmp_path / "latents", out=tmp_path / "out")
    printed = capsys.readouterr().out
    assert printed.splitlines()[-1] == str(tmp_path / "out" / "record.json")
    record = records.read(tmp_path / "out" / "record.json")
    assert f"{record.parts[0].values['effective rank'].value:.4g}" in printed
    cli.run(tmp_path / "latents", json=True)
    assert json.loads(capsys.readouterr().out)["parts"][2]["settings"]["covariance"] == "Σ + I"


def test_the_whole_image_as_one_token_has_the_covariance_of_numpy():
    stored = latents(count=80)
    record = measure_geometry(stored, None)
    flat = stored.latents.permute(0, 2, 3, 1).flatten(1).double()
    top = np.linalg.eigvalsh(np.cov(flat.numpy(), rowvar=False))[-1]
    assert record.settings["patch_size"] == "whole image"
    assert record.parts[0].values["largest eigenvalue"].value == pytest.approx(top)


def test_subspace_iteration_finds_the_leading_spectrum_within_its_stated_errors():
    generator = torch.Generator().manual_seed(0)
    scale = torch.logspace(0, -3, 96, dtype=torch.float64).reshape(6, 4, 4)
    stored = Stored(3 + scale * torch.randn(300, 6, 4, 4, generator=generator, dtype=torch.float64))
    exact = np.linalg.eigvalsh(np.cov(patches(stored.latents, None).numpy(), rowvar=False))[::-1]
    found = leading_spectrum(stored, count=12, batch_size=64)
    for value, error in zip(found.eigenvalues.tolist(), found.errors.tolist(), strict=True):
        assert np.abs(exact - value).min() <= error + 1e-12
    assert (found.eigenvalues.numpy() <= exact[:12] + 1e-12).all()
    np.testing.assert_allclose(found.eigenvalues[:6], exact[:6], rtol=1e-3)  # four passes; the last ones are rougher
    assert found.trace == pytest.approx(exact.sum())


@pytest.mark.parametrize("smallest", [-0.15, -3])  # flat, where many eigenvalues found are too low, and steep
@pytest.mark.parametrize("count", [4, 12, 64])
def test_the_effective_rank_of_a_leading_spectrum_lies_between_its_bounds(smallest, count):
    scale = torch.logspace(0, smallest, 96, dtype=torch.float64).sqrt().reshape(6, 4, 4)
    stored = Stored(scale * torch.randn(300, 6, 4, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64))
    exact = np.linalg.eigvalsh(np.cov(patches(stored.latents, None).numpy(), rowvar=False))[::-1]
    found = leading_spectrum(stored, count)
    low, high = found.square
    assert low <= (exact**2).sum() <= high
    values = _leading_record("x", found).values
    rank = exact.sum() ** 2 / (exact**2).sum()
    assert values["effective rank, at least"].value <= rank <= values["effective rank, at most"].value
    needed, told = int((exact.cumsum() < 0.9 * exact.sum()).sum()) + 1, "directions for 90 % of the variance, at most"
    assert (told in values) == (found.eigenvalues.sum().item() >= 0.9 * exact.sum())
    assert told not in values or needed <= values[told].value


def test_a_large_whole_image_is_measured_by_its_leading_spectrum(monkeypatch, tmp_path):
    monkeypatch.setattr("jlt.experiments.geometry.DENSE", 10)
    record = measure_geometry(latents(count=80), None)
    x, eps, v = record.parts
    assert record.values["eigenvalues found"].value == 48  # all of 3 x 4 x 4
    assert x.values["effective rank, at least"].value == pytest.approx(x.values["effective rank, at most"].value)
    assert eps.values["effective rank, at least"].value == pytest.approx(48)
    assert v.values["trace"].value == pytest.approx(x.values["trace"].value + 48)
    records.write(record, tmp_path / "record.json")


def test_the_command_forecasts_at_a_rank_and_refuses_what_whole_images_have_not(tmp_path, capsys, monkeypatch):
    read: list[int] = []

    class Counted(Stored):
        def gather(self, indices: torch.Tensor) -> torch.Tensor:
            read.extend(indices.tolist())
            return super().gather(indices)

    data = ModuleType("jlt.data")
    data.open_latents = lambda folder, split: Counted(latents().latents)  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "jlt.data", data)
    cli.run(tmp_path, rank=2, local=False, json=True)
    parts = json.loads(capsys.readouterr().out)["parts"]
    assert [part["kind"] for part in parts] == ["target"] * 3 + ["forecast"]
    assert parts[-1]["settings"]["rank"] == 2
    assert sorted(read) == [0, *range(50)]  # one pass serves all, besides a look at the shape
    read.clear()
    monkeypatch.setattr("jlt.experiments.local_geometry.DENSE", 10)
    with pytest.raises(ValueError, match="tokens close up may have 10 numbers, these have 48; --no-local"):
        cli.run(tmp_path, whole=True)
    assert read == [0]  # before the spectrum is worked out
    with pytest.raises(ValueError, match="--whole measures a spectrum alone"):
        cli.run(tmp_path, whole=True, rank=2)
