import importlib.util
import io
import json
import re
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from jlt.data import encode, open_latents, open_source
from jlt.data.classes import imagenet_classes, readable
from jlt.data.images import adm_crop, read_image

IDS = list(imagenet_classes())


def test_imagenet_has_a_thousand_ids_in_order_with_names_of_their_own():
    names = imagenet_classes()
    assert len(names) == 1000
    assert sorted(names) == list(names)
    assert all(re.fullmatch(r"n\d{8}", wordnet_id) for wordnet_id in names)
    assert len({name.lower() for name in names.values()}) == 1000
    # known places in the list of labels
    assert {k: names[IDS[k]] for k in (0, 207, 388, 609, 999)} == {
        0: "tench", 207: "golden retriever", 388: "giant panda", 609: "jeep", 999: "toilet tissue"
    }  # fmt: skip


def test_words_shared_by_two_classes_carry_the_id():
    shared = {wordnet_id: name for wordnet_id, name in imagenet_classes().items() if wordnet_id in name}
    assert {name.split(" (")[0].lower() for name in shared.values()} == {"crane", "maillot", "cardigan"}
    assert all(name.endswith(f" ({wordnet_id})") for wordnet_id, name in shared.items())
    assert len(shared) == 6


def test_names_that_are_not_all_wordnet_ids_stay():
    assert readable(["n01440764", "fish"]) == ("n01440764", "fish")
    assert readable(["n01440764", "n99999999"]) == ("tench", "n99999999")


@pytest.fixture(scope="session")
def photographs() -> dict[Path, int]:
    """The 20 ImageNet photographs that the package foolbox carries, with their labels."""
    package = importlib.util.find_spec("foolbox")
    assert package is not None, "the photographs come in the package foolbox, which is not installed"
    assert package.origin is not None
    found = sorted((Path(package.origin).parent / "data").glob("imagenet_*.jpg"))
    assert len(found) == 20
    return {path: int(path.stem.split("_")[2]) for path in found}


@pytest.fixture(scope="session")
def imagenet(photographs, tmp_path_factory):
    """The photographs as ImageNet is downloaded: a folder a WordNet id."""
    root = tmp_path_factory.mktemp("imagenet") / "train"
    for path, label in photographs.items():
        (root / IDS[label]).mkdir(parents=True, exist_ok=True)
        shutil.copy(path, root / IDS[label] / path.name)
    return root


def test_imagenet_as_downloaded_has_labels_by_id_and_names_in_words(imagenet, photographs):
    source = open_source(str(imagenet), 64)
    present = sorted(set(photographs.values()))
    assert source.class_names == tuple(imagenet_classes()[IDS[k]] for k in present)
    assert [present[label] for label in source.labels()] == sorted(photographs.values())


