"""Reading one image: JPEG, PNG or WebP of any mode to 8-bit RGB, and the crop that the field trains on."""

import contextlib
import io
import warnings
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageOps, UnidentifiedImageError

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")
MAX_PIXELS = 2**27  # 134 megapixels; an image above it is refused before it is decompressed


class BrokenImage(ValueError):
    """An image file that cannot be decoded; the message names it."""


def read_image(path: Path) -> Image.Image:
    """Decode a file to RGB; see `decode`."""
    return decode(path.read_bytes(), str(path))  # read out here: a disk that fails is no broken image


def decode(data: bytes, name: str) -> Image.Image:
    """Decode to RGB: EXIF orientation obeyed, transparency over white, 16-bit grey scaled to 8 bits.

    What cannot be decoded is a BrokenImage that gives the image's `name`.
    """
    try:
        with quiet(), Image.open(io.BytesIO(data), formats=("JPEG", "PNG", "WEBP")) as image:
            if image.width * image.height > MAX_PIXELS:
                pixels = image.width * image.height
                raise Image.DecompressionBombError(f"{pixels} pixels, at most {MAX_PIXELS} are decompressed")
            return to_rgb(ImageOps.exif_transpose(image))
    except UnidentifiedImageError:
        raise BrokenImage(f"{name} is not a JPEG, PNG or WebP image ({len(data)} bytes)") from None
    except Image.DecompressionBombError as error:  # Pillow's, or the one above
        raise BrokenImage(f"{name} is larger than an image may be: {error}") from None
    except MemoryError:
        raise
    except Exception as error:  # on damaged files Pillow's decoders raise nearly anything
        raise BrokenImage(f"{name} cannot be decoded: {error}") from None


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Silence Pillow, which warns of odd metadata, and of sizes that MAX_PIXELS decides on.

    Filters belong to the whole process, so threads that read images want one around them all, too.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module="PIL")
        yield


def to_rgb(image: Image.Image) -> Image.Image:
    """Convert any mode to RGB."""
    if image.mode.startswith("I"):  # 16-bit grey, which Pillow would clip to 255
        image = Image.fromarray((np.asarray(image).astype(np.float64) / 257).round().clip(0, 255).astype(np.uint8))
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("RGB")


def adm_crop(image: Image.Image, size: int) -> UInt8[np.ndarray, "s s 3"]:
    """Scale the shorter side to `size` and cut the centre square, as guided-diffusion (ADM) does.

    Halved by box averaging while it stays at least twice as large, then bicubic.
    """
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), resample=Image.Resampling.BOX)
    scale = size / min(image.size)
    image = image.resize((round(image.width * scale), round(image.height * scale)), resample=Image.Resampling.BICUBIC)
    left, top = (image.width - size) // 2, (image.height - size) // 2
    return np.asarray(image.crop((left, top, left + size, top + size)))


def square(image: Image.Image, size: int, upscale: bool, name: str) -> UInt8[np.ndarray, "s s 3"]:
    """Crop to `size`; an image smaller than that is a ValueError that gives its `name`, unless it may be upscaled."""
    if min(image.size) < size and not upscale:
        raise ValueError(
            f"{name} is {image.width} x {image.height}, smaller than the crop of {size}; "
            "ask for a smaller image size, or for upscaling"
        )
    return adm_crop(image, size)
