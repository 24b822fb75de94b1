"""Reading ahead: the right images in the right order, some of them early, never many."""

import threading
import time

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from jlt.data.batches import AHEAD, cut, read_batches, read_ranges
from jlt.data.images import BrokenImage


class Numbers:
    """A source whose image i is filled with i; it counts how many were asked for, and may break at one."""

    spec, class_names, image_shape, fingerprint = "numbers", None, (1, 1, 1), "numbers"

    def __init__(self, size: int, broken: int = -1) -> None:
        self.size, self.broken, self.asked, self.lock = size, broken, 0, threading.Lock()

    def labels(self) -> np.ndarray:
        return np.arange(self.size)

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> tuple[np.ndarray, int]:
        with self.lock:
            self.asked += 1
        if index == self.broken:
            raise BrokenImage(f"image {index} is broken")
        return np.full((1, 1, 1), index % 256, dtype=np.uint8), index


@given(st.integers(0, 40), st.integers(1, 9), st.integers(0, 10))
def test_batches_are_the_slices_of_the_source_in_order(size: int, batch_size: int, start: int) -> None:
    batches = list(read_batches(Numbers(start + size), start, start + size, batch_size))
    labels = [label for _, part in batches for label in part.tolist()]
    assert labels == list(range(start, start + size))
    assert all(len(part) == batch_size for _, part in batches[:-1])
    for images, part in batches:
        assert torch.equal(images.flatten().long(), part % 256)
    assert [index for span in cut(start, start + size, batch_size) for index in span] == labels


def test_images_are_decoded_ahead_but_only_a_few_batches() -> None:
    source = Numbers(1000)
    batches = read_ranges(source, cut(0, 1000, 10))
    for taken in range(1, 20):
        next(batches)
        assert source.asked <= (taken + AHEAD) * 10  # so memory does not grow with the number of images
    deadline = time.monotonic() + 30
    while source.asked < (19 + AHEAD) * 10:  # nobody asks, and yet the next ones are made
        assert time.monotonic() < deadline
        time.sleep(0.001)
    batches.close()


def test_a_broken_image_stops_the_reading_and_says_how_to_go_on() -> None:
    batches = read_ranges(Numbers(100, broken=25), cut(0, 100, 10))
    assert [len(next(batches)[1]) for _ in range(2)] == [10, 10]  # those before it are whole
    with pytest.raises(BrokenImage, match=r"image 25 is broken \(skip_broken leaves such images out\)"):
        next(batches)
