"""Looking at a training while it runs: watchers, gradient norms by block, and what the progress bar says.

A watcher is called between two steps, every so many of them and after the last, and returns what goes to metrics.jsonl
and the sinks. It may read everything and change nothing: what is learnt is the same to the bit with and without. A
`score` among what it returns asks for the checkpoint of the least one to be kept.
"""

import resource
import sys
from collections import defaultdict
from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from jlt.data import Latents
from jlt.nn import EMA, Transformer
from jlt.nn.ema import local, standing_in
from jlt.processes import Processes
from jlt.training.config import TrainConfig


@dataclass(frozen=True)
class View:
    """What a watcher sees: the run's folder, finished steps, model and averages, latents, and the processes.

    `latents` is the folder of all splits, `header` what a checkpoint states.
    """

    run: Path
    step: int
    model: Transformer
    ema: EMA
    latents: Path
    data: Latents
    held_out: Latents | None
    config: TrainConfig
    header: Mapping[str, Any]
    processes: Processes

    def weights(self, name: str | None = None) -> AbstractContextManager[None]:
        """Within the block the model has the weights of this average, by default the first; its own if none is kept."""
        return standing_in(self.model, self.ema.named[name] if name else next(iter(self.ema.named.values()), None))


class Watcher(Protocol):
    """Called by every process at once, after each multiple of `every` steps and after the last."""

    @property
    def every(self) -> int: ...

    def __call__(self, view: View) -> Mapping[str, Any]:
        """Return entries of a line of metrics.jsonl; those of the first process count."""
        ...


def is_due(every: int, step: int, last: int) -> bool:
    """Return whether something done every so many steps (0: never), and after the last, is done after this one."""
    return bool(every) and (step == last or step % every == 0)


def gradient_norms(model: nn.Module, processes: Processes) -> dict[str, Tensor]:
    """Return the norm of the gradient of each block and of each part outside the blocks; no number is read here.

    Their squares add up to the square of the whole gradient's.
    """
    parts = defaultdict[str, list[Tensor]](list)
    sharded = False
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            names = name.split(".")
            parts[".".join(names[: 2 if names[0] == "blocks" else 1])].append(local(parameter.grad))
            sharded |= hasattr(parameter.grad, "placements")
    squares = torch.stack([torch.stack(torch._foreach_norm(own)).square().sum() for own in parts.values()])
    norms = (processes.total(squares) if sharded else squares).sqrt()  # of a sharded model, each holds a part of it
    return {f"gradient_norm/{name}": norm for name, norm in zip(parts, norms.unbind(), strict=True)}


@dataclass(frozen=True)
class Pace:
    """What the progress bar says of a training's speed: `flop` an image, `peak` FLOP/s of all devices if known."""

    batch_size: int
    flop: float
    peak: float | None
    device: torch.device

    def __call__(self, steps_per_second: float | None) -> str:
        """Return images a second, share of the peak, and the most memory that this process has used."""
        said = []
        if steps_per_second:
            images = self.batch_size * steps_per_second
            said.append(f"{images:.4g} images/s")
            if self.peak:
                said.append(f"{images * self.flop / self.peak:.1%} of {self.peak / 1e12:.4g} TFLOP/s")
        return ", ".join([*said, f"{most_memory(self.device) / 1e9:.2f} GB"])


def most_memory(device: torch.device) -> int:
    """Return the most bytes that this process has held on the device; on a CPU, in memory."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if device.type == "mps":
        return torch.mps.driver_allocated_memory()
    return peak_resident()


def peak_resident() -> int:
    """Return the largest resident memory that this process had, in bytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak  # Linux counts kilobytes
