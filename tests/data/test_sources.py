import gzip

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from jlt.data import Subset, held_out_indices, open_source
from jlt.data.idx import read_idx


def idx_bytes(array):
    header = bytes([0, 0, 8, array.ndim]) + b"".join(n.to_bytes(4, "big") for n in array.shape)
    return header + array.astype(np.uint8).tobytes()


def write_idx(folder, images, labels, suffix="", split="train"):
    pack = gzip.compress if suffix else bytes
    (folder / f"{split}-images-idx3-ubyte{suffix}").write_bytes(pack(idx_bytes(images)))
    (folder / f"{split}-labels-idx1-ubyte{suffix}").write_bytes(pack(idx_bytes(labels)))


def save_image(path, value=0, size=8):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (size, size), (value, value, value)).save(path)


@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_idx_files_come_back_as_they_were_written(tmp_path, suffix):
    generator = np.random.default_rng(0)
    images = generator.integers(0, 256, (6, 28, 28), dtype=np.uint8)
    write_idx(tmp_path, images, np.array([2, 0, 1, 2, 1, 0]), suffix)
    source = open_source(f"idx:{tmp_path}")
    assert len(source) == 6
    assert source.class_names == ("0", "1", "2")
    for i, label in enumerate([2, 0, 1, 2, 1, 0]):
        image, found = source[i]
        assert found == label
        np.testing.assert_array_equal(image[0, 2:30, 2:30], images[i])
        assert image.shape == (1, 32, 32)
        assert int(image.sum(dtype=int)) == int(images[i].sum(dtype=int))  # the border is zero


def test_train_and_test_files_of_idx_are_two_sources(tmp_path):
    write_idx(tmp_path, np.zeros((3, 28, 28)), np.arange(3))
    write_idx(tmp_path, np.ones((2, 28, 28)), np.arange(2), split="t10k")
    assert len(open_source(str(tmp_path))) == 3
    assert len(open_source(f"idx-test:{tmp_path}")) == 2


@given(st.binary(max_size=64) | st.binary(max_size=40).map(lambda tail: bytes([0, 0, 8, 3]) + tail), st.booleans())
@settings(max_examples=300, deadline=None)
def test_any_bytes_are_an_array_or_a_value_error(tmp_path_factory, content, packed):
    path = tmp_path_factory.mktemp("idx") / ("any.gz" if packed else "any")
    path.write_bytes(content)
    try:
        outcome: object = read_idx(path, 3).ndim
    except ValueError as error:
        outcome = str(error)
    assert outcome == 3 or str(path) in str(outcome)


@given(st.tuples(*[st.integers(0, 4)] * 3), st.integers(-8, 8))
@settings(max_examples=100, deadline=None)
def test_an_idx_file_must_be_as_long_as_its_header_says(tmp_path_factory, shape, surplus):
    content = idx_bytes(np.ones(shape))
    content = content + bytes(surplus) if surplus > 0 else content[: len(content) + surplus]
    path = tmp_path_factory.mktemp("idx") / "any"
    path.write_bytes(content)
    if surplus == 0:
        assert read_idx(path, 3).shape == shape
    else:
        with pytest.raises(ValueError, match=r"any (promises|starts with)"):
            read_idx(path, 3)


