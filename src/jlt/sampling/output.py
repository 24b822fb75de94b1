"""Generated images as other programs read them; each format is written batch by batch, and whole or not at all.

    png    OUT/000000.png, ...
    tar    OUT/images.tar     000000.png and, of a labelled image, 000000.cls (WebDataset); OUT/classes.txt if named
    npz    OUT/images.npz     `arr_0` (n, height, width, channels) uint8 as ADM's evaluator reads it; `arr_1` labels

Pixels are those of jlt.sampling.storage, rounded once when they were decoded. No file holds a pickle or a date.
"""

import io
import tarfile
import zipfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import UInt8
from PIL import Image
from torch import Tensor

from jlt import files


@dataclass(frozen=True)
class Stored:
    """What there is to write: batches of images (n, channels, height, width) in order, and a label each, if any."""

    batches: Iterable[UInt8[Tensor, "_ c h w"]]
    labels: Sequence[int] | None
    num_images: int
    shape: Sequence[int]
    class_names: Sequence[str] | None = None


def picture(image: UInt8[Tensor, "c h w"]) -> Image.Image:
    """Return an image of 1 or 3 channels for Pillow; another number is a ValueError."""
    if len(image) not in (1, 3):
        raise ValueError(f"an image has {len(image)} channels, a picture takes 1 or 3; npz takes any number")
    return Image.fromarray(image.permute(1, 2, 0).squeeze(2).numpy())


def png(image: UInt8[Tensor, "c h w"]) -> bytes:
    """Return an image as a PNG file."""
    buffer = io.BytesIO()
    picture(image).save(buffer, format="PNG")
    return buffer.getvalue()


def write_png(out: Path, stored: Stored) -> None:
    """Write a PNG file an image."""
    for i, image in enumerate(image for batch in stored.batches for image in batch):
        files.write_bytes(out / f"{i:06d}.png", png(image))


def write_tar(out: Path, stored: Stored) -> None:
    """Write one archive in the WebDataset layout, and the class names beside it."""
    if stored.class_names is not None:
        files.write_bytes(out / "classes.txt", "".join(f"{name}\n" for name in stored.class_names).encode())
    with (
        files.replaced(out / "images.tar") as temporary,
        tarfile.open(temporary, "w", format=tarfile.USTAR_FORMAT) as tar,
    ):

        def add(name: str, data: bytes) -> None:
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))

        for i, image in enumerate(image for batch in stored.batches for image in batch):
            add(f"{i:06d}.png", png(image))
            if stored.labels is not None:
                add(f"{i:06d}.cls", str(stored.labels[i]).encode())


def write_npz(out: Path, stored: Stored) -> None:
    """Write one .npz file, uncompressed, as numpy would."""
    channels, height, width = stored.shape
    shape = (stored.num_images, height, width, channels)
    with files.replaced(out / "images.npz") as temporary, zipfile.ZipFile(temporary, "w") as archive:
        with archive.open(zipfile.ZipInfo("arr_0.npy"), "w", force_zip64=True) as file:
            header = {"descr": "|u1", "fortran_order": False, "shape": shape}
            np.lib.format.write_array_header_1_0(file, header)
            for batch in stored.batches:
                file.write(batch.permute(0, 2, 3, 1).contiguous().numpy().tobytes())
        if stored.labels is not None:
            with archive.open(zipfile.ZipInfo("arr_1.npy"), "w") as file:
                np.lib.format.write_array(file, np.asarray(stored.labels, dtype=np.int64), allow_pickle=False)


FORMATS: dict[str, Callable[[Path, Stored], None]] = {"png": write_png, "tar": write_tar, "npz": write_npz}
