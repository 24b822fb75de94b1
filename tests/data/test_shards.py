import dataclasses
import json
import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from jlt import files
from jlt.data import Affine, Manifest, open_latents, splits
from jlt.data.representations import Pixels
from jlt.data.shards import read_manifest, shard_name

SHAPE = (3, 2, 2)


def write_split(folder, latents, labels, mirrored=None, shard_size=40, class_names=("a", "b"), **changes):
    """Write a split by hand: latents as they are, an affine that is not trivial, statistics measured in one piece."""
    folder.mkdir(parents=True, exist_ok=True)
    Pixels(SHAPE[0]).save(folder.parent / "representation")
    affine = Affine((0.5, -1.0, 2.0), (2.0, 0.5, 1.25))
    z = affine.normalise(latents.float()).double()
    shards = []
    for k, start in enumerate(range(0, len(latents), shard_size)):
        part = slice(start, start + shard_size)
        tensors = {"latents": latents[part].clone(), "labels": labels[part].clone()}
        if mirrored is not None:
            tensors["mirrored"] = mirrored[part].clone()
        save_file(tensors, folder / shard_name(k))
        shards.append((shard_name(k), len(tensors["labels"]), files.sha256(folder / shard_name(k))))
    manifest = Manifest(
        split="train", num_images=len(latents), shard_size=shard_size, shape=SHAPE, class_names=class_names, source={},
        representation="pixels", representation_fingerprint=Pixels(SHAPE[0]).fingerprint, affine=affine,
        mean=tuple(z.mean((0, 2, 3)).tolist()), variance=tuple(z.var((0, 2, 3), correction=0).tolist()),
        mirrored=mirrored is not None, shards=tuple(shards),
    )  # fmt: skip
    dataclasses.replace(manifest, **changes).write(folder)
    return z.float()


