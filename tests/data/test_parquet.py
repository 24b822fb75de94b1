import io
import json
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from PIL import Image

from jlt.data import open_source, parquet
from jlt.data.images import BrokenImage

CELL = pyarrow.struct([("bytes", pyarrow.binary()), ("path", pyarrow.string())])


def png(value=0):
    file = io.BytesIO()
    Image.new("RGB", (8, 8), (value % 256, value // 256, 0)).save(file, format="PNG")
    return file.getvalue()


def write(path, values, labels=None, *, names=None, image="image", label="label", plain=False, group=4):
    """Write images of constant colours by groups of rows, with the Hub's metadata where there are names."""
    path.parent.mkdir(parents=True, exist_ok=True)
    cells = [png(value) if plain else {"bytes": png(value), "path": None} for value in values]
    columns = {"id": pyarrow.array(range(len(values))), image: pyarrow.array(cells, None if plain else CELL)}
    if labels is not None:
        columns[label] = pyarrow.array(labels)
    table = pyarrow.table(columns)
    if names is not None:
        features = {image: {"_type": "Image"}, label: {"_type": "ClassLabel", "names": names}}
        table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    pyarrow.parquet.write_table(table, path, row_group_size=group)
    return path


def value(source, i):
    image, _ = source[i]
    return int(image[0, 0, 0]) + 256 * int(image[1, 0, 0])


@pytest.mark.parametrize("plain", [False, True])
def test_rows_come_in_the_order_of_files_and_rows_whatever_the_groups(tmp_path, plain):
    write(tmp_path / "train-00001.parquet", range(11, 30), [k % 3 for k in range(11, 30)], plain=plain, group=7)
    write(tmp_path / "train-00000.parquet", range(11), [k % 3 for k in range(11)], plain=plain, group=3)
    source = open_source(f"parquet:{tmp_path}", 8)
    assert source.class_names == ("0", "1", "2")
    assert source.labels().tolist() == [k % 3 for k in range(30)]
    for i in np.random.default_rng(0).permutation(30).tolist():
        assert value(source, i) == i
        assert source[i][1] == i % 3
    assert open_source(source.spec, 8) == source


def test_columns_and_class_names_are_what_the_metadata_says(tmp_path):
    path = write(tmp_path / "a.parquet", range(3), [1, 0, 1], names=["ant", "bee"], image="photo", label="insect")
    source = open_source(f"parquet:{path}", 8)
    assert source.class_names == ("ant", "bee")
    assert source.labels().tolist() == [1, 0, 1]


def test_columns_can_be_named_and_words_are_classes_in_their_order(tmp_path):
    path = write(tmp_path / "a.parquet", range(3), ["cow", "ant", "bee"], image="photo", label="animal")
    with pytest.raises(ValueError, match="has the columns id, photo, animal; which holds the images"):
        open_source(f"parquet:{path}", 8)
    source = open_source(f"parquet:{path}#photo,animal", 8)
    assert source.class_names == ("ant", "bee", "cow")
    assert source.labels().tolist() == [2, 0, 1]
    assert open_source(source.spec, 8) == source
    unlabelled = open_source(f"parquet:{path}#photo", 8)
    assert unlabelled.class_names is None
    assert unlabelled.labels().tolist() == [-1, -1, -1]
    with pytest.raises(ValueError, match=r"unknown column of .* 'phot', did you mean 'photo'"):
        open_source(f"parquet:{path}#phot", 8)


@pytest.mark.parametrize(
    ("labels", "names", "message"),
    [
        ([0, 1, 2], ["ant", "bee"], "image 2 has the label 2, there are 2 class names"),
        ([0, -1, 1], ["ant", "bee"], "image 1 has the label -1"),
        ([0, None, 1], None, "image 1 has the label -1"),
        ([0.5, 1.0, 2.0], None, "column 'label' is of double, numbers or words are wanted"),
        ([0, 1, 1], ["ant", "ant"], "class name 'ant' stands there twice"),
        ([0, 1, 10**15], None, "image 2 has the label 1000000000000000"),
    ],
)
def test_labels_that_do_not_fit_are_one_line(tmp_path, labels, names, message):
    path = write(tmp_path / "a.parquet", range(3), labels, names=names)
    with pytest.raises(ValueError, match=message):
        open_source(f"parquet:{path}", 8)


def test_the_labels_of_a_test_split_that_are_all_hidden_are_none(tmp_path):
    path = write(tmp_path / "a.parquet", range(3), [-1, -1, -1], names=["ant", "bee"])
    assert open_source(f"parquet:{path}", 8).class_names is None


def test_a_cell_without_bytes_is_a_broken_image_with_its_place(tmp_path):
    cells = pyarrow.array([{"bytes": png(), "path": None}, {"bytes": None, "path": "/etc/passwd"}, None], CELL)
    pyarrow.parquet.write_table(pyarrow.table({"image": cells}), tmp_path / "a.parquet")
    source = open_source(f"parquet:{tmp_path}", 8)
    with pytest.raises(BrokenImage, match=r"a\.parquet: image 1 of row group 0 is a path"):
        source[1]
    with pytest.raises(BrokenImage, match=r"a\.parquet: image 2 of row group 0 is no bytes"):
        source[2]


@pytest.mark.parametrize("damage", [lambda b: b[:100], lambda b: b[:-4], lambda b: b"", lambda b: b[:-60] + bytes(60)])
def test_a_damaged_file_is_named(tmp_path, damage):
    path = write(tmp_path / "a.parquet", range(3), [0, 1, 2])
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(ValueError, match=r"a\.parquet cannot be read as parquet") as caught:
        open_source(f"parquet:{path}", 8)
    assert "\n" not in str(caught.value)


def test_row_groups_kept_are_bounded_and_each_is_read_once_for_all_threads(tmp_path, monkeypatch):
    write(tmp_path / "a.parquet", range(400), group=20)
    source = open_source(f"parquet:{tmp_path}", 8)
    groups, loaded, lock = source.read.__self__, [], threading.Lock()
    load = groups.load

    def counted(k):
        with lock:
            loaded.append(k)
        return load(k)

    monkeypatch.setattr(groups, "load", counted)
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(lambda i: value(source, i), range(400))) == list(range(400))
    assert sorted(loaded) == list(range(20))
    size = load(0).nbytes
    monkeypatch.setattr(parquet, "CACHE_BYTES", int(2.5 * size))
    for i in range(400):
        source[i]
        assert len(groups.kept) <= 2
    monkeypatch.setattr(parquet, "CACHE_BYTES", 0)
    source[0]
    assert list(groups.kept) == [0]


def test_a_row_group_that_would_not_fit_is_refused_with_both_sizes(tmp_path, monkeypatch):
    path = write(tmp_path / "a.parquet", range(8))
    monkeypatch.setattr(parquet, "MAX_GROUP", 100)
    with pytest.raises(ValueError, match=r"row group 1 holds \d+ bytes, at most 100 are read at once"):
        open_source(f"parquet:{path}", 8)[5]


def test_files_of_several_splits_are_not_mixed(tmp_path):
    for split in ("train", "test"):
        write(tmp_path / "data" / f"{split}-00000-of-00001.parquet", range(3), [0, 1, 2])
    with pytest.raises(ValueError, match=f"files of the splits test and train; write hf:{tmp_path}@train"):
        open_source(f"parquet:{tmp_path}", 8)


def test_a_remote_file_is_read_in_parts(tmp_path, monkeypatch):
    fsspec = pytest.importorskip("fsspec")
    monkeypatch.setenv("JLT_HOME", str(tmp_path / "home"))
    path = write(tmp_path / "a.parquet", range(6), [0, 1, 2, 0, 1, 2])
    with fsspec.open("memory://parquet-parts/a.parquet", "wb") as file:
        file.write(path.read_bytes())
    source, local = open_source("parquet:memory://parquet-parts", 8), open_source(f"parquet:{path}", 8)
    assert [value(source, i) for i in range(6)] == list(range(6))
    assert source.fingerprint == local.fingerprint
    assert not (tmp_path / "home").exists()


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A folder laid out like a data set of the Hub, written by the Hub's own library."""
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    datasets.disable_progress_bars()
    features = datasets.Features({"img": datasets.Image(), "fine_label": datasets.ClassLabel(names=["ant", "bee"])})
    for split, count in {"train": 5, "test": 3}.items():
        images = [Image.fromarray(np.full((8, 8, 3), [k, 0, 0], dtype=np.uint8)) for k in range(count)]
        rows = {"img": images, "fine_label": [k % 2 for k in range(count)]}
        (tmp_path / "animals" / "data").mkdir(parents=True, exist_ok=True)
        table = datasets.Dataset.from_dict(rows, features=features)
        table.to_parquet(tmp_path / "animals" / "data" / f"{split}-00000-of-00001.parquet")
    return tmp_path / "animals"


def test_a_data_set_of_the_hub_is_opened_by_split(hub):
    for split, count in {"": 5, "@train": 5, "@test": 3}.items():
        source = open_source(f"hf:{hub}{split}", 8)
        assert source.class_names == ("ant", "bee")
        assert source.labels().tolist() == [k % 2 for k in range(count)]
        assert [value(source, i) for i in range(count)] == list(range(count))
        assert open_source(source.spec, 8) == source
    with pytest.raises(ValueError, match=r"unknown split of .* 'tran', did you mean 'train'"):
        open_source(f"hf:{hub}@tran")
    with pytest.raises(ValueError, match=r"unknown column .* 'image'"):
        open_source(f"hf:{hub}#image")


def test_a_data_set_that_brings_code_is_not_run(tmp_path):
    marker = tmp_path / "ran"
    (tmp_path / "evil").mkdir()
    (tmp_path / "evil" / "evil.py").write_text(f"open({str(marker)!r}, 'w')\n")
    with pytest.raises(ValueError, match="evil cannot be opened") as caught:
        open_source(f"hf:{tmp_path / 'evil'}")
    assert not marker.exists()
    assert "\n" not in str(caught.value)


def test_a_data_set_that_cannot_be_reached_is_one_line(tmp_path, monkeypatch, capfd):
    huggingface_hub = pytest.importorskip("huggingface_hub")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError, match="the data set nobody/nothing cannot be opened: Couldn't reach") as caught:
        open_source("hf:nobody/nothing")
    assert "\n" not in str(caught.value)
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize(
    ("package", "spec"),
    [("datasets", "hf:nobody/nothing"), ("pyarrow.parquet", "parquet:{}"), ("fsspec", "memory://nothing")],
)
def test_a_missing_package_is_one_line_that_names_the_extra(tmp_path, monkeypatch, package, spec):
    path = write(tmp_path / "a.parquet", range(3))
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ValueError, match=rf"import of {package} halted; None in sys.modules; pip install 'jlt\[hub\]'"):
        open_source(spec.format(path))


def test_a_data_set_of_other_files_is_told_so(tmp_path):
    for name in ("train/a/1.png", "train/b/2.png"):
        (tmp_path / "photos" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "photos" / name).write_bytes(png())
    with pytest.raises(ValueError, match=r"made of files like \d\.png; parquet is wanted"):
        open_source(f"hf:{tmp_path / 'photos'}")
