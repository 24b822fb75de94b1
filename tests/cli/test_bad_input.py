"""What a user may get wrong with data: exit code 2, one line that names the relation, and nothing half-written."""

import json
import os
import zlib

import numpy as np
import pytest
from PIL import Image
from safetensors.torch import load_file, save_file

from jlt import files
from jlt.cli import main


def save_image(path, size=(8, 8), seed=0):
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)


@pytest.fixture
def photos(tmp_path):
    for i in range(12):
        save_image(tmp_path / "photos" / ("cat" if i < 6 else "dog") / f"{i:02}.png", seed=i)
    return tmp_path / "photos"


def complaint(capsys, *arguments):
    """Run a command that must fail as bad input does; return its one line."""
    assert main([str(argument) for argument in arguments]) == 2
    captured = capsys.readouterr()
    assert all(line.endswith("(estimates)") for line in captured.out.splitlines())  # made before the images are read
    assert captured.err.startswith("jlt: ")
    assert captured.err.count("\n") == 1
    assert captured.err.endswith("\n")
    assert "Traceback" not in captured.err
    return captured.err


def empty(photos):
    for path in photos.rglob("*.png"):
        path.unlink()


def empty_class(photos):
    (photos / "emu").mkdir()


def one_class(photos):
    for path in (photos / "dog").iterdir():
        path.unlink()
    (photos / "dog").rmdir()


def loose(photos):
    save_image(photos / "loose.png")


def text_image(photos):
    (photos / "dog" / "08.png").write_text("no image")


def truncated(photos):
    path = photos / "dog" / "08.png"
    path.write_bytes(path.read_bytes()[:-60])


def zero_bytes(photos):
    (photos / "dog" / "08.png").write_bytes(b"")


def bomb(photos):
    path = photos / "dog" / "08.png"
    data = bytearray(path.read_bytes())
    data[16:24] = (30_000).to_bytes(4, "big") * 2
    data[29:33] = zlib.crc32(data[12:29]).to_bytes(4, "big")
    path.write_bytes(data)


def small(photos):
    save_image(photos / "dog" / "08.png", size=(9, 7))


def loop(photos):
    (photos / "again").symlink_to(photos)


def one_colour(photos):
    for path in photos.rglob("*.png"):
        Image.new("RGB", (8, 8), (7, 7, 7)).save(path)


