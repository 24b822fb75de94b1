import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from jlt import files
from jlt.data import (
    Subset,
    encode,
    held_out_indices,
    load_representation,
    open_latents,
    open_source,
    real_images,
    reconstruct,
)
from jlt.data.writing import fit_affine

NUMBER = 14


class Stopped(Exception):
    """What the tests interrupt an encoding with."""


@pytest.fixture
def photos(tmp_path):
    """Two classes of seven 8 x 8 images whose neighbouring pixels are alike."""
    generator = np.random.default_rng(0)
    for i in range(NUMBER):
        folder = tmp_path / "photos" / ("cat" if i % 2 else "dog")
        folder.mkdir(parents=True, exist_ok=True)
        pixels = 128 + 10 * generator.normal(size=(8, 8, 3)).cumsum(0).cumsum(1)
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(folder / f"{i:02}.png")
    return tmp_path / "photos"


def name_of(source, i):
    """Return the path of a photograph."""
    return Path(source.read(i)[1])


OPTIONS = {"image_size": 8, "num_held_out": 4, "shard_size": 3, "mirrored": True}


def contents(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def encoded(photos, tmp_path):
    encode(str(photos), tmp_path / "latents", **OPTIONS)
    return tmp_path / "latents"


def test_images_encoded_as_other_latents_are_get_the_same_latents(encoded, photos, tmp_path):
    for name in ("dog", "cat"):
        encode(str(photos / name), tmp_path / name, image_size=8, representation=f"of:{encoded}", num_held_out=1)
    whole = open_latents(encoded)
    known = {bytes(latent.numpy()) for latent in whole.gather(torch.arange(len(whole)))}
    for name in ("dog", "cat"):
        part = open_latents(tmp_path / name)
        assert part.manifest.affine == whole.manifest.affine
        assert part.manifest.representation_fingerprint == whole.manifest.representation_fingerprint
        assert sum(bytes(latent.numpy()) in known for latent in part.gather(torch.arange(len(part)))) >= 4
    before = contents(tmp_path / "cat")
    moved = encoded.rename(tmp_path / "moved")  # what is taken is known by what it is, not by where it lies
    encode(str(photos / "cat"), tmp_path / "cat", image_size=8, representation=f"of:{moved}", num_held_out=1)
    assert contents(tmp_path / "cat") == before


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"normalise": "channel"}, "has its own normalisation, got normalise channel"),
        ({"stride": 2}, "has its own stride and channels, got stride 2"),
        ({"image_size": 6}, r"images are 6 x 6, of:.* has patches of 4"),
    ],
)
def test_other_latents_representation_is_taken_whole(options, message, encoded, photos, tmp_path):
    with pytest.raises(ValueError, match=message):
        encode(str(photos / "cat"), tmp_path / "out", representation=f"of:{encoded}", **{"image_size": 8} | options)
    assert not (tmp_path / "out").exists()


def test_latents_are_the_representations_output_of_the_splits_images(encoded):
    representation = load_representation(encoded / "representation")
    for split, number in (("train", 10), ("held-out", 4)):
        latents, images = open_latents(encoded, split, verify=True), real_images(encoded, split)
        assert len(latents) == len(images) == number
        assert latents.labels.tolist() == images.labels().tolist()
        for i in range(number):
            raw = representation.encode(torch.from_numpy(images[i][0])[None]).half().float()
            assert torch.equal(latents.gather([i]), latents.manifest.affine.normalise(raw))


def test_mirrored_latents_are_those_of_the_mirrored_images(encoded):
    representation, images = load_representation(encoded / "representation"), real_images(encoded, "train")
    latents = open_latents(encoded)
    raw = representation.encode(torch.from_numpy(images[4][0])[None].flip(3)).half().float()
    assert torch.equal(latents.gather([4], torch.tensor([True])), latents.manifest.affine.normalise(raw))
    assert not open_latents(encoded, "held-out").manifest.mirrored


