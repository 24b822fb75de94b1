import io
import re
import zipfile

import numpy as np
import pytest
import torch

from jlt import files
from jlt.evaluation import inception, references
from jlt.evaluation.distances import frechet_distance
from jlt.evaluation.features import Pixels
from jlt.evaluation.inception import Inception
from jlt.evaluation.statistics import Statistics

FID = Inception(None, "Inception", inception.FINGERPRINT, dimension=12)  # of fewer dimensions, to be quick


def statistics(count=60, dimension=12, keep=10_000, spatial=5):
    generator = torch.Generator().manual_seed(count)
    seen = Statistics(count, keep)
    views = {"features": torch.randn(count, dimension, generator=generator)}
    if spatial:
        views["spatial"] = torch.randn(count, spatial, generator=generator)
    seen.update(views)
    return seen


def test_a_reference_is_read_as_it_was_written(tmp_path):
    seen = statistics(keep=20)
    images = np.arange(20 * 4 * 4 * 3).reshape(20, 4, 4, 3).astype(np.uint8)
    references.write(tmp_path / "r.npz", seen, FID, "60 pictures", images)
    found = references.read(tmp_path / "r.npz", FID)
    assert (found.name, found.count, found.extractor) == ("60 pictures", 60, "Inception")
    assert torch.equal(found.moments.mean, seen.moments().mean)
    assert torch.equal(found.spatial.covariance, seen.moments("spatial").covariance)
    assert torch.equal(found.features, seen.kept)
    assert frechet_distance(seen.moments(), found.moments) == pytest.approx(0, abs=1e-9)
    assert references.has_images(tmp_path / "r.npz")


def test_the_arrays_are_those_that_other_evaluators_read(tmp_path):
    seen = statistics()
    references.write(tmp_path / "r.npz", seen, FID, "60 pictures")
    with np.load(tmp_path / "r.npz", allow_pickle=False) as file:
        assert {"mu", "sigma", "mu_s", "sigma_s"} <= set(file.files)
        assert all(file[name].dtype == np.float64 for name in ("mu", "sigma", "mu_s", "sigma_s"))
        features = file["features"].astype(np.float64)
        np.testing.assert_allclose(file["sigma"], np.cov(features, rowvar=False), rtol=0, atol=1e-12)


@pytest.mark.parametrize("spatial", [True, False], ids=["as ADM", "as JiT and torch-fidelity"])
def test_published_statistics_are_read_without_a_count(tmp_path, spatial):
    rows = np.random.default_rng(0).normal(size=(80, 12))
    arrays = {"mu": rows.mean(0), "sigma": np.cov(rows, rowvar=False)}
    if spatial:
        arrays |= {"mu_s": np.zeros(5), "sigma_s": np.eye(5), "arr_0": np.zeros((3, 4, 4, 3), np.uint8)}
    np.savez(tmp_path / "published.npz", **arrays)
    found = references.read(tmp_path / "published.npz", FID)
    assert (found.name, found.count, found.features) == ("published.npz", None, None)
    assert (found.spatial is not None) == references.has_images(tmp_path / "published.npz") == spatial
    same = statistics(1000)
    assert frechet_distance(same.moments(), found.moments) == pytest.approx(
        frechet_distance(found.moments, same.moments()), rel=1e-9
    )


def test_a_covariance_of_few_images_without_a_count_has_the_rank_that_it_has(tmp_path):
    """Rounding errors of null directions would else add their roots: 12 images in 300 dimensions."""
    rows = np.random.default_rng(0).normal(size=(12, 300))
    np.savez(tmp_path / "few.npz", mu=rows.mean(0), sigma=np.cov(rows, rowvar=False))
    wide = Inception(None, "Inception", inception.FINGERPRINT, dimension=300)
    found, seen = references.read(tmp_path / "few.npz", wide), Statistics(12)
    seen.update({"features": torch.from_numpy(rows).float()})
    trace = found.moments.covariance.trace().item()
    assert frechet_distance(found.moments, found.moments) <= 1e-9 * trace
    assert frechet_distance(found.moments, seen.moments()) <= 1e-6 * trace  # rounded to float32 on one side


def test_other_features_or_dimensions_are_refused_with_both(tmp_path):
    references.write(tmp_path / "r.npz", statistics(), FID, "pictures")
    with pytest.raises(ValueError, match=re.escape("mu is (12,), features of pixels 4 x 4 are of dimension 16")):
        references.read(tmp_path / "r.npz", Pixels(4))
    other = Inception(None, "Inception 0123abcd", "f" * 16, dimension=12)
    made = f"was made with Inception ({inception.FINGERPRINT}), not with Inception 0123abcd ({'f' * 16})"
    with pytest.raises(ValueError, match=re.escape(made)):
        references.read(tmp_path / "r.npz", other)
    np.savez(tmp_path / "published.npz", mu=np.zeros(16), sigma=np.eye(16))
    with pytest.raises(ValueError, match="so they are Inception's, not pixels 4 x 4's"):
        references.read(tmp_path / "published.npz", Pixels(4))


def pickled(path):
    class Bomb:
        def __reduce__(self):
            return (open, (str(path.parent / "ran"), "w"))

    np.savez(path, mu=np.array([Bomb()], dtype=object), sigma=np.eye(1))


DAMAGES = {
    "a pickle": pickled,
    "no archive": lambda path: path.write_bytes(b"mu and sigma"),
    "other arrays": lambda path: np.savez(path, mean=np.zeros(12)),
    "no covariance": lambda path: np.savez(path, mu=np.zeros(12)),
    "another shape": lambda path: np.savez(path, mu=np.zeros(12), sigma=np.eye(11)),
    "whole numbers": lambda path: np.savez(path, mu=np.zeros(12, int), sigma=np.eye(12)),
    "not finite": lambda path: np.savez(path, mu=np.full(12, np.nan), sigma=np.eye(12)),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_file_that_holds_no_statistics_is_refused_by_name(tmp_path, damage):
    DAMAGES[damage](tmp_path / "bad.npz")
    with pytest.raises(ValueError, match=r"bad\.npz") as error:
        references.read(tmp_path / "bad.npz", FID)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "ran").exists()


def test_a_cut_archive_is_refused_and_an_absent_one_says_what_makes_it(tmp_path):
    buffer = io.BytesIO()
    np.savez(buffer, mu=np.zeros(12), sigma=np.eye(12))
    data = bytearray(buffer.getvalue())
    with zipfile.ZipFile(buffer) as archive:
        start = archive.getinfo("sigma.npy").header_offset
    data[start + 200] ^= 1
    files.write_bytes(tmp_path / "flipped.npz", bytes(data))
    with pytest.raises(ValueError, match=r"flipped\.npz cannot be read"):
        references.read(tmp_path / "flipped.npz", FID)
    with pytest.raises(ValueError, match="jlt reference makes them"):
        references.read(tmp_path / "absent.npz", FID)
