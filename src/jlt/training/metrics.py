"""metrics.jsonl, a line a step and a measurement, and the sinks that are fed with the same lines.

A sink takes a line as JSON holds it, late, since lines are written fifty at once. One that fails is named on standard
error and left alone from then on; no training stops for it. A value that is a text is a picture's path below the run.

To add a sink, write a context manager of (run, header, finished steps) that yields a function of a line, and a row of
SINKS.
"""

import contextlib
import json
import math
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from jlt import files
from jlt.extras import needed
from jlt.processes import Processes

Line = Mapping[str, Any]
Sink = Callable[[Line], None]
OpenSink = Callable[[Path, Mapping[str, Any], int], AbstractContextManager[Sink]]
MAX_NON_FINITE = 10


class Metrics:
    """Appends lines to metrics.jsonl; tensors are read only when lines are written, so that no step waits for them.

    Every process reads them and the first writes, and feeds the sink. A flush after ten steps in a row whose gradient
    was not finite is a FloatingPointError; such steps have changed nothing. `best` is the least `score` of any line,
    with its step.
    """

    def __init__(
        self, path: Path, step: int, seed: int, processes: Processes, sink: Sink | None, every: int = 50
    ) -> None:
        self.path, self.seed, self.processes, self.every = path, seed, processes, every
        self.sink: Sink = sink or (lambda line: None)
        self.waiting, self.non_finite = list[dict[str, Any]](), list[int]()
        self.best: tuple[float, int] = (math.inf, 0)
        processes.first(lambda: self.forget_after(step))

    def forget_after(self, step: int) -> None:
        """Drop what an interrupted run wrote after its last checkpoint: it will be written again."""
        lines = self.path.read_text().splitlines(keepends=True) if self.path.exists() else []
        try:
            kept = [line for line in lines if line.endswith("\n") and json.loads(line)["step"] <= step]
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{self.path} has a line that is no JSON object with a step: {error}") from None
        if kept != lines:
            files.write_bytes(self.path, "".join(kept).encode())
        for line in kept:
            if '"score"' in line:
                self.compare(json.loads(line))

    def compare(self, line: Line) -> bool:
        """Note a line's score; return whether it is the best so far."""
        if line.get("score") is None or not line["score"] < self.best[0]:  # what was not finite comes back as None
            return False
        self.best = (line["score"], line["step"])
        return True

    def add(self, line: dict[str, Any]) -> None:
        self.waiting.append(line)
        if len(self.waiting) >= self.every:
            self.flush()

    def flush(self) -> None:
        lines, self.waiting = read_numbers(self.waiting), []
        if self.processes.rank == 0:
            with self.path.open("a") as file:
                file.writelines(json.dumps(line, allow_nan=False) + "\n" for line in lines)
            files.sync(self.path)  # before the checkpoint that these lines lead up to
            for line in lines:
                self.sink(line)
        for line in lines:
            if "gradient_norm" in line:
                self.watch(line["step"], line["gradient_norm"])

    def watch(self, step: int, norm: float | None) -> None:
        if norm is not None:
            self.non_finite.clear()
            return
        if self.processes.rank == 0:
            tell(f"step {step}: the gradient is not finite, step skipped")
        self.non_finite.append(step - 1)
        if len(self.non_finite) == MAX_NON_FINITE:
            raise FloatingPointError(
                f"the gradient was not finite in {MAX_NON_FINITE} steps in a row, "
                f"{self.non_finite[0]} to {self.non_finite[-1]} of seed {self.seed}"
            )


