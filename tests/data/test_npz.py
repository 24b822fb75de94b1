import re

import numpy as np
import pytest

from jlt.data import Source, open_source
from jlt.data.npz import open_npz

IMAGES = np.random.default_rng(0).integers(0, 256, (7, 6, 6, 3), dtype=np.uint8)


def test_images_are_those_of_the_array_wherever_it_lies_in_the_file(tmp_path):
    np.savez(tmp_path / "s.npz", np.ascontiguousarray(IMAGES), np.arange(7))
    np.savez(tmp_path / "r.npz", mu=np.zeros(100), sigma=np.eye(100), arr_0=IMAGES)
    for name in ("s.npz", "r.npz"):
        source = open_source(str(tmp_path / name))
        assert isinstance(source, Source)
        assert (len(source), source.image_shape, source.class_names) == (7, (3, 6, 6), None)
        for i in (0, 6, 3):
            image, label = source[i]
            assert label == -1
            assert np.array_equal(image, IMAGES[i].transpose(2, 0, 1))


def test_nothing_is_read_before_it_is_asked_for(tmp_path):
    np.savez(tmp_path / "s.npz", IMAGES)
    assert isinstance(open_npz(str(tmp_path / "s.npz")).array, np.memmap)


def test_fingerprints_tell_the_contents(tmp_path):
    for name, images in {"a": IMAGES, "b": IMAGES, "c": IMAGES + np.uint8(1)}.items():
        np.savez(tmp_path / f"{name}.npz", images)
    a, b, c = (open_npz(str(tmp_path / f"{name}.npz")).fingerprint for name in "abc")
    assert a == b != c


@pytest.mark.parametrize(
    ("arrays", "problem"),
    [
        ({"arr_0": IMAGES.astype(np.float32)}, "arr_0 is (7, 6, 6, 3) float32"),
        ({"arr_0": IMAGES.transpose(0, 3, 1, 2).copy()}, "arr_0 is (7, 3, 6, 6) uint8"),
        ({"arr_0": IMAGES[:0]}, "arr_0 is (0, 6, 6, 3) uint8"),
        ({"mu": np.zeros(3)}, "There is no item named"),
        ({"arr_0": np.array([{}], dtype=object)}, "holds objects"),
    ],
)
def test_what_holds_no_images_is_refused_with_the_reason(tmp_path, arrays, problem):
    np.savez(tmp_path / "s.npz", **arrays)
    with pytest.raises(ValueError, match=re.escape(problem)):
        open_npz(str(tmp_path / "s.npz"))


def test_compressed_and_resized_images_are_refused(tmp_path):
    np.savez_compressed(tmp_path / "c.npz", IMAGES)
    with pytest.raises(ValueError, match=r"write it with numpy\.savez, not savez_compressed"):
        open_npz(str(tmp_path / "c.npz"))
    np.savez(tmp_path / "s.npz", IMAGES)
    with pytest.raises(ValueError, match="images are 6 x 6, not 8 x 8"):
        open_npz(str(tmp_path / "s.npz"), 8)
    (tmp_path / "t.npz").write_bytes(b"text")
    with pytest.raises(ValueError, match=r"t\.npz holds no images as arr_0: File is not a zip file"):
        open_npz(str(tmp_path / "t.npz"))