def test_the_splits_share_no_image_and_hold_all(photos, encoded):
    source = open_source(str(photos), 8)
    everything = sorted(source[i][0].tobytes() for i in range(NUMBER))
    parts = [real_images(encoded, split) for split in ("train", "held-out")]
    assert sorted(part[i][0].tobytes() for part in parts for i in range(len(part))) == everything
    assert np.bincount(parts[1].labels()).tolist() == [2, 2]


def test_shards_hold_slices_of_the_ordered_images(encoded):
    sizes = [len(load_file(path)["labels"]) for path in sorted((encoded / "train").glob("shard-*.safetensors"))]
    assert sizes == [3, 3, 3, 1]


def test_the_global_affine_makes_the_mean_channel_variance_1(encoded):
    latents = open_latents(encoded)
    mean, variance = latents.statistics()
    assert variance.mean().item() == pytest.approx(1, abs=1e-6)  # normalised in float32
    assert mean.abs().max() < 1e-5
    assert len(set(latents.manifest.affine.scale)) == 1
    np.testing.assert_allclose(latents.manifest.variance, variance, atol=1e-6)


def test_the_channel_affine_makes_every_variance_1(photos, tmp_path):
    encode(str(photos), tmp_path / "latents", image_size=8, channels=6, normalise="channel")
    mean, variance = open_latents(tmp_path / "latents").statistics()
    np.testing.assert_allclose(variance, 1, atol=1e-5)
    assert mean.abs().max() < 1e-5


def test_held_out_latents_take_the_affine_of_the_training_latents(encoded):
    train, held_out = (open_latents(encoded, split).manifest for split in ("train", "held-out"))
    assert held_out.affine == train.affine
    mean, variance = open_latents(encoded, "held-out").statistics()
    np.testing.assert_allclose(held_out.mean, mean, atol=1e-6)
    np.testing.assert_allclose(held_out.variance, variance, atol=1e-5)


def test_the_representation_never_sees_the_held_out_images(photos, encoded, tmp_path):
    held_out = real_images(encoded, "held-out")
    for i in held_out.indices:
        path = name_of(held_out.source, i)
        Image.new("RGB", (8, 8), (255, 0, 255)).save(path)
    encode(str(photos), tmp_path / "again", **OPTIONS)
    again, before = contents(tmp_path / "again"), contents(encoded)
    for name in before:
        if name.startswith(("representation", "train/shard")):
            assert again[name] == before[name]
    assert again["held-out/shard-00000.safetensors"] != before["held-out/shard-00000.safetensors"]


@pytest.mark.parametrize("batch_size", [1, 2, 5, 256])
def test_no_byte_depends_on_the_batch_size(photos, encoded, tmp_path, batch_size):
    encode(str(photos), tmp_path / "again", batch_size=batch_size, **OPTIONS)
    assert contents(tmp_path / "again") == contents(encoded)


def test_latents_do_not_depend_on_the_shard_size(photos, encoded, tmp_path):
    encode(str(photos), tmp_path / "again", **OPTIONS | {"shard_size": 4})
    assert torch.equal(
        open_latents(tmp_path / "again").gather(range(10)), open_latents(encoded).gather(range(10))
    )  # fmt: skip


def test_a_shard_depends_on_nothing_but_its_slice(photos, tmp_path):
    source = open_source(str(photos), 8)
    encode(source, tmp_path / "all", representation="pixels", shard_size=5)
    encode(Subset(source, range(5, 10)), tmp_path / "part", representation="pixels", shard_size=5)
    assert (
        contents(tmp_path / "part" / "train")["shard-00000.safetensors"]
        == (contents(tmp_path / "all" / "train")["shard-00001.safetensors"])
    )


def test_an_encoding_stopped_at_any_file_goes_on_to_the_same_bytes(photos, encoded, tmp_path, monkeypatch):
    written = files.replaced
    expected = contents(encoded)
    for stop in range(len(expected)):
        calls = iter(range(1000))

        def stopping(path, stop=stop, calls=calls):
            if next(calls) == stop:
                path.parent.mkdir(exist_ok=True)
                (path.parent / f"{files.TEMPORARY}left-by-a-kill").write_bytes(b"half")
                raise Stopped
            return written(path)

        out = tmp_path / f"stopped-{stop}"
        out.mkdir()
        with monkeypatch.context() as patch:
            patch.setattr(files, "replaced", stopping)
            with pytest.raises(Stopped):
                encode(str(photos), out, **OPTIONS)
        encode(str(photos), out, **OPTIONS)
        assert contents(out) == expected


