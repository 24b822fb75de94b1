"""The geometry of Gaussian latents: what each prediction target asks of a linear network, in closed form.

For x ~ N(0, Sigma), eps ~ N(0, I) and z = t x + (1 - t) eps (t = 0 noise, t = 1 data), everything splits into the
eigen-directions of Sigma. In a direction of variance lambda, with a target y = c_x x + c_eps eps,

    Var z     = t^2 lambda + (1 - t)^2                                                       (1)
    Var y     = c_x^2 lambda + c_eps^2                                                       (2)
    E[y | z]  = (t c_x lambda + (1 - t) c_eps) / Var z * z                                   (3)
    Var(y | z) = lambda det^2 / Var z,   det = c_eps t - c_x (1 - t)                         (4)
    flow      : dz/dt = E[v | z],   z(t1) = z(t0) sqrt(Var z_t1 / Var z_t0)                  (5)

(4) is Var y - Cov(y, z)^2 / Var z with the squares multiplied out; since det is 1 - t for x and 1 for v up to sign,
Var(v | z) / Var(x | z) = 1 / (1 - t)^2 in every direction. (5) holds because the flow is linear in z and carries the
law of z_t0 to that of z_t1. Paper section: "Local linear-Gaussian analysis"; (1) to (5) extend it to every target.

Functions compute in float64 and broadcast `eigenvalue`, the coefficients and `t` against each other. Only lambda = 0
at t = 1 has no answer (z is then the constant 0): the results there are NaN, the limit of (3) as lambda -> 0 is not.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

ROUNDING = 1e-10  # an eigenvalue solver leaves errors of about 1e-16 * dimension of the largest eigenvalue
Number = float | int | Tensor


@dataclass(frozen=True)
class SpectrumStatistics:
    """What the eigenvalues of a covariance say about its shape; see `spectrum_statistics`."""

    condition_number: float
    effective_rank: float
    directions_90: int
    trace: float
    largest: float
    smallest: float
    dimension: int


def spectrum_statistics(eigenvalues: Float[Tensor, " d"]) -> SpectrumStatistics:
    """Summarise the eigenvalues of a covariance, in any order.

    `condition_number` is largest / smallest (infinite for a singular covariance), `effective_rank` the participation
    ratio (tr S)^2 / tr S^2, `directions_90` the least number of largest directions that hold 90 % of the variance.
    Negative eigenvalues of the size of rounding count as 0; larger ones, NaN and a zero covariance are a ValueError.
    """
    descending = eigenvalues.double().sort(descending=True).values
    if len(descending) == 0 or not descending.isfinite().all():
        raise ValueError(f"a spectrum needs at least 1 finite eigenvalue, got {eigenvalues.tolist()[:8]}")
    largest, smallest = descending[0].item(), descending[-1].item()
    if largest <= 0 or smallest < -ROUNDING * largest:
        raise ValueError(f"the eigenvalues of a covariance are at least 0, got {smallest:.3g} to {largest:.3g}")
    descending = descending.clamp(min=0)
    trace, smallest = descending.sum().item(), descending[-1].item()
    # ROUNDING again: nine equal directions of ten do hold 90 %, whatever the last bit of the sum.
    short_of_90 = descending.cumsum(0) < 0.9 * trace * (1 - ROUNDING)
    return SpectrumStatistics(
        condition_number=largest / smallest if smallest > 0 else float("inf"),
        effective_rank=trace**2 / descending.square().sum().item(),
        directions_90=int(short_of_90.sum()) + 1,
        trace=trace,
        largest=largest,
        smallest=smallest,
        dimension=len(descending),
    )


def target_spectrum(eigenvalue: Number, c_x: Number, c_eps: Number) -> Float[Tensor, "..."]:
    """Return the variance c_x^2 lambda + c_eps^2 of the target y = c_x x + c_eps eps, equation (2)."""
    return _double(c_x) ** 2 * _double(eigenvalue) + _double(c_eps) ** 2


def noisy_variance(eigenvalue: Number, t: Number) -> Float[Tensor, "..."]:
    """Return Var z_t = t^2 lambda + (1 - t)^2, equation (1)."""
    return target_spectrum(eigenvalue, _double(t), 1 - _double(t))


def optimal_coefficient(eigenvalue: Number, c_x: Number, c_eps: Number, t: Number) -> Float[Tensor, "..."]:
    """Return E[y | z] / z, equation (3): what a linear network of unlimited capacity multiplies z by."""
    time = _double(t)
    covariance = time * _double(c_x) * _double(eigenvalue) + (1 - time) * _double(c_eps)
    return covariance / noisy_variance(eigenvalue, t)


def conditional_variance(eigenvalue: Number, c_x: Number, c_eps: Number, t: Number) -> Float[Tensor, "..."]:
    """Return Var(y | z), equation (4): the least squared error that any network reaches in this direction."""
    time = _double(t)
    determinant = _double(c_eps) * time - _double(c_x) * (1 - time)
    return _double(eigenvalue) * determinant**2 / noisy_variance(eigenvalue, t)


def gaussian_velocity(z: Float[Tensor, "..."], eigenvalue: Number, t: Number) -> Float[Tensor, "..."]:
    """Return the exact marginal velocity E[v | z] at z, equation (3) with v = x - eps."""
    return optimal_coefficient(eigenvalue, 1.0, -1.0, t) * z


def gaussian_flow(z: Float[Tensor, "..."], eigenvalue: Number, t0: Number, t1: Number) -> Float[Tensor, "..."]:
    """Carry z from time t0 to time t1 (either way) along the exact probability flow, equation (5)."""
    return z * (noisy_variance(eigenvalue, t1) / noisy_variance(eigenvalue, t0)).sqrt()


def _double(value: Number) -> Tensor:
    return torch.as_tensor(value, dtype=torch.float64)