def random_latents(number=100, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(number, *SHAPE, generator=generator).half(), torch.arange(number) % 2


@pytest.fixture
def folder(tmp_path):
    write_split(tmp_path / "train", *random_latents())
    return tmp_path


def edit(folder, **changes):
    path = folder / "train" / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def refused(folder, complaint, **options):
    with pytest.raises(ValueError, match=complaint) as caught:
        open_latents(folder, **options)
    assert "\n" not in str(caught.value)
    assert str(folder) in str(caught.value) or "split" in str(caught.value)


@given(st.integers(1, 4), st.floats(-100, 100), st.floats(1e-3, 1e3), st.integers(0, 99))
@settings(deadline=None, max_examples=40)
def test_restoring_undoes_normalising(channels, shift, scale, seed):
    raw = torch.randn(2, channels, 3, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    affine = Affine((shift,) * channels, (scale,) * channels)
    torch.testing.assert_close(affine.restore(affine.normalise(raw)), raw, rtol=1e-12, atol=1e-12)


def test_normalising_takes_the_shift_before_the_scale():
    raw = torch.tensor([3.0, 10.0]).reshape(1, 2, 1, 1)
    assert Affine((1.0, 4.0), (2.0, 0.5)).normalise(raw).flatten().tolist() == [4.0, 3.0]


def test_an_affine_of_other_channels_is_refused():
    with pytest.raises(ValueError, match="affine has 2 channels, the latents have 3"):
        Affine((0.0, 0.0), (1.0, 1.0)).normalise(torch.zeros(1, 3, 1, 1))


@given(st.lists(st.integers(0, 99), max_size=30))
@settings(deadline=None, max_examples=30)
def test_gathering_is_indexing_across_shards(tmp_path_factory, indices):
    folder = tmp_path_factory.getbasetemp() / "gathered"
    (raw, labels), (mirrored, _) = random_latents(), random_latents(seed=1)
    z = write_split(folder / "train", raw, labels, mirrored)
    latents = open_latents(folder)
    z_mirrored = latents.manifest.affine.normalise(mirrored.float())
    flags = torch.tensor([i % 3 == 0 for i in range(len(indices))], dtype=torch.bool)
    assert torch.equal(latents.gather(indices), z[torch.tensor(indices, dtype=torch.int64)])
    both = latents.gather(torch.tensor(indices, dtype=torch.int64), flags)
    for row, index, flag in zip(both, indices, flags, strict=True):
        assert torch.equal(row, (z_mirrored if flag else z)[index])
    assert latents.labels.tolist() == labels.tolist()


def test_the_statistics_of_all_latents_are_those_of_one_tensor(tmp_path):
    z = write_split(tmp_path / "train", *random_latents(700)).double()  # more than one piece of 512
    mean, variance = open_latents(tmp_path).statistics()
    torch.testing.assert_close(mean, z.mean((0, 2, 3)))
    torch.testing.assert_close(variance, z.var((0, 2, 3), correction=0))


def test_unlabelled_latents_have_no_classes(tmp_path):
    raw, _ = random_latents()
    write_split(tmp_path / "train", raw, torch.full((100,), -1), class_names=None)
    latents = open_latents(tmp_path)
    assert latents.num_classes == 0
    assert (latents.labels == 0).all()


def test_indices_out_of_range_are_refused(folder):
    for indices in ([-1, 3], [100]):
        with pytest.raises(ValueError, match="there are 100 latents"):
            open_latents(folder).gather(indices)


def test_mirrored_latents_that_are_not_there_are_refused(folder):
    with pytest.raises(ValueError, match="no mirrored latents"):
        open_latents(folder).gather([0, 1], torch.tensor([False, True]))


def test_a_missing_split_is_refused_with_those_there_are(folder):
    refused(folder, "unknown split 'trian', did you mean 'train'", split="trian")
    assert splits(folder) == ["train"]


def test_a_folder_must_be_a_folder_of_latents(tmp_path):
    (tmp_path / "file").write_text("")
    (tmp_path / "empty").mkdir()
    refused(tmp_path / "file", "is a file; a folder of latents is wanted")
    refused(tmp_path / "nothing", "is not there; a folder of latents is wanted")
    refused(tmp_path / "empty", "holds neither of train and held-out")


def test_unfinished_latents_are_refused(folder):
    (folder / "train" / "manifest.json").unlink()
    refused(folder, "the last file that encoding writes")


def test_a_missing_shard_is_named(folder):
    (folder / "train" / shard_name(1)).unlink()
    refused(folder, "lacks shard-00001.safetensors; the manifest lists 3 shards")


def test_a_surplus_shard_is_named(folder):
    (folder / "train" / shard_name(3)).write_bytes(b"")
    refused(folder, "holds shard-00003.safetensors; the manifest lists only 3 shards")


@pytest.mark.parametrize("length", [0, 7, 100, -1])
def test_a_truncated_shard_is_named(folder, length):
    shard = folder / "train" / shard_name(1)
    shard.write_bytes(shard.read_bytes()[:length])
    refused(folder, "shard-00001.safetensors is not a whole safetensors file")


def test_a_flipped_bit_is_found_when_asked(folder):
    shard = folder / "train" / shard_name(2)
    data = bytearray(shard.read_bytes())
    data[-3] ^= 1
    shard.write_bytes(data)
    open_latents(folder)
    refused(folder, r"shard-00002.safetensors has SHA-256 \w+\.\.\., the manifest promises", verify=True)


def test_a_pickle_runs_no_code(folder, tmp_path):
    class Hostile:
        def __reduce__(self):
            return (print, ("code was run",), None)

    (folder / "train" / shard_name(0)).write_bytes(pickle.dumps(Hostile()))
    refused(folder, "shard-00000.safetensors is not a whole safetensors file")


def test_a_shard_that_links_to_itself_is_refused(folder):
    shard = folder / "train" / shard_name(0)
    shard.unlink()
    shard.symlink_to(shard.name)
    refused(folder, "shard-00000.safetensors")


@pytest.mark.parametrize(
    ("tensors", "complaint"),
    [
        ({"labels": torch.zeros(40, dtype=torch.int64)}, r"holds \['labels'\], the manifest promises"),
        ({"latents": torch.zeros(40, *SHAPE), "labels": torch.zeros(40).long()}, "latents is torch.float32"),
        ({"latents": torch.zeros(40, 4, 2, 2).half(), "labels": torch.zeros(40).long()}, r"\[40, 4, .*\[40, 3, "),
        ({"latents": torch.zeros(39, *SHAPE).half(), "labels": torch.zeros(39).long()}, r"\[39, .*\[40, "),
    ],
)  # fmt: skip
def test_a_shard_of_other_tensors_is_refused(folder, tensors, complaint):
    save_file(tensors, folder / "train" / shard_name(0))
    refused(folder, complaint)


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"format_version": 2}, "format version 2, this jlt reads 1"),
        ({"surprise": 1}, "holds unknown surprise"),
        ({"shape": [3, 2]}, r"malformed entry: shape must be three numbers, got \[3, 2\]"),
        ({"shape": [3, 2, 10**9]}, r"shape must be in \[1, 65536\], got \[3, 2, 1000000000\]"),
        ({"shape": ["x", 2, 2]}, "malformed entry"),
        ({"dtype": "float64"}, "dtype is 'float64', this jlt reads float16"),
        ({"mean": [0.0]}, "mean has 1 entries, the latents have 3 channels"),
        ({"variance": [1.0, float("nan"), 1.0]}, "variance must be finite"),
        ({"variance": [1.0, -1.0, 1.0]}, "variance must be at least 0, got -1.0"),
        ({"affine": {"shift": [0, 0, 0], "scale": [1, 0, 1]}}, "affine scale must be above 0, got 0.0"),
        ({"affine": [1, 2]}, "malformed entry"),
        ({"num_images": 0}, "must be at least 1, got 0 and 40"),
        ({"num_images": 10**15}, "in shards of 40 make .* it lists 3 with 100 images"),
        ({"num_images": 101}, "101 images in shards of 40 make 3 shards, it lists 3 with 100 images"),
        ({"num_images": float("inf")}, "malformed entry"),
        ({"shard_size": -1}, "must be at least 1, got 100 and -1"),
        ({"mirrored": "no"}, "mirrored must be true or false, got 'no'"),
        ({"mirrored": True}, r"holds \['labels', 'latents'\], the manifest promises .*'mirrored'"),
        ({"class_names": ["a"]}, "labels are 0 to 1, the manifest allows 0 to 0"),
        ({"class_names": None}, "labels are 0 to 1, the manifest allows -1 to -1"),
        ({"shards": [["../x", 40, ""], ["y", 40, ""], ["z", 20, ""]]}, "shards must be named shard-00000.safetensors"),
        ({"variance": [9.0, 9.0, 9.0]}, "the manifest promises variance 9"),
        ({"mean": [0.0, 0.0, 5.0]}, "deviations off"),
    ],
)
def test_a_manifest_that_contradicts_itself_or_the_latents_is_refused(folder, changes, complaint):
    edit(folder, **changes)
    refused(folder, complaint)