def test_an_encoding_that_looks_for_broken_images_goes_on_too(photos, tmp_path, monkeypatch):
    (photos / "cat" / "05.png").write_bytes(b"broken")
    encode(str(photos), tmp_path / "whole", skip_broken=True, **OPTIONS)
    with monkeypatch.context() as patch:
        patch.setattr("jlt.data.encoding.write_shards", lambda *_: (_ for _ in ()).throw(Stopped))
        with pytest.raises(Stopped):
            encode(str(photos), tmp_path / "stopped", skip_broken=True, **OPTIONS)
    encode(str(photos), tmp_path / "stopped", skip_broken=True, **OPTIONS)
    assert contents(tmp_path / "stopped") == contents(tmp_path / "whole")
    images = real_images(tmp_path / "whole", "train")
    assert len(images) + len(real_images(tmp_path / "whole", "held-out")) == NUMBER - 1


def test_a_full_disk_leaves_the_shards_that_are_whole(photos, encoded, tmp_path, monkeypatch):
    written = files.write_bytes

    def full(path, data):
        if path.name == "shard-00002.safetensors":
            raise OSError(28, "No space left on device")
        written(path, data)

    with monkeypatch.context() as patch:
        patch.setattr(files, "write_bytes", full)
        with pytest.raises(OSError, match="No space left"):
            encode(str(photos), tmp_path / "full", **OPTIONS)
    assert (tmp_path / "full" / "train" / "shard-00001.safetensors").is_file()
    encode(str(photos), tmp_path / "full", **OPTIONS)
    assert contents(tmp_path / "full") == contents(encoded)


def test_a_finished_folder_is_left_as_it_is(photos, encoded):
    before = {path: path.stat().st_mtime_ns for path in encoded.rglob("*") if path.is_file()}
    encode(str(photos), encoded, batch_size=3, **OPTIONS)
    assert {path: path.stat().st_mtime_ns for path in encoded.rglob("*") if path.is_file()} == before


def test_a_damaged_or_a_missing_shard_is_made_again(photos, encoded):
    before = contents(encoded)
    damaged, missing = (encoded / "train" / f"shard-0000{k}.safetensors" for k in (1, 2))
    data = bytearray(damaged.read_bytes())
    data[-3] ^= 1
    damaged.write_bytes(data)
    missing.unlink()
    encode(str(photos), encoded, **OPTIONS)
    assert contents(encoded) == before


