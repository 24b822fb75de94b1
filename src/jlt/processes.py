"""The processes that work on one thing, and their devices: one process, or as many as torchrun started.

    torchrun --nproc-per-node 8 -m jlt encode ...

What a process does is a function of its rank and their number; what they make depends on neither. They talk over gloo
from CPUs and over nccl from GPUs.
"""

import contextlib
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

T = TypeVar("T")
PATIENCE = timedelta(days=2)  # for the slowest of them; torchrun itself ends all when one fails


@dataclass(frozen=True)
class Processes:
    """This process's `rank` among `count`."""

    rank: int = 0
    count: int = 1

    def first(self, function: Callable[[], T]) -> T | None:
        """Call `function` on the first process alone, the others waiting; return its result there, None elsewhere.

        Its ValueError or OSError is raised there; the other processes then leave quietly, with exit code 2.
        """
        if self.count == 1:
            return function()
        result, failure, done = None, None, torch.ones(1)
        if self.rank == 0:
            try:
                result = function()
            except (ValueError, OSError) as error:
                failure, done = error, torch.zeros(1)
        dist.broadcast(done, src=0)
        if failure:
            raise failure
        if not done:
            raise SystemExit(2)
        return result

    def wait(self) -> None:
        """Return once all processes are here."""
        self.any(False)

    def any(self, flag: bool) -> bool:
        """Return whether `flag` is true on any of them; they all have to ask."""
        if self.count == 1:
            return flag
        asked = torch.tensor(float(flag))  # on the CPU: no device is waited for
        dist.all_reduce(asked, dist.ReduceOp.MAX)
        return bool(asked)

    def together(self, value: Tensor) -> Tensor:
        """Return the values of all, of one shape and on the CPU, joined along the first axis in order of rank."""
        if self.count == 1:
            return value
        parts = [torch.empty_like(value) for _ in range(self.count)]
        dist.all_gather(parts, value.contiguous())
        return torch.cat(parts)

    def total(self, value: Tensor) -> Tensor:
        """Return the sum of their values, which every one of them gets."""
        if self.count > 1:
            value = value.clone()
            dist.all_reduce(value)
        return value


@contextlib.contextmanager
def joined() -> Iterator[Processes]:
    """Join the processes that torchrun started with this one; without torchrun there is one."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield Processes()
        return
    dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo", timeout=PATIENCE)
    try:
        yield Processes(dist.get_rank(), dist.get_world_size())
    finally:
        # gloo's threads drop the last operation's tensors under their lock, for which they need the interpreter, and a
        # group that is destroyed (by DDP's reducer, too) waits for that lock with the interpreter held: for ever
        time.sleep(0.2)
        dist.destroy_process_group()


def check_device(name: str) -> None:
    """Raise a ValueError for a device that is not here, but open none: an opened GPU keeps memory for the process."""
    try:
        device = torch.device(name)
        count = torch.get_device_module(device).device_count()
    except (RuntimeError, AttributeError) as error:
        raise ValueError(f"device {name!r} cannot be used here: {str(error).splitlines()[0]}") from None
    if (device.index or 0) >= count:
        raise ValueError(f"device {name!r} cannot be used here: there are {count} of its kind")


def open_device(name: str | torch.device) -> torch.device:
    """Return the device of that name, under torchrun this process's "cuda"; one that is not here is a ValueError."""
    if name == "cuda" and "LOCAL_RANK" in os.environ:
        name = f"cuda:{os.environ['LOCAL_RANK']}"
    try:
        torch.empty(1, device=name)
        device = torch.device(name)
        if device.type == "cuda" and device.index is not None:
            torch.cuda.set_device(device)  # nccl and FSDP work on the current one
        return device
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ValueError(f"device {str(name)!r} cannot be used here: {str(error).splitlines()[0]}") from None
