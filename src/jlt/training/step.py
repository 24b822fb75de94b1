"""One training step, and what it is drawn from. Everything random is a function of (seed, step, position in the batch).

Steps are counted from 0; position is the image's place in the global batch, so neither ranks nor micro-batches matter.
"""

import dataclasses
import functools
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from jlt.data import Latents
from jlt.flow import interpolate, loss, random, target
from jlt.flow.random import Stream
from jlt.nn import EMA, Dropout
from jlt.training.config import TrainConfig


@dataclass(frozen=True)
class Batch:
    """What one step trains on: clean latents, noise, times, labels (num_classes where dropped), and positions."""

    x: Float[Tensor, "b c h w"]
    eps: Float[Tensor, "b c h w"]
    t: Float[Tensor, " b"]
    label: Int[Tensor, " b"]
    position: Int[Tensor, " b"]

    def to(self, device: torch.device) -> "Batch":
        return Batch(*(getattr(self, field.name).to(device, non_blocking=True) for field in dataclasses.fields(self)))


def draw_batch(latents: Latents, config: TrainConfig, step: int, position: Int[Tensor, " b"]) -> Batch:
    """Draw the images at these positions of the step's global batch, with their noise, times and labels."""
    seed = config.seed
    index = data_order(seed, len(latents), step * config.batch_size + position)
    flip = random.uniform(seed, Stream.FLIP, step, position) < 0.5 if config.flip else None
    dropped = random.uniform(seed, Stream.LABEL_DROP, step, position) < config.label_drop
    x = latents.gather(index, flip)
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
    model: nn.Module, ema: EMA, optimizer: torch.optim.Optimizer, batch: Batch, config: TrainConfig, step: int
) -> tuple[Tensor, Tensor]:
    """Take one step; return its mean loss and gradient norm. A non-finite gradient changes nothing."""
    for group in optimizer.param_groups:
        group["lr"] = config.learning_rate_at(step)
    z = interpolate(batch.x, batch.eps, batch.t)
    dropout = Dropout(config.seed, torch.tensor(step, device=z.device), batch.position) if config.dropout else None
    with torch.autocast(z.device.type, torch.bfloat16, enabled=config.dtype == "bfloat16"):
        y = model(z, batch.t, batch.label, dropout)
    losses = loss(
        y.float(), batch.x, batch.eps, batch.t,
        target(config.target), target(config.loss_space), config.loss_weight, config.floor,
    )  # fmt: skip
    mean = losses.mean()
    mean.backward()
    norm = nn.utils.clip_grad_norm_(model.parameters(), config.clip)
    if torch.isfinite(norm):
        optimizer.step()
        ema.update(model)
    optimizer.zero_grad()
    return mean.detach(), norm.detach()