@pytest.mark.parametrize("broken", ["dog/06.png", "dog/10.png"])  # one to train on, one held out
def test_an_encoding_stopped_by_a_broken_image_goes_on_without_it(photos, tmp_path, broken):
    options = OPTIONS | {"representation": "pixels"}
    held_out = {name_of(open_source(str(photos), 8), i).name for i in held_out_indices(np.arange(NUMBER) // 7, 4)}
    assert ("06.png" in held_out, "10.png" in held_out) == (False, True)
    (photos / broken).write_bytes(b"broken")
    out = tmp_path / "out"
    with pytest.raises(ValueError, match=rf"{broken} is not .* \(skip_broken leaves such images out\)"):
        encode(str(photos), out, **options)
    whole = {path: path.stat().st_mtime_ns for path in out.rglob("*.safetensors")}
    assert whole  # the shards before the broken image
    encode(str(photos), out, skip_broken=True, **options)
    encode(str(photos), tmp_path / "at-once", skip_broken=True, **options)
    assert contents(out) == contents(tmp_path / "at-once")
    assert {path: path.stat().st_mtime_ns for path in whole} == whole
    parts = {split: real_images(out, split) for split in ("train", "held-out")}
    kept = {split: {name_of(part.source, i).name for i in part.indices} for split, part in parts.items()}
    assert kept["held-out"] == held_out - {broken[4:]}
    assert len(kept["train"]) + len(kept["held-out"]) == NUMBER - 1
    with pytest.raises(ValueError, match="skip_broken is True there and False here"):
        encode(str(photos), out, **options)


def test_a_broken_image_before_any_shard_leaves_nothing(photos, encoded, tmp_path):
    (photos / "cat" / "01.png").write_bytes(b"broken")
    with pytest.raises(ValueError, match=r"01\.png is not"):
        encode(str(photos), tmp_path / "out", image_size=8, representation=f"of:{encoded}")
    assert not (tmp_path / "out").exists()


def test_shards_that_others_wrote_beyond_a_broken_image_are_made_again(photos, tmp_path):
    options, out = OPTIONS | {"representation": "pixels"}, tmp_path / "out"
    encode(str(photos), out, **options)
    for name in ("train/shard-00000.safetensors", "train/manifest.json", "held-out/manifest.json"):
        (out / name).unlink()  # as where the process of the first shard met the image and that of the others did not
    broken = photos / "cat" / "01.png"
    broken.write_bytes(bytes(broken.stat().st_size))
    encode(str(photos), out, skip_broken=True, **options)
    encode(str(photos), tmp_path / "at-once", skip_broken=True, **options)
    assert contents(out) == contents(tmp_path / "at-once")


def test_a_source_that_moved_is_found_again_by_encoding_it_again(photos, encoded, tmp_path):
    photos.rename(tmp_path / "moved")
    with pytest.raises(ValueError, match="photos does not exist"):
        real_images(encoded, "train")
    before = {path: path.read_bytes() for path in encoded.rglob("*.safetensors")}
    encode(str(tmp_path / "moved"), encoded, **OPTIONS)
    assert len(real_images(encoded, "train")) == NUMBER - 4
    assert {path: path.read_bytes() for path in before} == before


KILLING = """
import os, random, signal, sys, time
from pathlib import Path
from jlt.data import encode, open_source

folder, source, moments = Path(sys.argv[1]), open_source("mnist"), random.Random(0)

def start(out):
    child = os.fork()  # of a process with one thread; a new interpreter would take seconds to import
    if child == 0:
        encode(source, out, num_held_out=500, shard_size=300, mirrored=True, batch_size=50)
        os._exit(0)
    return child

began = time.monotonic()
os.waitpid(start(folder / "whole"), 0)
duration, killed, last = time.monotonic() - began, 0, 0
while killed < 50:  # a few in a folder, until one ends before it is killed
    child = start(folder / f"killed-{last}")
    time.sleep(moments.uniform(0, 0.4) * duration)
    os.kill(child, signal.SIGKILL)
    if os.WIFSIGNALED(os.waitpid(child, 0)[1]):
        killed += 1
    else:
        last += 1
for k in range(last + 1):
    os.waitpid(start(folder / f"killed-{k}"), 0)
"""


@pytest.mark.slow
def test_an_encoding_killed_fifty_times_ends_to_the_byte_like_one_that_was_not(tmp_path):
    subprocess.run([sys.executable, "-c", KILLING, str(tmp_path)], check=True)
    whole, folders = contents(tmp_path / "whole"), list(tmp_path.glob("killed-*"))
    assert len(whole) == 1 + 2 + 2 * (14 + 1 + 2) + 2  # settings, representation, shards with hashes, manifests
    assert folders
    for folder in folders:
        assert contents(folder) == whole


def test_other_settings_are_refused_with_a_list_of_those_that_differ(photos, encoded):
    before = contents(encoded)
    with pytest.raises(ValueError, match=r"shard_size is 3 there and 4 here; upscale is False there and True here"):
        encode(str(photos), encoded, **OPTIONS | {"shard_size": 4, "upscale": True})
    assert contents(encoded) == before


def test_another_source_is_refused(photos, encoded):
    (photos / "cat" / "new.png").write_bytes((photos / "cat" / "01.png").read_bytes())
    with pytest.raises(ValueError, match=r"source_fingerprint is \w+ there and \w+ here"):
        encode(str(photos), encoded, **OPTIONS)


def test_real_images_refuses_a_source_that_has_changed(photos, encoded):
    (photos / "dog" / "00.png").unlink()
    with pytest.raises(ValueError, match=r"has fingerprint \w+, the latents in .* were made from \w+"):
        real_images(encoded, "train")


def test_real_images_refuses_other_images_than_those_encoded(encoded):
    settings = json.loads((encoded / "encoding.json").read_text())
    (encoded / "encoding.json").write_text(json.dumps(settings | {"num_held_out": 3}))
    with pytest.raises(ValueError, match=r"holds the 10 images .*, its source gives the 11 images"):
        real_images(encoded, "train")


@pytest.mark.parametrize("content", ["[]", "{}", '{"source": "mnist"}', "no json"])
def test_damaged_settings_are_refused(encoded, content):
    (encoded / "encoding.json").write_text(content)
    with pytest.raises(ValueError, match=r"encoding\.json"):
        real_images(encoded, "train")


def test_reconstructions_are_the_images_where_nothing_is_lost(photos, tmp_path):
    encode(str(photos), tmp_path / "latents", representation="pixels", image_size=8)
    originals, decoded = reconstruct(tmp_path / "latents", "train", torch.tensor([3, 0, 13]))
    assert torch.equal(originals, decoded)
    assert torch.equal(originals[2], torch.from_numpy(open_source(str(photos), 8)[13][0]))


def test_the_representation_of_other_latents_is_refused(photos, encoded, tmp_path):
    encode(str(photos), tmp_path / "other", **OPTIONS | {"channels": 5})
    (encoded / "representation").rename(tmp_path / "kept")
    (tmp_path / "other" / "representation").rename(encoded / "representation")
    with pytest.raises(ValueError, match=r"has fingerprint .*, the latents beside it were made with"):
        reconstruct(encoded, "train", torch.tensor([0]))


def test_unlabelled_images_are_one_class_to_be_held_out(photos, tmp_path):
    encode(str(photos / "cat"), tmp_path / "latents", image_size=8, num_held_out=2)
    assert open_latents(tmp_path / "latents").num_classes == 0
    assert len(open_latents(tmp_path / "latents", "held-out")) == 2


def test_a_channel_without_variance_is_not_blown_up():
    mean, variance = torch.zeros(3), torch.tensor([2.0, 1.0, 0.0], dtype=torch.float64)
    assert fit_affine(mean, variance, "global").scale == (1.0, 1.0, 1.0)
    with pytest.raises(ValueError, match="keep the first 2 channels"):
        fit_affine(mean, variance, "channel")


def test_a_folder_that_another_process_fills_is_refused(photos, encoded):
    before = contents(encoded)
    with files.locked(encoded / "encoding.json"), pytest.raises(ValueError, match="in use by another process"):
        encode(str(photos), encoded, **OPTIONS)
    assert contents(encoded) == before


RANKS = """
from pathlib import Path
from jlt.data import encode
from jlt.data.sources import open_source

source, out, count = open_source(sys.argv[1], 8), Path(sys.argv[2]), int(sys.argv[3])
options = {"image_size": 8, "num_held_out": 4, "shard_size": 3, "mirrored": True}
sys.exit(max(forked(count, lambda rank: encode(source, out, **options))))
"""


@pytest.mark.parametrize("count", [2, 3])
def test_no_byte_depends_on_the_number_of_processes(photos, encoded, tmp_path, count, fork):
    done = fork(RANKS, photos, tmp_path / "again", count)
    assert done.returncode == 0, done.stderr
    assert contents(tmp_path / "again") == contents(encoded)


def test_processes_share_the_shards_that_are_missing(photos, encoded, fork):
    before = contents(encoded)
    for k in range(3):
        (encoded / "train" / f"shard-0000{k}.safetensors").unlink()
    done = fork(RANKS, photos, encoded, 2)
    assert done.returncode == 0, done.stderr
    assert contents(encoded) == before


def test_of_several_processes_one_tells_what_is_wrong(photos, encoded, fork):
    (photos / "cat" / "new.png").write_bytes((photos / "cat" / "01.png").read_bytes())
    done = fork(RANKS, photos, encoded, 2)
    assert done.returncode == 2
    assert done.stdout.count("source_fingerprint is") == 1


def test_a_disk_that_cannot_hold_the_latents_is_refused_before_the_work(photos, tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    bytes_needed = 2 * 48 * 2 * 2 * (2 * 10 + 4)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=bytes_needed - 1))
    with pytest.raises(ValueError, match=f"needs {bytes_needed} more bytes for latents, .* {bytes_needed - 1} free"):
        encode(str(photos), tmp_path / "latents", **OPTIONS)
    assert not (tmp_path / "latents").exists()
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=bytes_needed))
    encode(str(photos), tmp_path / "latents", **OPTIONS)


