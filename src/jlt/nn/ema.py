"""Exponential moving averages of the weights, any number of them, kept in float32 whatever the model's dtype.

An average starts as the initial weights. With decay d it still holds d^n of them after n steps (0.9999: 90 % after a
thousand), so the decays must fit the run's length; `fitting_decay` gives one that does.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn


def fitting_decay(steps: int, share: float = 0.05) -> float:
    """Return the decay whose averaging length 1 / (1 - d) is that share of the run, rounded to three digits."""
    return float(f"{1 - 1 / max(share * steps, 2):.4g}")


class EMA:
    """Averages of a model's parameters, by decay: `averages[decay][name]` is a float32 tensor."""

    def __init__(self, model: nn.Module, decays: Sequence[float]) -> None:
        for decay in decays:
            if not 0 <= decay < 1:
                raise ValueError(f"an EMA decay must be in [0, 1), got {decay}")
        self.averages: dict[float, dict[str, Tensor]] = {
            decay: {name: p.detach().float().clone() for name, p in model.named_parameters()} for decay in decays
        }

    @torch.no_grad()
    def update(self, model: nn.Module, share: Tensor | float = 1.0) -> None:
        """Move every average towards the model's weights: average = d average + (1 - d) weights.

        `share`, 0 or 1, leaves it where it is with 0; it may be a tensor that the host has not read.
        """
        weights = [local(p).detach().float() for p in model.parameters()]
        for decay, average in self.averages.items():
            rate = torch.as_tensor(share, device=weights[0].device) * (1 - decay)
            torch._foreach_lerp_([local(a) for a in average.values()], weights, [rate] * len(weights))


def local(tensor: Tensor) -> Tensor:
    """Return the part of a sharded tensor that is here, sharing its memory; any other tensor as it is."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor
