"""Photographs: image files of any size, whatever they lie in, cut to squares when they are read."""

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
from jaxtyping import Int, UInt8

from jlt.data.images import decode, square

IMAGE_SIZE = 256  # where none is asked for


@dataclass(frozen=True)
class Photos:
    """Encoded images that `read(i)` gives with a name for messages; it is called from several threads at once."""

    spec: str
    read: Callable[[int], tuple[bytes, str]] = field(compare=False)
    targets: Int[np.ndarray, " n"] = field(compare=False)
    class_names: tuple[str, ...] | None
    image_size: int
    upscale: bool
    fingerprint: str

    @property
    def image_shape(self) -> tuple[int, int, int]:
        return (3, self.image_size, self.image_size)

    def labels(self) -> Int[np.ndarray, " n"]:
        return self.targets

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int) -> tuple[UInt8[np.ndarray, "c h w"], int]:
        data, name = self.read(index)
        pixels = square(decode(data, name), self.image_size, self.upscale, name)
        return np.ascontiguousarray(pixels.transpose(2, 0, 1)), int(self.targets[index])
