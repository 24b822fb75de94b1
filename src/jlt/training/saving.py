"""Saving while training goes on: a copy of the state is written by a thread, one checkpoint at a time.

Training waits for the copy alone, and for the last write before the next. A sharded model's tensors are put together
and written one at a time instead, all processes waiting. A checkpoint appears when it is whole; what a crash cuts off
leaves the one before.
"""

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack
from pathlib import Path
from typing import Any

from torch import Tensor

from jlt.nn import checkpoint
from jlt.processes import Processes

Folder = tuple[Path, Mapping[str, Mapping[str, Tensor]]]


class Saver(AbstractContextManager["Saver"]):
    """Writes folders of tensors; all processes call its methods, and the first writes.

    An error in the thread (a full disk) is raised by the next call.
    """

    def __init__(self, processes: Processes) -> None:
        self.processes, self.pool, self.pending = processes, ThreadPoolExecutor(1, "saving"), list[Future[None]]()

    def __exit__(self, *error: object) -> None:
        self.pool.shutdown()

    def save(
        self,
        folders: Sequence[Folder],
        header: Mapping[str, Any],
        extra: Callable[[Path], None],
        then: Callable[[], None],
    ) -> None:
        """Write folders as `checkpoint.write` does, then call `then`; return when the tensors may change again."""
        self.wait()
        if any(hasattr(t, "placements") for _, files in folders for state in files.values() for t in state.values()):
            for folder, tensors in folders:
                checkpoint.save_tensors(folder, tensors, header, extra, self.processes)
            self.processes.first(then)
            return
        if self.processes.rank:
            return
        copies = [(folder, checkpoint.copied(tensors)) for folder, tensors in folders]

        def work() -> None:
            for folder, tensors in copies:
                whole = (tensor for state in tensors.values() for tensor in state.values())
                checkpoint.write(folder, tensors, whole, header, extra)
            then()

        self.pending.append(self.pool.submit(work))

    def wait(self) -> None:
        """Return when all is written; raise what went wrong."""
        with ExitStack() as done:
            done.callback(self.pending.clear)
            self.processes.first(lambda: [future.result() for future in self.pending])