@pytest.mark.parametrize(
    "damage", [lambda b: b[: len(b) // 2], lambda b: b[:40] + b"????" + b[44:], lambda b: b"x" * 50]
)
def test_a_damaged_gzip_file_is_named(tmp_path, damage):
    generator = np.random.default_rng(0)
    path = tmp_path / "images.gz"
    path.write_bytes(damage(gzip.compress(idx_bytes(generator.integers(0, 256, (4, 28, 28))))))
    with pytest.raises(ValueError, match=r"images\.gz"):
        read_idx(path, 3)


def test_packaged_mnist_has_500_digits_a_class():
    source = open_source("mnist")
    assert np.bincount(source.labels()).tolist() == [500] * 10
    assert source.image_shape == (1, 32, 32)


def test_class_folders_are_labels_in_the_order_of_their_names(tmp_path):
    for name, value in (("zebra", 30), ("ant", 10), ("cow", 20)):
        save_image(tmp_path / name / "deep" / "a.png", value)
        save_image(tmp_path / name / "b.PNG", value + 1)
    source = open_source(str(tmp_path), 8)
    assert source.class_names == ("ant", "cow", "zebra")
    assert source.labels().tolist() == [0, 0, 1, 1, 2, 2]
    assert [int(source[i][0][0, 0, 0]) for i in range(6)] == [11, 10, 21, 20, 31, 30]


def test_a_flat_folder_has_no_labels(tmp_path):
    save_image(tmp_path / "b.png", 2)
    save_image(tmp_path / "a.png", 1)
    source = open_source(str(tmp_path), 8)
    assert source.class_names is None
    assert source.labels().tolist() == [-1, -1]
    assert [int(source[i][0][0, 0, 0]) for i in range(2)] == [1, 2]


def test_a_fingerprint_changes_with_names_sizes_and_the_crop(tmp_path):
    save_image(tmp_path / "a.png", 1)
    before = open_source(str(tmp_path), 8).fingerprint
    assert open_source(str(tmp_path), 8).fingerprint == before
    assert open_source(str(tmp_path), 4).fingerprint != before
    save_image(tmp_path / "b.png", 1)
    assert open_source(str(tmp_path), 8).fingerprint != before


def test_a_spec_opens_the_same_source_again(tmp_path):
    save_image(tmp_path / "a.png", 1)
    source = open_source(str(tmp_path), 8)
    assert open_source(source.spec, 8) == source


def test_a_subset_is_the_source_at_its_indices():
    source = open_source("mnist")
    part = Subset(source, [7, 3, 4000])
    assert part.labels().tolist() == source.labels()[[7, 3, 4000]].tolist()
    np.testing.assert_array_equal(part[2][0], source[4000][0])
    assert part.fingerprint != Subset(source, [3, 7, 4000]).fingerprint


label_lists = st.lists(st.integers(-1, 6), min_size=2, max_size=60)


@given(label_lists, st.data())
@settings(deadline=None)
def test_held_out_images_are_even_over_the_classes(labels, data):
    labels = np.array(labels)
    count = data.draw(st.integers(0, len(labels) - 1))
    chosen = held_out_indices(labels, count)
    assert len(chosen) == len(set(chosen.tolist())) == count
    assert chosen.tolist() == sorted(chosen.tolist())
    assert chosen.tolist() == held_out_indices(labels.copy(), count).tolist()
    taken = {label: (labels[chosen] == label).sum() for label in np.unique(labels)}
    most = max(taken.values())
    for label, number in taken.items():  # one less than the most, unless the class has no more
        assert number >= min(most - 1, (labels == label).sum())


@given(label_lists, st.data())
@settings(deadline=None)
def test_holding_out_more_keeps_those_held_out_before(labels, data):
    labels = np.array(labels)
    more = data.draw(st.integers(0, len(labels) - 1))
    fewer = data.draw(st.integers(0, more))
    assert set(held_out_indices(labels, fewer).tolist()) <= set(held_out_indices(labels, more).tolist())


def test_hidden_names_are_no_images(tmp_path):
    for folder in ("cat", "dog", "cat/.thumbnails", ".trash"):
        save_image(tmp_path / folder / "a.png")
    (tmp_path / "cat" / "._a.png").write_bytes(b"what another system keeps about a.png")
    source = open_source(str(tmp_path), image_size=8)
    assert source.class_names == ("cat", "dog")
    assert source.labels().tolist() == [0, 1]


def test_the_spec_of_a_relative_path_opens_it_from_anywhere(tmp_path, monkeypatch):
    save_image(tmp_path / "photos" / "a.png")
    (tmp_path / "digits").mkdir()
    write_idx(tmp_path / "digits", np.ones((2, 28, 28)), np.arange(2))
    np.savez(tmp_path / "some.npz", np.ones((2, 8, 8, 3), dtype=np.uint8))
    monkeypatch.chdir(tmp_path)
    sources = [open_source("photos", image_size=8), open_source("idx:digits"), open_source("some.npz")]
    monkeypatch.chdir(tmp_path / "photos")
    for source in sources:
        assert open_source(source.spec, source.image_shape[1]).fingerprint == source.fingerprint


def test_a_path_that_does_not_exist_is_said_to_be_missing(tmp_path):
    with pytest.raises(ValueError, match="missing does not exist"):
        open_source(str(tmp_path / "missing"))