def test_the_estimate_comes_first_and_counts_the_bytes(photos, tmp_path):
    said = []
    encode(
        str(photos),
        tmp_path / "latents",
        announce=lambda line: said.append((line, contents(tmp_path / "latents"))),
        **OPTIONS,
    )
    ((line, there),) = said
    assert "14 images and their mirror images: 9.22e-06 GB of latents (48, 2, 2)" in line
    assert not [name for name in there if "shard" in name]
    encode(str(photos), tmp_path / "latents", announce=lambda line: pytest.fail("nothing is left to do"), **OPTIONS)


@pytest.fixture
def flux2(golden):
    return f"autoencoder:{golden / 'flux2_vae' / 'vae'}"


def test_an_autoencoder_that_states_its_normalisation_is_stored_as_it_is(photos, flux2, tmp_path):
    out = tmp_path / "latents"
    encode(str(photos), out, representation=flux2, image_size=64, upscale=True, num_held_out=4, batch_size=4)
    latents, images = open_latents(out, verify=True), real_images(out, "train")
    assert latents.shape == (128, 4, 4)
    assert latents.manifest.affine.is_identity
    representation = load_representation(out / "representation")
    batch = torch.stack([torch.from_numpy(images[i][0]) for i in range(4)])  # as the shard's first batch
    assert torch.equal(latents.gather(range(4)), representation.encode(batch).half().float())
    originals, decoded = reconstruct(out, "held-out", torch.tensor([0, 3]))
    assert originals.shape == decoded.shape == (2, 3, 64, 64)
    with pytest.raises(ValueError, match="batch_size is 4 there and 5 here"):  # its rounding may depend on it
        encode(str(photos), out, representation=flux2, image_size=64, upscale=True, num_held_out=4, batch_size=5)


