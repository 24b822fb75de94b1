import struct
import zlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from jlt.data.images import BrokenImage, adm_crop, read_image


def random_pixels(*shape, seed=0):
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def saved(tmp_path, image, name="image.png", **options):
    image.save(tmp_path / name, **options)
    return tmp_path / name


def test_a_jpeg_of_orientation_6_is_turned_a_quarter_clockwise(tmp_path):
    smooth = np.linspace(0, 255, 16 * 24).reshape(16, 24).astype(np.uint8)
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: rows run down the right side
    path = saved(tmp_path, Image.fromarray(smooth), "turned.jpg", exif=exif, quality=95)
    with Image.open(path) as stored:
        expected = np.rot90(np.asarray(stored.convert("RGB")), k=-1)
    np.testing.assert_array_equal(np.asarray(read_image(path)), expected)


def test_grey_becomes_three_equal_channels(tmp_path):
    grey = random_pixels(5, 7)
    read = np.asarray(read_image(saved(tmp_path, Image.fromarray(grey))))
    np.testing.assert_array_equal(read, np.stack([grey] * 3, axis=2))


def test_a_palette_is_looked_up(tmp_path):
    colours, indices = random_pixels(16, 3), random_pixels(5, 7, seed=1) % 16
    image = Image.fromarray(indices).convert("P")
    image.putpalette(colours.tobytes())
    image.putdata(indices.flatten().tolist())
    np.testing.assert_array_equal(np.asarray(read_image(saved(tmp_path, image))), colours[indices])


def test_transparency_is_laid_over_white(tmp_path):
    pixels = random_pixels(9, 9, 4)
    alpha = pixels[..., 3:] / 255
    over_white = pixels[..., :3] * alpha + 255 * (1 - alpha)
    read = np.asarray(read_image(saved(tmp_path, Image.fromarray(pixels)))).astype(float)
    assert np.abs(read - over_white).max() <= 1  # rounding of one level


def test_a_transparent_colour_of_a_palette_is_white(tmp_path):
    image = Image.fromarray(np.array([[0, 1]], dtype=np.uint8)).convert("P")
    image.putpalette([10, 20, 30, 40, 50, 60])
    image.putdata([0, 1])
    path = saved(tmp_path, image, transparency=0)
    assert np.asarray(read_image(path)).tolist() == [[[255, 255, 255], [40, 50, 60]]]


@pytest.mark.parametrize("inks", [(0, 0, 0, 0), (255, 0, 0, 0), (0, 128, 64, 0), (30, 60, 90, 100), (0, 0, 0, 255)])
def test_cmyk_is_what_its_inks_leave_of_white(tmp_path, inks):
    path = saved(tmp_path, Image.new("CMYK", (16, 16), inks), "inks.jpg", quality=100)
    cyan, magenta, yellow, black = inks
    expected = [(255 - ink) * (255 - black) / 255 for ink in (cyan, magenta, yellow)]
    np.testing.assert_allclose(np.asarray(read_image(path))[8, 8], expected, atol=2)  # of the JPEG's rounding


def test_sixteen_bit_grey_is_scaled_not_clipped(tmp_path):
    values = np.array([[0, 128, 129, 257, 32768, 65535]], dtype=np.uint16)
    read = np.asarray(read_image(saved(tmp_path, Image.fromarray(values))))
    assert read[0, :, 0].tolist() == [round(int(value) / 65535 * 255) for value in values[0]]


