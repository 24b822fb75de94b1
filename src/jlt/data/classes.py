"""Class names: what they are where images come with numbers or with WordNet ids.

imagenet_classes.txt holds the 1,000 classes of ImageNet-1k as "n01440764 tench": the WordNet id and the first word that
WordNet gives for it, or the word and the id where two classes share a word ("crane (n02012849)", the bird). Ids and
words are facts that WordNet and the ILSVRC list state; they were taken from the tables that come with timm 1.0.31.
"""

import functools
import re
from collections.abc import Sequence
from importlib import resources

import numpy as np
from jaxtyping import Int

MAX_CLASSES = 2**20  # names of numbered classes are all held in memory


@functools.cache
def imagenet_classes() -> dict[str, str]:
    """Return the names of the ImageNet-1k classes by WordNet id, in the order of their labels."""
    lines = resources.files("jlt.data").joinpath("imagenet_classes.txt").read_text().splitlines()
    return {wordnet_id: name for wordnet_id, _, name in (line.partition(" ") for line in lines)}


def usual_names(num_classes: int) -> tuple[str, ...] | None:
    """Return ImageNet-1k's names for 1,000 numbered classes, which are taken for its own; None for other numbers."""
    return tuple(imagenet_classes().values()) if num_classes == 1000 else None


def readable(names: Sequence[str]) -> tuple[str, ...]:
    """Turn names that are all WordNet ids to words; an id that is not in ImageNet-1k, or any other name, stays."""
    if not all(re.fullmatch(r"n\d{8}", name) for name in names):
        return tuple(names)
    return tuple(imagenet_classes().get(name, name) for name in names)


def name_classes(labels: Int[np.ndarray, " n"], names: Sequence[str] | None, where: str) -> tuple[str, ...] | None:
    """Return the class names of labels: those given, in words, or "0", "1", ...; None where every label is -1.

    Labels that names do not cover, names that repeat, and labels on some images only are a ValueError.
    """
    low, high = int(labels.min()), int(labels.max())
    if high == low == -1:
        return None
    if low < 0:
        raise ValueError(f"{where}: image {int(labels.argmin())} has the label {low}, others up to {high}")
    if high >= (MAX_CLASSES if names is None else len(names)):
        allowed = f"at most {MAX_CLASSES} classes" if names is None else f"{len(names)} class names"
        raise ValueError(f"{where}: image {int(labels.argmax())} has the label {high}, there are {allowed}")
    if names is None:
        return tuple(str(k) for k in range(high + 1))
    if len(set(names)) < len(names):
        raise ValueError(f"{where}: the class name {max(names, key=list(names).count)!r} stands there twice")
    return readable(names)