def test_an_autoencoder_that_states_none_is_normalised_by_channel(photos, tmp_path):
    from diffusers import AutoencoderKL

    torch.manual_seed(0)
    made = AutoencoderKL(block_out_channels=(8,), norm_num_groups=4, latent_channels=2, scaling_factor=1.0)
    made.save_pretrained(tmp_path / "vae")
    encode(str(photos), tmp_path / "latents", representation=f"autoencoder:{tmp_path / 'vae'}", image_size=8)
    mean, variance = open_latents(tmp_path / "latents").statistics()
    np.testing.assert_allclose(variance, 1, atol=1e-4)
    assert mean.abs().max() < 1e-4


def test_options_of_another_representation_are_refused(photos, flux2, tmp_path):
    for options, complaint in (
        ({"representation": flux2, "stride": 4}, "has its own stride and channels, got stride 4"),
        ({"representation": "pixels", "dtype": "bfloat16"}, "pixels is not one, got bfloat16"),
        ({"representation": "flux3"}, "did you mean 'flux2'"),
        ({"representation": flux2, "image_size": 24, "upscale": True}, "24 x 24 are not a multiple of the stride 16"),
    ):
        with pytest.raises(ValueError, match=complaint):
            encode(str(photos), tmp_path / "latents", **options)
        assert not (tmp_path / "latents").exists()
