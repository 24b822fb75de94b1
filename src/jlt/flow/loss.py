"""The training loss: the target that the network outputs and the space in which it is scored are separate choices.

In the target's own space the loss is the plain error of y, with no floor. Across spaces it is the error of the
velocity, read with the floored det on both sides, times the unfloored |det| of the space asked for (JiT's 3 x 3 table,
with the authors' floor). The v-space has |det| = 1.
"""

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

from jlt import files
from jlt.flow.targets import Target, expand, velocity


def snr(t: Tensor) -> Tensor:
    """Return the signal-to-noise ratio t^2 / (1 - t)^2 of z."""
    return (t / (1 - t)) ** 2


# A weight is meant for the loss space that its source states it for; in another it is the same factor of another loss.
WEIGHTS: dict[str, Callable[[Tensor], Tensor]] = {
    "constant": torch.ones_like,
    # x-space, min(SNR, 5): Hang et al., "Efficient Diffusion Training via Min-SNR Weighting", eq. 7
    "min-snr-5": lambda t: torch.clamp(snr(t), max=5.0),
    # x-space, the smooth minimum 1 / (1/SNR + 1/5): Crowson et al., arXiv 2401.11605
    "soft-min-snr-5": lambda t: 1 / (1 / snr(t) + 1 / 5),
    # x-space, SNR + 1, which is (sigma^2 + 1) / sigma^2 of EDM for data of variance 1: arXiv 2206.00364, table 1
    "edm": lambda t: snr(t) + 1,
    # eps-space, sigmoid(2 - log SNR): Kingma and Gao, arXiv 2303.00848
    "sigmoid": lambda t: torch.sigmoid(2 - 2 * torch.logit(t)),
    # eps-space, 1 / (1 + SNR): Choi et al., arXiv 2204.00227, with k = gamma = 1
    "p2": lambda t: 1 / (1 + snr(t)),
    # v-space, over uniform times 2 / (pi (1 - 2 t + 2 t^2)), of mean 1: "cosmap" of SD3, arXiv 2403.03206
    "cosmap": lambda t: 2 / (torch.pi * (t**2 + (1 - t) ** 2)),
}


def loss(
    y: Float[Tensor, "b *c"],
    x: Float[Tensor, "b *c"],
    eps: Float[Tensor, "b *c"],
    t: Float[Tensor, " b"],
    target: Target,
    space: Target,
    weight: str = "constant",
    floor: float = 0.05,
) -> Float[Tensor, " b"]:
    """Return each image's mean squared error of the prediction `y` of `target`, scored in `space`, times w(t).

    `x`, `eps`: clean latent and noise; `t` (b,): times in [0, 1]; `weight`: a key of WEIGHTS.
    """
    w = files.choose("loss weight", weight, WEIGHTS)(t)
    error = y - target.mix(x, eps, t)
    if space.name != target.name:
        # velocity() is affine in y, so the velocity's error is the error of y read at z = 0
        error = velocity(target, error, torch.zeros_like(error), t, floor) * space.det(expand(t, x))
    return w * error.square().flatten(1).mean(1)
