"""The held-out loss by time, in x-, eps- and v-space whatever the target, so that runs of two targets compare."""

import torch

from jlt.data import Latents
from jlt.flow import TARGETS, interpolate, loss, random, target
from jlt.flow.random import Stream
from jlt.nn import Transformer
from jlt.processes import Processes
from jlt.training.config import TrainConfig
from jlt.training.parallel import share

BINS = 10


@torch.no_grad()
def held_out_losses(
    model: Transformer,
    latents: Latents,
    config: TrainConfig,
    draws: int = 2,
    max_images: int = 1000,
    batch_size: int = 250,
    processes: Processes = Processes(),  # noqa: B008
) -> dict[str, list[float]]:
    """Return, for each space, the mean loss in ten equal bins of t, with the same noise and times for every run.

    Each image is seen at `draws` times, in different bins, with its own label; so few images that a bin would stay
    empty are seen in all ten. Processes divide them, and all get the result; fewer of them than there are processes are
    seen by every one.
    """
    count = min(len(latents), max_images)
    if count < -(-BINS // draws):
        draws = BINS
    divided = processes if processes.count <= count * draws else Processes()
    sums = {space: torch.zeros(BINS, dtype=torch.float64) for space in TARGETS}
    filled = torch.zeros(BINS, dtype=torch.float64)
    device = next(model.parameters()).device
    serial, parts = share(count * draws, batch_size, divided)
    for part in serial.tensor_split(parts):
        index, draw = part % count, part // count
        bins = (index + draw * BINS // draws) % BINS  # neighbours, often of one class, go to different bins
        t = (bins + (part % 97 + 0.5) / 97) / BINS
        x = latents.gather(index).to(device)
        eps = config.noise_scale * random.normal(0, Stream.HELD_OUT_NOISE, 0, part, x.shape[1:]).to(device)
        t, label = t.to(device), latents.labels[index].to(device)
        y = model(interpolate(x, eps, t), t, label).float()
        filled += torch.bincount(bins, minlength=BINS)
        for space in TARGETS:
            losses = loss(y, x, eps, t, target(config.target), TARGETS[space], "constant", config.floor)
            sums[space].index_add_(0, bins, losses.cpu().double())
    filled = divided.total(filled)
    return {space: (divided.total(total) / filled).tolist() for space, total in sums.items()}