@pytest.mark.parametrize("key", [field.name for field in dataclasses.fields(Manifest)])
def test_a_manifest_without_a_key_is_refused(folder, key):
    path = folder / "train" / "manifest.json"
    path.write_text(json.dumps({name: value for name, value in json.loads(path.read_text()).items() if name != key}))
    refused(folder, key.replace("_", "."))


@pytest.mark.parametrize(
    "content", ["", "[1]", "null", "\xff", "[" * 100_000, '{"format_version": 1' + "0" * 9999 + "}"]
)
def test_a_manifest_that_is_none_is_refused(folder, content):
    (folder / "train" / "manifest.json").write_text(content, encoding="latin-1")
    refused(folder, r"manifest\.json")


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)


@given(
    st.dictionaries(st.sampled_from([field.name for field in dataclasses.fields(Manifest)]), json_values, max_size=3)
)
@settings(deadline=None, max_examples=200)
def test_any_manifest_is_read_or_a_value_error_that_names_it(tmp_path_factory, changes):
    folder = tmp_path_factory.getbasetemp() / "fuzzed"
    if not folder.exists():
        write_split(folder / "train", *random_latents())
        (folder / "train" / "manifest.json").rename(folder / "good.json")
    path = folder / "train" / "manifest.json"
    path.write_text(json.dumps(json.loads((folder / "good.json").read_text()) | changes))
    try:
        outcome: object = read_manifest(folder / "train")
    except ValueError as error:
        outcome = str(error)
    assert isinstance(outcome, Manifest) or str(path) in str(outcome)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_one_value_that_is_not_finite_is_found_in_a_small_split(tmp_path, value):
    raw, labels = random_latents(1000)
    write_split(tmp_path / "train", raw, labels)
    statistics = json.loads((tmp_path / "train" / "manifest.json").read_text())
    raw[541, 1, 0, 1] = value
    write_split(tmp_path / "train", raw, labels, mean=tuple(statistics["mean"]), variance=tuple(statistics["variance"]))
    refused(tmp_path, "the latents of image 541 are not finite")


def test_a_manifest_of_another_split_is_refused(folder):
    (folder / "train").rename(folder / "held-out")
    with pytest.raises(ValueError, match="is of the split 'train', its folder is 'held-out'"):
        open_latents(folder, "held-out")


def test_latents_beside_another_representation_are_refused(folder):
    Pixels(1).save(folder / "representation")
    with pytest.raises(ValueError, match=r"has fingerprint .*, the latents beside it were made with"):
        open_latents(folder)
