"""Averages of the weights, any number of them, kept in float32 whatever the model's dtype.

Two kinds. With decay d an average starts as the initial weights and still holds d^n of them after n steps (0.9999: 90 %
after a thousand), so the decays must fit the run's length.

A power average of relative length s (EDM2, arXiv 2312.02696, section 3) weighs the weights of step t by t^gamma: it is
as long as a share of the run so far, forgets the start by itself, and from snapshots of two of them the average of any
other length can be worked out when the run is over (appendix C there; `reconstruction`).
"""

import contextlib
import math
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor, nn

SHORTEST = 1e-9  # far below one step of any run; 1 / length^2 is still a number
LONGEST = math.sqrt(1 / 12)  # the relative length of gamma = 0, the plain mean of all steps


def exponent(length: float) -> float:
    """Return gamma of a relative length: length^2 = (gamma + 1) / ((gamma + 2)^2 (gamma + 3)), EDM2 eq. 4.

    A length is the standard deviation of the profile t^gamma over a run of duration 1; it lies in [1e-9, 0.2887]. Any
    other is a ValueError.
    """
    if not SHORTEST <= length <= LONGEST:
        raise ValueError(
            f"the relative length of a power average must be in [{SHORTEST:g}, {LONGEST:.4f}], got {length}"
        )
    roots = np.roots([1, 7, 16 - length**-2, 12 - length**-2])
    return max(0.0, float(roots.real.max()))  # the other two are below -1, where the profile has no integral


def overlap(a: tuple[float, float], b: tuple[float, float]) -> float:
    """Return the integral of the product of two profiles (gamma, step), (gamma + 1) t^gamma / step^(gamma + 1)."""
    (p, until_p), (q, until_q) = a, b
    first = min(until_p, until_q)
    return (p + 1) * (q + 1) / (p + q + 1) * (first / until_p) ** (p + 1) * (first / until_q) ** (q + 1) / first


def reconstruction(kept: Sequence[tuple[float, int]], length: float, step: int) -> tuple[list[float], float]:
    """Return the factors of the kept averages, as (length, step), whose sum is nearest to the one asked for.

    Least squares of the profiles (EDM2, appendix C). Besides, what is left of the profile: the root of its integrated
    square, relative to the profile's own; 0 is exact.
    """
    profiles = [(exponent(own), float(at)) for own, at in kept]
    wanted = (exponent(length), float(step))
    matrix = np.array([[overlap(a, b) for b in profiles] for a in profiles])
    right = np.array([overlap(a, wanted) for a in profiles])
    norms = np.sqrt(np.diag(matrix))  # profiles of early steps are far higher: the system is solved for unit ones
    factors = np.linalg.lstsq(matrix / np.outer(norms, norms), right / norms, rcond=1e-13)[0] / norms
    own = overlap(wanted, wanted)
    left = own - 2 * factors @ right + factors @ matrix @ factors
    return factors.tolist(), math.sqrt(max(left, 0.0) / own)


class EMA:
    """Averages of a model's parameters as float32 tensors: `averages[decay][name]` and `powers[length][name]`."""

    def __init__(self, model: nn.Module, decays: Sequence[float], lengths: Sequence[float] = ()) -> None:
        for decay in decays:
            if not 0 <= decay < 1:
                raise ValueError(f"an EMA decay must be in [0, 1), got {decay}")

        def copy() -> dict[str, Tensor]:
            return {name: p.detach().float().clone() for name, p in model.named_parameters()}

        self.averages: dict[float, dict[str, Tensor]] = {decay: copy() for decay in decays}
        self.powers: dict[float, dict[str, Tensor]] = {length: copy() for length in lengths}
        self.exponents = {length: exponent(length) for length in lengths}

    @property
    def named(self) -> dict[str, dict[str, Tensor]]:
        """All averages by the names of their files: `ema-0.9999`, `power-0.05`."""
        powers = {f"power-{length:g}": average for length, average in self.powers.items()}
        return {f"ema-{decay:g}": average for decay, average in self.averages.items()} | powers

    @torch.no_grad()
    def update(self, model: nn.Module, share: Tensor | float = 1.0, step: int = 0) -> None:
        """Move every average towards the model's weights: average = d average + (1 - d) weights.

        `share`, 0 or 1, leaves it where it is with 0; it may be a tensor that the host has not read. `step`, counted
        from 0, sets the decay of power averages, (1 - 1 / t)^(gamma + 1) at the t-th step (EDM2 eq. 3).
        """
        weights = [local(p).detach().float() for p in model.parameters()]
        rates = [(1 - decay, average) for decay, average in self.averages.items()]
        rates += [
            (1 - (1 - 1 / (step + 1)) ** (self.exponents[length] + 1), average)
            for length, average in self.powers.items()
        ]
        for rate, average in rates:
            move = torch.as_tensor(share, device=weights[0].device) * rate
            torch._foreach_lerp_([local(a) for a in average.values()], weights, [move] * len(weights))


@contextlib.contextmanager
def standing_in(model: nn.Module, average: Mapping[str, Tensor] | None) -> Iterator[None]:
    """Within the block `model` has the weights of an average, or its own without one; afterwards its own, to the bit.

    The average takes the weights' place, since a sharded model can be called with no other weights.
    """
    own = [local(p.detach()) for p in model.parameters()]
    kept = [p.clone() for p in own] if average is not None else own
    try:
        if average is not None:
            torch._foreach_copy_(own, [local(a) for a in average.values()])
        yield
    finally:
        if callable(reshard := getattr(model, "reshard", None)):
            reshard()  # FSDP keeps the outermost weights gathered until a backward pass
        if average is not None:
            torch._foreach_copy_(own, kept)


def local(tensor: Tensor) -> Tensor:
    """Return the part of a sharded tensor that is here, sharing its memory; any other tensor as it is."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor
