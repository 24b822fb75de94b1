"""Batches fitted to memory: what an image takes is counted, tensor by tensor, while one is made."""

import dataclasses
import os
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from jlt import files
from jlt.processes import Processes
from jlt.sampling.generator import Generator, Making
from jlt.sampling.storage import HEADER

SHARE = 0.5  # of the free memory: kernels have workspaces of their own, and an allocator leaves gaps
MOST = 256  # images, beyond which a device gains nothing


class Counted(TorchDispatchMode):
    """Counts the bytes of tensors that are made inside and still in use: `now`, and at most `peak`."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now = self.peak = 0
        self.known: set[int] = set()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation and count the storages of its results."""
        made = function(*args, **(kwargs or {}))
        before = {leaf.untyped_storage()._cdata for leaf in tree_leaves((args, kwargs)) if torch.is_tensor(leaf)}
        for leaf in tree_leaves(made):
            if not torch.is_tensor(leaf):
                continue
            storage = leaf.untyped_storage()
            if storage._cdata in before | self.known:  # a view, or written in place
                continue
            self.known.add(storage._cdata)
            self.now += storage.nbytes()
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self.dropped, storage._cdata, storage.nbytes())
        return made

    def dropped(self, name: int, size: int) -> None:
        """Forget a storage."""
        self.known.discard(name)
        self.now -= size


def peak_bytes(function: Callable[[], object]) -> int:
    """Return the most bytes that tensors made by `function` hold at a time, on any device."""
    with Counted() as counted:
        function()
    return counted.peak


def free_bytes(device: torch.device) -> int:
    """Return the memory that is free on a device; one that does not tell is a ValueError."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    if device.type == "mps":
        return torch.mps.recommended_max_memory() - torch.mps.driver_allocated_memory()
    if device.type == "cpu" and "SC_AVPHYS_PAGES" in os.sysconf_names:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    raise ValueError(f"device {device} does not tell how much memory is free; give batch_size a number")


def fitting_batch_size(
    generator: Generator, how: Making, out: Path, processes: Processes = Processes()  # noqa: B008
) -> int:  # fmt: skip
    """Return the batch size that a folder was begun with, or as many images as half of the free memory takes.

    Makes one image in at most four steps to see what it takes. All processes get the first one's answer.
    """

    def choose() -> int:
        begun = files.read_json(out / HEADER) if (out / HEADER).is_file() else None
        if isinstance(begun, dict) and isinstance(size := begun.get("batch_size"), int):
            return size  # what else the file states is compared when the folder is claimed
        one = dataclasses.replace(how, steps=min(how.steps, 4), batch_size=1)
        first = dataclasses.replace(one, steps=1)  # loads a decoder's weights
        # a compiler that meets a dispatch mode gives the code up, and all later batches would run uncompiled
        with torch.compiler.set_stance("force_eager"):
            generator.sample([0], **vars(first), progress=False)
            taken = peak_bytes(lambda: generator.sample([0], **vars(one), progress=False))
        device = next(generator.model.parameters()).device
        sharers = 1 if device.type == "cuda" else int(os.environ.get("LOCAL_WORLD_SIZE", "1"))  # of one memory
        return max(1, min(MOST, int(SHARE * free_bytes(device) / (taken * sharers))))

    return int(processes.total(torch.tensor(processes.first(choose) or 0)))
