"""Reading one image file: JPEG, PNG or WebP of any mode to 8-bit RGB, and the crop that the field trains on."""

import warnings
from pathlib import Path

import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageOps, UnidentifiedImageError

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")
MAX_PIXELS = 178_956_970  # Pillow's own bound; an image above it is refused before it is decompressed


class BrokenImage(ValueError):
    """An image file that cannot be decoded; the message names it."""


def read_image(path: Path) -> Image.Image:
    """Decode a file to RGB: EXIF orientation obeyed, transparency over white, 16-bit grey scaled to 8 bits."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # such as odd metadata of an image that is read all the same
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(path, formats=("JPEG", "PNG", "WEBP")) as image:
                if image.width * image.height > MAX_PIXELS:
                    raise BrokenImage(f"{path} has {image.width} x {image.height} pixels, above {MAX_PIXELS}")
                image.load()
                return to_rgb(ImageOps.exif_transpose(image))
    except UnidentifiedImageError:
        raise BrokenImage(f"{path} is not a JPEG, PNG or WebP image ({path.stat().st_size} bytes)") from None
    except (Image.DecompressionBombWarning, Image.DecompressionBombError) as error:
        raise BrokenImage(f"{path} is larger than an image may be: {error}") from None
    except (PermissionError, FileNotFoundError, MemoryError, BrokenImage):
        raise
    except Exception as error:  # on damaged files Pillow's decoders raise nearly anything
        raise BrokenImage(f"{path} cannot be decoded: {error}") from None


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
