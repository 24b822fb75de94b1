"""Where the runs of a comparison or a sweep are made: one after another, one a device, or a share of them here.

What a run's result is does not depend on where it was made, nor on what else was made at the time.
"""

import multiprocessing
import re
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.queues import Queue
from pathlib import Path
from typing import Any, TypeVar

import torch
from tqdm import tqdm

from jlt.processes import check_device

T = TypeVar("T")


def share(items: Sequence[T], text: str) -> list[T]:
    """Return every n-th of the items: share "k/n", k from 1 to n, is items k, k + n, ... (of a Slurm array, say)."""
    match = re.fullmatch(r"(\d+)/(\d+)", text)
    if not match or not 1 <= int(match[1]) <= int(match[2]):
        raise ValueError(f"a share is K/N with K from 1 to N, such as 3/8, got {text!r}")
    return list(items[int(match[1]) - 1 :: int(match[2])])


def check(devices: Sequence[str]) -> None:
    """Raise a ValueError for no devices, and for one that is not here."""
    if not devices:
        raise ValueError("the runs need at least 1 device, got 0")
    for device in devices:
        check_device(device)


def spread(work: Callable[[T, str], object], items: Sequence[T], devices: Sequence[str], log: Path) -> None:
    """Call work(item, device) for all items: with one device one after another, with several one at a time on each.

    Each of several devices has a process of its own, whose output goes to a file in the folder `log`; CPUs divide this
    process's threads. The first failure is raised once the others have ended what they were at.
    """
    check(devices)
    if len(devices) == 1:
        for item in items:
            work(item, devices[0])
        return
    log.mkdir(parents=True, exist_ok=True)
    context = multiprocessing.get_context("spawn")
    places: Queue[tuple[str, Path]] = context.Queue()
    for i, device in enumerate(devices):
        places.put((device, log / f"log-{i}-{device.replace(':', '-')}.txt"))
    threads = max(1, torch.get_num_threads() // devices.count("cpu")) if "cpu" in devices else torch.get_num_threads()
    with ProcessPoolExecutor(len(devices), context, initializer=settle, initargs=(places, threads)) as pool:
        waiting = [pool.submit(on_place, work, item) for item in items]
        try:
            for done in tqdm(as_completed(waiting), total=len(items), desc="runs", unit="run", disable=None):
                done.result()
        except BrokenProcessPool:
            raise ValueError(f"a process ended before its run, killed perhaps; {log} holds what it said") from None
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


_place: list[str] = []  # the device of this process, once it has settled


def settle(places: "Queue[tuple[str, Path]]", threads: int) -> None:
    """Take a device for this process, and a file for what it says."""
    device, log = places.get()
    torch.set_num_threads(threads)
    sys.stdout = sys.stderr = log.open("a", buffering=1)
    _place.append(device)


def on_place(work: Callable[[Any, str], object], item: Any) -> None:
    """Do one item's work on this process's device."""
    work(item, _place[0])
