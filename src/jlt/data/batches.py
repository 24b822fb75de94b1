"""Images of a source in batches, decoded in threads ahead of whoever encodes them."""

from collections import deque
from collections.abc import Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice

import numpy as np
import torch
from jaxtyping import Int, UInt8
from torch import Tensor

from jlt.data.images import BrokenImage, quiet
from jlt.data.sources import Source

Batches = Generator[tuple[UInt8[Tensor, "b c h w"], Int[Tensor, " b"]], None, None]
AHEAD = 2  # batches in the threads' hands while one is with the caller


def read_batches(source: Source, start: int, stop: int, batch_size: int) -> Batches:
    """Yield images and labels of source[start:stop], `batch_size` at once."""
    return read_ranges(source, cut(start, stop, batch_size))


def cut(start: int, stop: int, size: int) -> list[range]:
    """Cut start..stop into ranges of `size`, the last one possibly shorter."""
    return [range(first, min(first + size, stop)) for first in range(start, stop, size)]


def read_ranges(source: Source, ranges: Iterable[range]) -> Batches:
    """Yield a batch of images and labels for each range of indices; a broken image's error tells how to go on."""
    todo, waiting = iter(ranges), deque[list[Future[tuple[np.ndarray, int]]]]()
    with ThreadPoolExecutor() as pool, quiet():
        try:
            while True:
                for indices in islice(todo, AHEAD + 1 - len(waiting)):
                    waiting.append([pool.submit(source.__getitem__, i) for i in indices])
                if not waiting:
                    return
                pairs = [future.result() for future in waiting.popleft()]
                yield torch.from_numpy(np.stack([p[0] for p in pairs])), torch.tensor([label for _, label in pairs])
        except BrokenImage as error:
            raise BrokenImage(f"{error} (skip_broken leaves such images out)") from None
        finally:
            pool.shutdown(cancel_futures=True)
