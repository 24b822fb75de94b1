"""Latents of small random images on disk, for tests that train."""

from pathlib import Path
from typing import Any

import torch

from jlt.data import encode
from jlt.data.idx import Arrays


def encode_noise(folder: Path, count: int = 40, classes: str = "abcd", **options: Any) -> Path:
    """Encode `count` grey images of 8 px, a letter a class in turn, and return the folder; `options` are encode's."""
    images = torch.randint(0, 256, (count, 1, 8, 8), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    source = Arrays("mnist", images.numpy(), torch.arange(count).numpy() % len(classes), tuple(classes), "test")
    encode(source, folder, **{"stride": 2, "num_held_out": 10} | options)
    return folder
