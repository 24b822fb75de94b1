"""Images in one .npz file, as ADM's scripts write them: `arr_0`, uint8 (n, height, width, 3 or 1), uncompressed.

The array is mapped, not read, so that a file of 10 GB costs no memory. Images have no labels and are not resized.
"""

import struct
import zipfile
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from jaxtyping import Int, UInt8

from jlt import files

NAME = "arr_0"


@dataclass(frozen=True)
class NpzImages:
    """The images of a file; see `Source`."""

    spec: str
    array: UInt8[np.ndarray, "n h w c"] = field(compare=False, repr=False)
    fingerprint: str

    @property
    def class_names(self) -> None:
        return None

    @property
    def image_shape(self) -> tuple[int, int, int]:
        _, height, width, channels = self.array.shape
        return (channels, height, width)

    def labels(self) -> Int[np.ndarray, " n"]:
        return np.full(len(self), -1, dtype=np.int64)

    def __len__(self) -> int:
        return len(self.array)

    def __getitem__(self, index: int) -> tuple[UInt8[np.ndarray, "c h w"], int]:
        return np.ascontiguousarray(self.array[index].transpose(2, 0, 1)), -1


def open_npz(path: str, image_size: int | None = None, upscale: bool = False) -> NpzImages:
    """Open the images of a .npz file; they have the size that they have, and another `image_size` is a ValueError."""
    try:
        array, checksum = map_array(Path(path))
    except (zipfile.BadZipFile, struct.error, KeyError, ValueError) as error:
        reason = str(error).strip("'\"") or type(error).__name__
        raise ValueError(f"{path} holds no images as {NAME}: {reason}") from None
    if array.dtype != np.uint8 or array.ndim != 4 or array.shape[3] not in (1, 3) or 0 in array.shape:
        raise ValueError(f"{path}: {NAME} is {array.shape} {array.dtype}, images are (n, height, width, 1 or 3) uint8")
    if image_size is not None and array.shape[1:3] != (image_size, image_size):
        raise ValueError(
            f"{path}: images are {array.shape[1]} x {array.shape[2]}, not {image_size} x {image_size}; "
            "images of a .npz file are taken as they are"
        )
    return NpzImages(f"npz:{Path(path).absolute()}", array, files.fingerprint([checksum, list(array.shape)]))


def map_array(path: Path) -> tuple[np.ndarray, int]:
    """Map `arr_0`; return it and its checksum as the archive states it."""
    with zipfile.ZipFile(path) as archive:
        member = archive.getinfo(f"{NAME}.npy")
        if member.compress_type != zipfile.ZIP_STORED:
            raise ValueError("it is compressed; write it with numpy.savez, not savez_compressed")
        with archive.open(member) as file:
            version = np.lib.format.read_magic(file)
            read = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
            if version not in read:
                raise ValueError(f"its .npy format is {version}, this jlt reads (1, 0) and (2, 0)")
            shape, by_columns, dtype = read[version](file)
            header = file.tell()
    if by_columns or dtype.hasobject:
        raise ValueError("it is in Fortran order, or holds objects")
    with path.open("rb") as raw:
        raw.seek(member.header_offset)
        name_length, extra_length = struct.unpack("<26xHH", raw.read(30))  # of the member's own header in the archive
    start = member.header_offset + 30 + name_length + extra_length + header
    if 0 in shape:
        return np.zeros(shape, dtype), member.CRC
    return np.memmap(path, dtype, "r", start, shape), member.CRC