def halving(n):
    """Return the matrix that averages n pixels to n // 2: each those whose centres lie in its share of the length."""
    share = n / (n // 2)
    centres, middles = np.arange(n) + 0.5, (np.arange(n // 2)[:, None] + 0.5) * share
    inside = (centres > middles - share / 2) & (centres <= middles + share / 2)
    return inside / inside.sum(1, keepdims=True)


def stated_crop(pixels, size):
    """ADM's rule: halve while the short side is twice the size or more, bicubic to the size, centre square."""
    while min(pixels.shape[:2]) >= 2 * size:
        rows, columns = (halving(n) for n in pixels.shape[:2])
        pixels = np.floor(
            np.einsum("hwc,jw->hjc", pixels.astype(float), columns, optimize=True) + 0.5
        )  # 8 bits after each axis, as Pillow
        pixels = np.floor(np.einsum("ih,hjc->ijc", rows, pixels, optimize=True) + 0.5).astype(np.uint8)
    height, width = pixels.shape[:2]
    ratio = size / min(height, width)
    resized = Image.fromarray(pixels).resize((round(width * ratio), round(height * ratio)), Image.Resampling.BICUBIC)
    top, left = (resized.height - size) // 2, (resized.width - size) // 2
    return np.asarray(resized)[top : top + size, left : left + size]


@pytest.mark.parametrize("size", [64, 256, 512])
def test_photographs_are_cropped_by_the_adm_rule(photographs, size):
    for path in photographs:
        image = read_image(path)
        crop = adm_crop(image, size)
        assert crop.shape == (size, size, 3)
        np.testing.assert_array_equal(crop, stated_crop(np.asarray(image), size))


@pytest.fixture(scope="session")
def same_images(imagenet, tmp_path_factory):
    """The same photographs in the same order as a folder, as tar shards, and as parquet files."""
    import pyarrow
    import pyarrow.parquet

    root = tmp_path_factory.mktemp("forms")
    (root / "tar").mkdir()
    (root / "parquet").mkdir()
    names = sorted(folder.name for folder in imagenet.iterdir())
    files = [(file, label) for label, name in enumerate(names) for file in sorted((imagenet / name).iterdir())]
    (root / "tar" / "classes.txt").write_text("\n".join(names) + "\n")
    for k, part in enumerate((files[:7], files[7:])):
        with tarfile.open(root / "tar" / f"train-{k:04d}.tar", "w") as archive:
            for file, label in part:
                for suffix, content in ((".jpg", file.read_bytes()), (".cls", str(label).encode())):
                    header = tarfile.TarInfo(file.stem + suffix)
                    header.size = len(content)
                    archive.addfile(header, io.BytesIO(content))
        table = pyarrow.table(
            {
                "image": [{"bytes": file.read_bytes(), "path": file.name} for file, _ in part],
                "label": [label for _, label in part],
            }
        )
        features = {"image": {"_type": "Image"}, "label": {"_type": "ClassLabel", "names": names}}
        table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
        pyarrow.parquet.write_table(table, root / "parquet" / f"train-{k:05d}-of-00002.parquet", row_group_size=4)
    return {
        "folder": f"folder:{imagenet}",
        "tar": f"tar:{root}/tar/train-{{0000..0001}}.tar",
        "parquet": f"parquet:{root / 'parquet'}",
    }


@pytest.mark.parametrize("size", [256, 512])
def test_a_folder_tar_shards_and_parquet_files_give_identical_pixels_and_labels(same_images, size):
    sources = {kind: open_source(spec, size, upscale=True) for kind, spec in same_images.items()}
    folder = sources["folder"]
    for source in sources.values():
        assert source.labels().tolist() == folder.labels().tolist()
        assert source.class_names == folder.class_names
        for i in range(0, 20, 1 if size == 256 else 5):
            image, label = source[i]
            np.testing.assert_array_equal(image, folder[i][0])
            assert (image.shape, label) == ((3, size, size), folder.labels()[i])


def test_their_latents_are_the_same_bytes(same_images, tmp_path):
    for kind, spec in same_images.items():
        encode(spec, tmp_path / kind, image_size=32, num_held_out=5, mirrored=True, shard_size=8)
    for split in ("train", "held-out"):
        promised = {kind: open_latents(tmp_path / kind, split).manifest for kind in same_images}
        assert promised["folder"].shards == promised["tar"].shards == promised["parquet"].shards
        assert promised["folder"].class_names == promised["tar"].class_names == promised["parquet"].class_names


@pytest.mark.parametrize("kind", ["folder", "tar", "parquet"])
def test_every_kind_refuses_a_small_image_unless_upscaling_is_asked_for(same_images, kind):
    small = open_source(same_images[kind], 2048)
    with pytest.raises(ValueError, match=r"is \d+ x \d+, smaller than the crop of 2048; .* upscaling"):
        small[0]
    assert open_source(same_images[kind], 1024, upscale=True)[0][0].shape == (3, 1024, 1024)
    assert open_source(same_images[kind]).image_shape == (3, 256, 256)


@pytest.mark.parametrize(("beside", "count"), [("samples.json", 2), ("notes.json", 4)])
def test_sheets_of_samples_are_no_samples(tmp_path, beside, count):
    for name in ("000000.png", "000001.png", "grid.png", "strip.png"):
        Image.new("L", (8, 8)).save(tmp_path / name)
    (tmp_path / beside).write_text("{}")
    assert len(open_source(str(tmp_path), 8)) == count
