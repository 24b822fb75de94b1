"""One training step, and what it is drawn from. Everything random is a function of (seed, step, position in the batch).

Steps are counted from 0; position is the image's place in the global batch, so neither ranks nor micro-batches matter.
"""

import contextlib
import dataclasses
import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from jlt.data import Latents
from jlt.flow import interpolate, loss, random, target
from jlt.flow.random import Stream
from jlt.nn import EMA, Dropout
from jlt.processes import Processes
from jlt.training.config import TrainConfig


@dataclass(frozen=True)
class Batch:
    """What one step trains on: clean latents, noise, times, labels (num_classes where dropped), and positions."""

    x: Float[Tensor, "b c h w"]
    eps: Float[Tensor, "b c h w"]
    t: Float[Tensor, " b"]
    label: Int[Tensor, " b"]
    position: Int[Tensor, " b"]

    @property
    def tensors(self) -> list[Tensor]:
        return [getattr(self, field.name) for field in dataclasses.fields(self)]

    def to(self, device: torch.device) -> "Batch":
        # elsewhere a copy that is not waited for may read memory that is already another's
        return Batch(*(tensor.to(device, non_blocking=device.type == "cuda") for tensor in self.tensors))

    def pin_memory(self) -> "Batch":
        return Batch(*(tensor.pin_memory() for tensor in self.tensors))

    def split(self, parts: int) -> "list[Batch]":
        """Cut it into so many batches that differ by one image at most; some are empty where there are too few."""
        return [Batch(*part) for part in zip(*(tensor.tensor_split(parts) for tensor in self.tensors), strict=True)]


def draw_batch(
    latents: Latents,
    config: TrainConfig,
    step: int,
    position: Int[Tensor, " b"],
    x: Float[Tensor, "b c h w"] | None = None,
) -> Batch:
    """Draw the images at these positions of the step's global batch, with their noise, times and labels.

    The latents go into `x`, if it is given.
    """
    seed = config.seed
    index = data_order(seed, len(latents), step * config.batch_size + position)
    flip = random.uniform(seed, Stream.FLIP, step, position) < 0.5 if config.flip else None
    dropped = random.uniform(seed, Stream.LABEL_DROP, step, position) < config.label_drop
    x = latents.gather(index, flip, x)
    return Batch(
        x=x,
        eps=config.noise_scale * random.normal(seed, Stream.NOISE, step, position, x.shape[1:]),
        t=config.times.quantile(random.uniform(seed, Stream.TIME, step, position)),
        label=torch.where(dropped, latents.num_classes, latents.labels[index]),
        position=position,
    )


def data_order(seed: int, size: int, serial: Int[Tensor, " b"]) -> Int[Tensor, " b"]:
    """Return the image that each serial number stands for: every epoch of `size` is an order of its own."""
    index = torch.empty_like(serial)
    for epoch in torch.unique(serial // size).tolist():
        mine = serial // size == epoch
        index[mine] = epoch_order(seed, size, epoch)[serial[mine] % size]
    return index


@functools.lru_cache(maxsize=2)  # a batch touches two epochs at most, unless it is larger than an epoch
def epoch_order(seed: int, size: int, epoch: int) -> Int[Tensor, " n"]:
    return random.permutation(seed, Stream.DATA_ORDER, epoch, size)


def make_optimizer(model: nn.Module, config: TrainConfig) -> torch.optim.AdamW:
    """Return AdamW as in the recipe."""
    return torch.optim.AdamW(
        model.parameters(), lr=config.learning_rate, betas=config.betas, weight_decay=config.weight_decay, fused=True
    )


def training_step(
    model: nn.Module,
    ema: EMA,
    optimizer: torch.optim.Optimizer,
    batch: Batch,
    config: TrainConfig,
    step: int,
    micro_batches: int = 1,
    processes: Processes = Processes(),  # noqa: B008
    look: Callable[[], None] = lambda: None,
) -> tuple[Tensor, Tensor]:
    """Take one step; return the global batch's mean loss and gradient norm. A non-finite gradient changes nothing.

    `batch` is this process's share, taken in `micro_batches` parts; `look` is called when the gradients are there and
    not clipped yet. The host reads no number here, so it runs ahead of the device.
    """
    for group in optimizer.param_groups:
        group["lr"] = config.learning_rate_at(step)
    # filled on the device: a number that is copied there, as torch.tensor does, waits for all that runs
    mean, at = torch.zeros((), device=batch.x.device), torch.full((), step, device=batch.x.device)
    for i, part in enumerate(batch.split(micro_batches)):
        share = len(part.t) / config.batch_size
        if not share:  # others have one more, and the parts of the model are gathered by all processes together
            part = batch.split(len(batch.t))[0]
        last = i == micro_batches - 1
        # copies of a model meet once a step; a sharded one reduces every part, or each would hold a whole gradient
        with model.no_sync() if isinstance(model, DistributedDataParallel) and not last else contextlib.nullcontext():
            z = interpolate(part.x, part.eps, part.t)
            mixed = config.dtype == "bfloat16"
            with torch.autocast(z.device.type, torch.bfloat16) if mixed else contextlib.nullcontext():
                dropout = Dropout(config.seed, at, part.position) if config.dropout else None
                y = model(z, part.t, part.label, dropout)
            losses = loss(
                y.float(), part.x, part.eps, part.t,
                target(config.target), target(config.loss_space), config.loss_weight, config.floor,
            )  # fmt: skip
            weighted = losses.mean() * share
            (weighted * processes.count).backward()  # the engine averages over processes, and shares need their sum
        mean += weighted.detach()
    look()
    norm = nn.utils.clip_grad_norm_(model.parameters(), config.clip).detach()
    norm = norm.full_tensor() if hasattr(norm, "full_tensor") else norm
    finite = torch.isfinite(norm).float()
    optimizer.found_inf = 1 - finite  # type: ignore[attr-defined]  # fused AdamW looks at it, on the device
    optimizer.step()
    ema.update(model, finite, step)
    optimizer.zero_grad()
    return processes.total(mean), norm
