"""Images as other programs read them: the same pixels and labels come back from every format."""

import io
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from jlt.data.tar import open_tar
from jlt.sampling import FORMATS, Stored

IMAGES = torch.randint(0, 256, (7, 3, 6, 4), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
LABELS = [0, 2, 1, 0, 1, 2, 2]
STORED = Stored([IMAGES[:3], IMAGES[3:6], IMAGES[6:]], LABELS, 7, (3, 6, 4), ("ant", "bee", "cat"))


def test_png_files_hold_the_pixels(tmp_path: Path) -> None:
    FORMATS["png"](tmp_path, STORED)
    for i, image in enumerate(IMAGES):
        found = np.asarray(Image.open(tmp_path / f"{i:06d}.png"))
        assert np.array_equal(found, image.permute(1, 2, 0).numpy())


def test_a_tar_can_be_read_as_training_images(tmp_path: Path) -> None:
    FORMATS["tar"](tmp_path, Stored([IMAGES[:, :, :4]], LABELS, 7, (3, 4, 4), ("ant", "bee", "cat")))
    source = open_tar(str(tmp_path / "images.tar"), image_size=4)
    assert source.class_names == ("ant", "bee", "cat")
    for i, (image, label) in enumerate(source[i] for i in range(len(source))):
        assert np.array_equal(image, IMAGES[i, :, :4].numpy())
        assert label == LABELS[i]


@pytest.mark.parametrize("channels", [1, 3])
def test_an_npz_is_what_numpy_would_write(tmp_path: Path, channels: int) -> None:
    stored = Stored([IMAGES[:3, :channels], IMAGES[3:, :channels]], LABELS, 7, (channels, 6, 4))
    FORMATS["npz"](tmp_path, stored)
    expected = IMAGES[:, :channels].permute(0, 2, 3, 1).numpy()
    with np.load(tmp_path / "images.npz", allow_pickle=False) as found:
        assert found["arr_0"].dtype == np.uint8
        assert np.array_equal(found["arr_0"], expected)
        assert found["arr_1"].tolist() == LABELS
    # to the bit, the member that np.savez writes
    reference = io.BytesIO()
    np.savez(reference, np.ascontiguousarray(expected))
    with zipfile.ZipFile(tmp_path / "images.npz") as ours, zipfile.ZipFile(reference) as theirs:
        assert ours.read("arr_0.npy") == theirs.read("arr_0.npy")


@pytest.mark.parametrize("name", FORMATS)
def test_a_file_depends_on_nothing_but_the_images(tmp_path: Path, name: str) -> None:
    whole = Stored([IMAGES], LABELS, 7, (3, 6, 4), ("ant", "bee", "cat"))
    for folder, stored in (("a", STORED), ("b", whole)):
        FORMATS[name](tmp_path / folder, stored)
    a, b = ({path.name: path.read_bytes() for path in (tmp_path / folder).iterdir()} for folder in "ab")
    assert a == b


def test_images_without_labels_state_none(tmp_path: Path) -> None:
    for write in FORMATS.values():
        write(tmp_path, Stored([IMAGES], None, 7, (3, 6, 4)))
    with np.load(tmp_path / "images.npz") as found:
        assert list(found) == ["arr_0"]
    assert not (tmp_path / "classes.txt").exists()
