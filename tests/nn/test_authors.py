"""The authors' checkpoints: safe to open, and complete."""

import os
import pickle
import zipfile
from pathlib import Path

import pytest
import torch

from jlt.nn import Transformer, authors


@pytest.mark.parametrize(("folder", "patch_size"), [("jlt_p1", 1), ("jlt_p2", 2)])
def test_sizes_come_from_the_tensors_and_not_from_args(golden: Path, folder: str, patch_size: int) -> None:
    found = authors.read(golden / folder / "checkpoint-last.pth")  # its args name a B model
    config = found.config(latent_size=8)
    assert (config.patch_size, config.hidden_size, config.depth, config.num_heads) == (patch_size, 64, 3, 4)
    assert (config.latent_channels, config.num_classes) == (16, 10)
    names = {name for name, _ in Transformer(config).named_parameters()}
    assert found.model.keys() == found.ema1.keys() == found.ema2.keys() == names


def test_the_averages_are_the_weights_times_what_the_vectors_state(golden: Path) -> None:
    found = authors.read(golden / "jlt_p1" / "checkpoint-last.pth")
    for name, weight in found.model.items():
        torch.testing.assert_close(found.ema1[name], 0.99 * weight)
        torch.testing.assert_close(found.ema2[name], 0.98 * weight)


class Hostile:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.system, ("touch executed",)


@pytest.mark.parametrize("protocol", [2, 4])
def test_a_hostile_pickle_is_refused_and_not_executed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, protocol: int
) -> None:
    monkeypatch.chdir(tmp_path)
    plain, zipped = tmp_path / "plain.pth", tmp_path / "zipped.pth"
    plain.write_bytes(pickle.dumps({"model": Hostile()}, protocol))
    torch.save({"model": Hostile()}, zipped, pickle_protocol=protocol)
    for path in (plain, zipped):
        with pytest.raises(ValueError, match="without running code"):
            authors.read(path)
    assert not (tmp_path / "executed").exists()


def test_an_unknown_or_missing_part_is_named(tmp_path: Path, golden: Path) -> None:
    with pytest.raises(ValueError, match=r"net\.extra.* is not part"):
        authors.rename({"net.extra": torch.zeros(1)})
    torch.save({"model": {}}, tmp_path / "half.pth")
    with pytest.raises(ValueError, match="model_ema1"):
        authors.read(tmp_path / "half.pth")
    (tmp_path / "cut.pth").write_bytes((golden / "jlt_p1" / "checkpoint-last.pth").read_bytes()[:1000])
    with pytest.raises(ValueError, match=r"cut\.pth"):
        authors.read(tmp_path / "cut.pth")
    damaged = (golden / "jlt_p1" / "checkpoint-last.pth").read_bytes().replace(b"PK\x01\x02", b"PK\x01\x09")
    (tmp_path / "damaged.pth").write_bytes(damaged)
    with pytest.raises(ValueError, match=r"damaged\.pth is a damaged archive"):
        authors.read(tmp_path / "damaged.pth")
    with pytest.raises(ValueError, match="is not a file"):
        authors.read(tmp_path)


@pytest.mark.parametrize("data", [b"", b"hello", b"\x80\x02}"])
def test_a_file_of_something_else_is_refused(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "other.pth").write_bytes(data)
    with pytest.raises(ValueError, match=r"other\.pth is not a checkpoint that may be loaded without running code: ."):
        authors.read(tmp_path / "other.pth")


@pytest.mark.parametrize(
    "model", [5, {}, {"net.x_embedder.proj.weight": torch.zeros(3)}, {"net.x_embedder.proj.weight": 3}, {5: 5}]
)
def test_a_checkpoint_without_the_authors_tensors_is_refused(tmp_path: Path, model: object) -> None:
    torch.save({"model": model, "model_ema1": {}, "model_ema2": {}, "epoch": 0}, tmp_path / "other.pth")
    with pytest.raises(ValueError, match=r"other\.pth is not laid out as the authors' checkpoints are: ."):
        authors.read(tmp_path / "other.pth")


def test_a_zip_bomb_is_refused_before_it_is_unpacked(tmp_path: Path) -> None:
    bomb = tmp_path / "bomb.pth"
    with zipfile.ZipFile(bomb, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", bytes(10**8))
    with pytest.raises(ValueError, match="would unpack to 100000000"):
        authors.read(bomb)