def read_numbers(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the lines with numbers for tensors, read in one go; None where not finite, which JSON has no word for."""
    tensors = [value for line in lines for value in line.values() if isinstance(value, Tensor)]
    numbers = iter(torch.stack(tensors).tolist() if tensors else [])

    def plain(value: Any) -> Any:
        if isinstance(value, Mapping):
            return {key: plain(inner) for key, inner in value.items()}
        if isinstance(value, list | tuple):
            return [plain(inner) for inner in value]
        number = next(numbers) if isinstance(value, Tensor) else value
        return None if isinstance(number, float) and not math.isfinite(number) else number

    return [{key: plain(value) for key, value in line.items()} for line in lines]


def read_metrics(run: Path) -> list[dict[str, Any]]:
    """Return the lines of a run's metrics.jsonl."""
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def flat(line: Line, prefix: str = "") -> dict[str, Any]:
    """Return a line's numbers and pictures by path: {"held_out": {"x": [1, 2]}} is held_out/x/0 and held_out/x/1."""
    found: dict[str, Any] = {}
    for key, value in line.items():
        if isinstance(value, list):
            value = dict(enumerate(value))
        if isinstance(value, Mapping):
            found |= flat({str(k): v for k, v in value.items()}, f"{prefix}{key}/")
        elif value is not None:
            found[prefix + key] = value
    return found


@contextlib.contextmanager
def tensorboard(run: Path, header: Mapping[str, Any], step: int) -> Iterator[Sink]:
    """TensorBoard's event files, in RUN/tensorboard; what an earlier process logged after `step` is hidden there."""
    with needed("--log tensorboard", "tensorboard"):
        from torch.utils.tensorboard import SummaryWriter
    with SummaryWriter(str(run / "tensorboard"), purge_step=step + 1) as writer:

        def sink(line: Line) -> None:
            for name, value in flat(line).items():
                if isinstance(value, str):
                    pixels = np.asarray(Image.open(run / value).convert("RGB"))
                    writer.add_image(name, pixels, line["step"], dataformats="HWC")
                elif name != "step":
                    writer.add_scalar(name, value, line["step"])

        yield sink


@contextlib.contextmanager
def wandb(run: Path, header: Mapping[str, Any], step: int) -> Iterator[Sink]:
    """Weights & Biases; WANDB_MODE=offline keeps it on the disk, in RUN/wandb. A run that goes on is one run there."""
    with needed("--log wandb", "wandb"):
        import wandb
    logged = wandb.init(
        project="jlt", name=run.name, id=files.fingerprint([str(run.resolve()), header["name"]]), resume="allow",
        dir=run, config=dict(header), settings=wandb.Settings(console="off", silent=True),
    )  # fmt: skip
    try:

        def sink(line: Line) -> None:
            values = {name: value for name, value in flat(line).items() if name != "step"}
            pictures = {n: wandb.Image(Image.open(run / v)) for n, v in values.items() if isinstance(v, str)}
            logged.log(values | pictures, step=line["step"])

        yield sink
    finally:
        logged.finish()


SINKS: dict[str, OpenSink] = {"tensorboard": tensorboard, "wandb": wandb}


@contextlib.contextmanager
def fed(sinks: Mapping[str, OpenSink], run: Path, header: Mapping[str, Any], step: int) -> Iterator[Sink]:
    """Open sinks and yield one that feeds them all; one that fails is named once and fed no more."""
    feeding: dict[str, tuple[contextlib.ExitStack, Sink]] = {}

    @contextlib.contextmanager
    def forgiven(name: str, but: tuple[type[Exception], ...] = ()) -> Iterator[None]:
        try:
            yield
        except but:
            raise
        except Exception as error:  # whatever somebody else's library may raise
            feeding.pop(name, None)
            tell(f"--log {name} failed and is left alone: {type(error).__name__}: {' '.join(str(error).split())}")

    for name, opener in sinks.items():
        with forgiven(name, but=(ValueError,)):  # a package that is missing is known before anything is trained
            inner = contextlib.ExitStack()
            feeding[name] = inner, inner.enter_context(opener(run, header, step))

    def feed(line: Line) -> None:
        for name, (_, sink) in list(feeding.items()):
            with forgiven(name):
                sink(line)

    try:
        yield feed
    finally:
        for name, (inner, _) in list(feeding.items()):
            with forgiven(name):
                inner.close()


def tell(message: str) -> None:
    """Print a line above the progress bar, on standard error."""
    tqdm.write(message, file=sys.stderr)
