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

WEIGHTS: dict[str, Callable[[Tensor], Tensor]] = {
    "constant": torch.ones_like,
    # min(SNR, 5) with SNR = t^2 / (1 - t)^2: Hang et al., "Efficient Diffusion Training via Min-SNR Weighting", eq. 7
    "min-snr-5": lambda t: torch.clamp((t / (1 - t)) ** 2, max=5.0),
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