def recomputed_crop(pixels, size):
    """Average 2 x 2 blocks in numpy (odd edges as Pillow's box filter), then Pillow's bicubic resize and slices."""
    while min(pixels.shape[:2]) >= 2 * size:
        blocks = pixels.astype(float).reshape(pixels.shape[0] // 2, 2, pixels.shape[1] // 2, 2, 3)
        pixels = np.floor(blocks.mean((1, 3)) + 0.5).astype(np.uint8)
    height, width = pixels.shape[:2]
    target = (round(width * size / min(height, width)), round(height * size / min(height, width)))
    resized = np.asarray(Image.fromarray(pixels).resize(target, Image.Resampling.BICUBIC))
    top, left = (resized.shape[0] - size) // 2, (resized.shape[1] - size) // 2
    return resized[top : top + size, left : left + size]


@pytest.mark.parametrize(("height", "width"), [(16, 16), (20, 31), (64, 64), (64, 128), (136, 72)])
def test_the_crop_agrees_with_a_recomputation(height, width):
    pixels = random_pixels(height, width, 3)
    cropped = adm_crop(Image.fromarray(pixels), 16).astype(int)
    # each halving may round a half either way
    assert np.abs(cropped - recomputed_crop(pixels, 16)).max() <= (0 if min(height, width) < 32 else 2)


@given(st.integers(1, 90), st.integers(1, 90), st.integers(1, 32))
@settings(max_examples=60, deadline=None)
def test_a_crop_is_the_size_asked_for_and_keeps_a_constant_colour(height, width, size):
    cropped = adm_crop(Image.new("RGB", (width, height), (10, 200, 33)), size)
    assert cropped.shape == (size, size, 3)
    assert (cropped == [10, 200, 33]).all()


@given(st.integers(1, 40))
@settings(max_examples=20, deadline=None)
def test_a_crop_of_a_square_of_its_own_size_changes_nothing(size):
    pixels = random_pixels(size, size, 3)
    np.testing.assert_array_equal(adm_crop(Image.fromarray(pixels), size), pixels)


def test_a_crop_is_central():
    pixels = np.zeros((10, 30, 3), dtype=np.uint8)
    pixels[:, 10:20] = 255
    assert (adm_crop(Image.fromarray(pixels), 10) == 255).all()


@given(st.data())
@settings(max_examples=150, deadline=None)
def test_damaged_bytes_give_an_image_or_a_broken_image(tmp_path_factory, data):
    folder = tmp_path_factory.mktemp("damaged")
    kind = data.draw(st.sampled_from(["PNG", "JPEG", "WEBP"]))
    Image.fromarray(random_pixels(12, 12, 3)).save(folder / "good", format=kind)
    content = bytearray((folder / "good").read_bytes())
    for _ in range(data.draw(st.integers(1, 6))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    cut = data.draw(st.integers(0, len(content)))
    (folder / "damaged").write_bytes(content[:cut] if data.draw(st.booleans()) else content)
    try:
        outcome = read_image(folder / "damaged").mode
    except BrokenImage as error:
        outcome = str(error)
    assert outcome == "RGB" or str(folder / "damaged") in outcome


@given(st.binary(max_size=200))
@settings(max_examples=50, deadline=None)
def test_any_bytes_are_a_broken_image(tmp_path_factory, content):
    path = tmp_path_factory.mktemp("bytes") / "any.jpg"
    path.write_bytes(content)
    with pytest.raises(BrokenImage, match=r"any\.jpg"):
        read_image(path)


def test_a_decompression_bomb_is_refused_before_it_is_decoded(tmp_path):
    path = tmp_path / "bomb.png"
    for side in (12_000, 20_000):  # of the first Pillow itself would only warn
        path.write_bytes(png_header(side, side))
        with pytest.raises(BrokenImage, match=rf"bomb\.png is larger than an image may be: .*{side**2}"):
            read_image(path)


def test_a_file_that_is_not_there_is_no_broken_image(tmp_path):
    with pytest.raises(FileNotFoundError):
        read_image(tmp_path / "missing.png")


def png_header(width, height):
    """A PNG file that promises an image and ends."""
    body = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    data = b"IDAT" + zlib.compress(b"")
    chunks = b"".join(
        struct.pack(">I", len(part) - 4) + part + struct.pack(">I", zlib.crc32(part)) for part in (body, data)
    )
    return b"\x89PNG\r\n\x1a\n" + chunks