@pytest.mark.parametrize(
    ("spoil", "named"),
    [
        (empty, "holds no image (.jpg, .jpeg, .png, .webp)"),
        (empty_class, "emu holds no image, the other classes hold 12"),
        (one_class, "has 1 class folder, 'cat'"),
        (loose, "holds 1 images beside 2 class folders"),
        (text_image, "08.png is not a JPEG, PNG or WebP image (8 bytes)"),
        (truncated, "08.png cannot be decoded"),
        (zero_bytes, "08.png is not a JPEG, PNG or WebP image (0 bytes)"),
        (bomb, "08.png is larger than an image may be"),
        (small, "08.png is 9 x 7, smaller than the crop of 8"),
        (loop, "again is a link to"),
        (one_colour, "all images are the same"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
@pytest.mark.parametrize("representation", ["patch-pca", "pixels"])
def test_a_bad_folder_of_images_is_refused(photos, tmp_path, capsys, spoil, named, representation):
    spoil(photos)
    out = tmp_path / "latents"
    arguments = ("encode", photos, out, "--image-size", 8, "--representation", representation)
    assert named in complaint(capsys, *arguments)
    assert not out.exists()
    out.mkdir()
    complaint(capsys, *arguments)
    assert list(out.iterdir()) == []  # an empty folder of the user's own stays, and stays empty


@pytest.mark.parametrize("spoil", [text_image, truncated, zero_bytes, bomb])
def test_a_broken_image_is_left_out_when_asked(photos, tmp_path, capsys, spoil):
    spoil(photos)
    assert main(["encode", str(photos), str(tmp_path / "latents"), "--image-size", "8", "--skip-broken"]) == 0
    assert "1 images cannot be decoded" in capsys.readouterr().out


def test_images_that_are_all_broken_are_refused(photos, tmp_path, capsys):
    for path in photos.rglob("*.png"):
        path.write_bytes(b"")
    arguments = ("encode", photos, tmp_path / "latents", "--image-size", 8, "--skip-broken")
    assert "all 12 images cannot be decoded" in complaint(capsys, *arguments)
    assert not (tmp_path / "latents").exists()


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (["--representation", "patch-pac"], "unknown representation 'patch-pac', did you mean 'patch-pca'?"),
        (["--normalise", "chanel"], "unknown normalisation 'chanel', did you mean 'channel'?"),
        (["--stride", "3"], "images of 8 x 8 are not a multiple of the stride 3"),
        (["--stride", "0"], "stride must be at least 1, got 0"),
        (["--channels", "49"], "channels must be in [1, 48] for 4 x 4 patches, got 49"),
        (
            ["--channels", "3", "--representation", "pixels"],
            "pixels has its own stride and channels, got stride None, channels 3",
        ),
        (["--num-held-out", "12"], "12 of 12 images cannot be held out"),
        (["--num-held-out", "-1"], "-1 of 12 images cannot be held out"),
        (["--shard-size", "0"], "shard_size must be at least 1, got 0"),
        (["--batch-size", "0"], "batch_size must be at least 1, got 0"),
        (["--image-size", "0"], "image_size must be at least 1, got 0"),
        (["--image-size", "16"], "is 8 x 8, smaller than the crop of 16"),
        (["--image-size", "big"], "big"),
        (["--chanels", "3"], "--chanels"),
    ],
)
def test_impossible_options_are_refused(photos, tmp_path, capsys, options, named):
    out = tmp_path / "latents"
    size = [] if "--image-size" in options else ["--image-size", "8"]
    assert named in complaint(capsys, "encode", photos, out, *size, *options)
    assert not out.exists()


@pytest.mark.parametrize(
    ("source", "named"),
    [
        ("nothing", "unknown source"),
        ("floder:photos", "did you mean 'folder'?"),
        ("folder:", "names no path"),
        ("mnist:photos", "names a path"),
        ("folder:nothing", "nothing does not exist; a folder is wanted"),
        ("folder:file", "file is a file; a folder is wanted"),
        ("file", "file is a file; a folder is wanted"),
        ("idx:photos", "holds neither train-images-idx3-ubyte nor"),
    ],
)
def test_a_source_that_is_none_is_refused(photos, tmp_path, capsys, monkeypatch, source, named):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("")
    assert named in complaint(capsys, "encode", source, "latents")
    assert not (tmp_path / "latents").exists()


@pytest.mark.parametrize(
    ("images", "labels", "named"),
    [
        (b"", b"\0\0\x08\x01\0\0\0\0", "train-images-idx3-ubyte starts with"),
        (b"\0\0\x08\x03" + bytes(12), b"\0\0\x08\x01\0\0\0\0", "holds images of shape [0, 0, 0]"),
        (b"\0\0\x08\x03" + b"\xff" * 12, b"\0\0\x08\x01\0\0\0\0", "at most 4294967296 are read"),
        (b"\0\0\x08\x03\0\0\0\x01\0\0\0\x01\0\0\0\x01x", b"\0\0\x08\x01\0\0\0\0", "has 1 images and 0 labels"),
        (b"\0\0\x08\x03\0\0\0\x02\0\0\0\x01\0\0\0\x01x", b"\0\0\x08\x01\0\0\0\0", "= 2 bytes and holds 1 only"),
        (
            b"\0\0\x08\x03\0\0\0\x01\0\x02\0\0\0\0\0\x01" + bytes(2**17),
            b"\0\0\x08\x01\0\0\0\x01\0",
            "makes 1 images of 131072 x 131072",
        ),
    ],
)
def test_damaged_idx_files_are_refused(tmp_path, capsys, images, labels, named):
    (tmp_path / "train-images-idx3-ubyte").write_bytes(images)
    (tmp_path / "train-labels-idx1-ubyte").write_bytes(labels)
    assert named in complaint(capsys, "encode", f"idx:{tmp_path}", tmp_path / "latents")
    assert not (tmp_path / "latents").exists()


def test_an_output_folder_of_something_else_is_left_alone(photos, tmp_path, capsys):
    out = tmp_path / "latents"
    out.mkdir()
    (out / "letter.txt").write_text("dear")
    assert "is not empty and holds no encoding.json" in complaint(capsys, "encode", photos, out, "--image-size", 8)
    assert [path.name for path in out.iterdir()] == ["letter.txt"]


def test_an_output_that_is_a_file_is_left_alone(photos, tmp_path, capsys):
    (tmp_path / "latents").write_text("dear")
    arguments = ("encode", photos, tmp_path / "latents", "--image-size", 8)
    assert "is a file; a folder for latents is wanted" in complaint(capsys, *arguments)
    assert (tmp_path / "latents").read_text() == "dear"


def test_bad_input_met_on_resuming_leaves_what_was_there(photos, tmp_path, capsys):
    out = tmp_path / "latents"
    arguments = ("encode", photos, out, "--image-size", 8, "--representation", "pixels")
    assert main([str(argument) for argument in arguments]) == 0
    capsys.readouterr()
    (out / "train" / "manifest.json").unlink()
    (out / "train" / "shard-00000.safetensors").unlink()
    path = photos / "dog" / "08.png"
    path.write_bytes(bytes(path.stat().st_size))  # as many bytes as before
    assert "08.png" in complaint(capsys, *arguments)
    assert (out / "encoding.json").is_file()


def test_a_folder_that_may_not_be_read_is_refused(photos, capsys, monkeypatch):
    monkeypatch.chdir(photos.parent)  # from inside, since who is not root may not come by the folders above
    photos.chmod(0)
    user = os.geteuid()
    os.seteuid(user or 65534)  # root reads everything
    try:
        assert f"{photos.name}: Permission denied" in complaint(capsys, "encode", photos.name, "latents")
    finally:
        os.seteuid(user)
        photos.chmod(0o755)


def test_latents_inside_the_folder_of_images_are_refused(photos, capsys):
    assert "whose folders are classes" in complaint(capsys, "encode", photos, photos / "latents", "--image-size", 8)
    assert sorted(path.name for path in photos.iterdir()) == ["cat", "dog"]


SHARD = "shard-00001.safetensors"


def rewrite(train, **changes):
    manifest = json.loads((train / "manifest.json").read_text()) | changes
    wanted = {key: value for key, value in manifest.items() if value != "left out"}
    (train / "manifest.json").write_text(json.dumps(wanted))


def flip(train):
    data = bytearray((train / SHARD).read_bytes())
    data[-1] ^= 64
    (train / SHARD).write_bytes(data)


def not_finite(train):
    tensors = load_file(train / SHARD)
    tensors["latents"][2, 0, 0, 0] = float("nan")
    save_file(tensors, train / SHARD)
    manifest = json.loads((train / "manifest.json").read_text())
    manifest["shards"][1][2] = files.sha256(train / SHARD)
    rewrite(train, shards=manifest["shards"])


@pytest.mark.parametrize(
    ("damage", "named"),
    [
        (lambda train: (train / SHARD).unlink(), "lacks shard-00001.safetensors; the manifest lists 3 shards"),
        (lambda train: (train / SHARD).write_bytes(b""), "shard-00001.safetensors has SHA-256"),
        (flip, "shard-00001.safetensors has SHA-256"),
        (lambda train: (train / "shard-00003.safetensors").write_bytes(b""), "holds shard-00003.safetensors"),
        (lambda train: (train / "manifest.json").unlink(), "manifest.json does not exist"),
        (lambda train: (train / "manifest.json").write_bytes(b"{"), "is not a JSON file"),
        (lambda train: rewrite(train, format_version=7), "is of format version 7, this jlt reads 1"),
        (lambda train: rewrite(train, affine="left out"), "manifest.json lacks affine"),
        (lambda train: rewrite(train, num_images=10**12), "it lists 3 with 12 images"),
        (lambda train: rewrite(train, class_names=["cat"]), "labels are 0 to 1, the manifest allows 0 to 0"),
        (not_finite, "the latents of image 6 are not finite"),
    ],
)
def test_damaged_latents_are_refused(photos, tmp_path, capsys, damage, named):
    assert main(["encode", str(photos), str(tmp_path / "latents"), "--image-size", "8", "--shard-size", "4"]) == 0
    capsys.readouterr()
    damage(tmp_path / "latents" / "train")
    assert named in complaint(capsys, "latents", "check", tmp_path / "latents")


@pytest.mark.parametrize("action", ["show", "check"])
def test_latents_that_are_not_there_are_refused(tmp_path, capsys, action):
    if action == "show":
        pytest.importorskip("jlt.experiments.plots")
    assert "is not there; a folder of latents is wanted" in complaint(capsys, "latents", action, tmp_path / "none")
