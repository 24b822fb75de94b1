"""What a denoiser of limited rank makes of Gaussian latents, whatever its target: a prediction before any training.

The model. x ~ N(0, Sigma), z = t x + (1 - t) eps, and a network whose last layer is a linear map U from r numbers to
the d numbers of a token, the same at all times,

    y(z, t) = U h(z, t),   U: d x r;   if linear, h = B(t) V^T z with any B(t), and V: d x r shared as U is         (1)

It learns a target y = c_x x + c_eps eps by its loss in some space, averaged over times with a weight w(t). A
Transformer of width r < d is of this form. Where the width is d or more (1) bounds nothing, and r only stands for a
capacity that is limited in some other way.

The best solution is a choice of r eigen-directions of Sigma. With S(t) = Cov z, the unlimited optimum E[y | z] = G(t) z
and the projection P onto the span of U, the loss exceeds that of G by

    int w E|y(z, t) - G z|^2 dt  >=  int w tr((1 - P) G S G^T) dt,   with equality for y(z, t) = P G(t) z           (2)

since nothing outside the span can be reached. So P maximises tr(P int w G S G^T dt), where all matrices are diagonal in
Sigma's eigenbasis, and by Ky Fan's theorem it projects onto the r directions of the highest

    score = int w(t) (t c_x lambda + (1 - t) c_eps)^2 / Var z dt.                                                   (3)

P G has the linear form (1) with V = U, so it is the answer for linear and any other h. In a kept direction the
denoiser is the optimum; in a neglected one it says 0, which the readout takes for

    x = c_eps z / det,   v = (c_x + c_eps) z / det,   so samples of standard deviation |c_eps / c_x|                (4)

for constant coefficients: 0 for x, that of the noise for v, k for x - k eps, and without bound for eps. The score of x
rises with lambda and that of eps falls; that of v is high at both ends, as v spends rank on cancelling noise where
there is no data. Samples are Gaussian with the eigenvectors of Sigma, so their Frechet distance is the sum of squared
differences of standard deviations. A `floor` bounds |det| from below as in training and sampling (jlt.flow.targets).

Latents are not Gaussian, and variance alone cannot tell noise from data. For data of any shape, if the directions
that (3) keeps are sampled as they are, with noise of variance s^2 in the others, the squared 2-Wasserstein distance
lies

    between   sum of (sqrt(lambda) - s)^2   and   sum of (lambda + s^2)   over neglected directions:              (5)

the Frechet distance below, which a Gaussian attains, and above the cost of pairing each sample with the data of its
kept directions, which data attain whose neglected directions follow from distant values of the kept ones. For x, with
s = 0, the two are one. By the upper bound x is before v on any spectrum at any rank below the full one: it keeps the
largest lambda and adds no s, but for the noise that a floor leaves of x in kept directions. That is an order of bounds:
for given data v may still be nearer, and a network may keep other directions than those of (3), which are a Gaussian's.

Paper section: "Local linear-Gaussian analysis", which (1) to (5) extend by the limit that makes targets differ.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from jlt import files
from jlt.flow import geometry
from jlt.flow.loss import WEIGHTS
from jlt.flow.targets import CHANNELS, Target, floored, target
from jlt.flow.times import TimeDensity

TIMES = 2000  # midpoints of equal cells, whose borders lie where a floor of 0.05 sets in


@dataclass(frozen=True)
class Fates:
    """What becomes of each eigen-direction: row 0 of (2, d) if the denoiser neglects it, row 1 if it keeps it.

    Attributes:
        eigenvalues: variances lambda of the clean latents.
        score: what keeping a direction takes off its mean loss, equation (3).
        loss: mean loss of training.
        x_error: mean squared error of x over uniform times.
        variance: variance of the samples, by the exact flow of the denoiser.
    """

    eigenvalues: Float[Tensor, " d"]
    score: Float[Tensor, " d"]
    loss: Float[Tensor, "2 d"]
    x_error: Float[Tensor, "2 d"]
    variance: Float[Tensor, "2 d"]


@dataclass(frozen=True)
class Forecast:
    """The best denoiser of some rank: the directions it keeps, and how it is judged.

    Attributes:
        kept: the directions of the highest scores.
        loss: mean training loss of a number, in its loss space.
        x_error: mean squared error of x of a number, over uniform times: comparable between targets.
        variance: variance of samples by direction.
        frechet: Frechet distance between samples and data, comparable too.
        at_most: the upper bound of (5), for data that are no Gaussian.
    """

    kept: Bool[Tensor, " d"]
    loss: float
    x_error: float
    variance: Float[Tensor, " d"]
    frechet: float
    at_most: float


def quadrature(density: TimeDensity, count: int = TIMES) -> Float[Tensor, " n"]:
    """Return times of equal weight whose average stands for the mean over a density of t."""
    return density.quantile((torch.arange(count, dtype=torch.float64) + 0.5) / count)


def loss_weight(of: Target, space: Target, t: Float[Tensor, "..."], floor: float) -> Float[Tensor, "..."]:
    """Return by what w(t) the squared error of y is multiplied in the loss of another space (jlt.flow.loss)."""
    if of.name == space.name:
        return torch.ones_like(t)
    return (space.det(t) / _floored_det(of, t, floor)) ** 2 * torch.ones_like(t)


def fates(
    eigenvalues: Float[Tensor, " d"],
    of: Target,
    space: Target,
    t: Float[Tensor, " n"],
    floor: float = 0.05,
    weight: str = "constant",
) -> Fates:
    """Work out what keeping or neglecting each direction means for a target trained at times `t`, drawn equally often.

    `weight` is a key of jlt.flow.loss.WEIGHTS. Raises a ValueError for a target or space with coefficients by channel,
    which eigen-directions are not.
    """
    for side in (of, space):
        if side.short == CHANNELS:
            raise ValueError(f"a forecast is of eigen-directions, {CHANNELS} has a variance for each channel")
    spectrum, t = eigenvalues.double().clamp(min=0), t.double()[:, None]
    w = files.choose("loss weight", weight, WEIGHTS)(t) * loss_weight(of, space, t, floor)
    explained = geometry.optimal_coefficient(spectrum, *of.coefficients(t), t) ** 2 * geometry.noisy_variance(
        spectrum, t
    )
    least = geometry.conditional_variance(spectrum, *of.coefficients(t), t)
    score, loss = (w * explained).mean(0), (w * least).mean(0)
    uniform = quadrature(TimeDensity("uniform"))[:, None]
    gains = [velocity_gain(spectrum, of, uniform, keep, floor) for keep in (False, True)]
    return Fates(
        eigenvalues=spectrum,
        score=score,
        loss=torch.stack([loss + score, loss]),
        x_error=torch.stack([x_error(spectrum, 1 + (1 - uniform) * gain, uniform).mean(0) for gain in gains]),
        # dz/dt = gain z, so that z at t = 1 is exp(int gain dt) times the unit noise at t = 0
        variance=torch.stack([(2 * gain.mean(0)).exp() for gain in gains]),
    )


def velocity_gain(
    eigenvalue: Float[Tensor, " d"], of: Target, t: Float[Tensor, "n 1"], keep: bool, floor: float = 0.05
) -> Float[Tensor, "n d"]:
    """Return v / z as read from a denoiser that is optimal in its own target (`keep`), or says 0."""
    c_x, c_eps = of.coefficients(t)
    y = geometry.optimal_coefficient(eigenvalue, c_x, c_eps, t) if keep else torch.zeros_like(t * eigenvalue)
    return (c_x + c_eps - y) / _floored_det(of, t, floor)


def x_error(
    eigenvalue: Float[Tensor, " d"], gain: Float[Tensor, "n d"], t: Float[Tensor, "n 1"]
) -> Float[Tensor, "n d"]:
    """Return the mean squared error E|x - gain z|^2 of a linear estimate of x."""
    # two sums of squares: the data that is missing, and the noise that is left
    return eigenvalue * (1 - gain * t) ** 2 + (gain * (1 - t)) ** 2


def forecast(directions: Fates, rank: int) -> Forecast:
    """Judge the best denoiser of a rank in [0, d], which keeps the directions of the highest scores."""
    dimension = len(directions.score)
    if not 0 <= rank <= dimension:
        raise ValueError(f"rank must be in [0, {dimension}] for {dimension} directions, got {rank}")
    kept = torch.zeros(dimension, dtype=torch.bool)
    kept[directions.score.argsort(descending=True, stable=True)[:rank]] = True
    loss, error, variance = (
        torch.where(kept, row[1], row[0]) for row in (directions.loss, directions.x_error, directions.variance)
    )
    least = (directions.eigenvalues.sqrt() - variance.sqrt()).square()
    return Forecast(
        kept=kept,
        loss=loss.mean().item(),
        x_error=error.mean().item(),
        variance=variance,
        frechet=least.sum().item(),
        at_most=torch.where(kept, least, directions.eigenvalues + variance).sum().item(),
    )


def rank_of(width: int, dimension: int) -> int:
    """Return the rank that a network of this width has for tokens of `dimension` numbers, (1).

    It is the width where that is below them. Else nothing is known of it, and half of them stands for it.
    """
    return width if width < dimension else dimension // 2


def recommend(
    eigenvalues: Float[Tensor, " d"],
    rank: int,
    names: Sequence[str] = ("x", "v"),
    space: str = "v",
    times: TimeDensity = TimeDensity(),  # noqa: B008
    floor: float = 0.05,
    weight: str = "constant",
) -> tuple[str, str]:
    """Return the target whose samples are forecast nearest to data of any shape, and a sentence that says why.

    It goes by the upper bound of (5). Of targets within 1 % of the nearest, relative to the trace, the first named
    counts.
    """
    trace, t = eigenvalues.double().sum().item(), quadrature(times)
    found = {name: forecast(fates(eigenvalues, target(name), target(space), t, floor, weight), rank) for name in names}
    nearest = min(each.at_most for each in found.values())
    best = next(name for name, each in found.items() if each.at_most <= nearest + 0.01 * trace)
    told = ", ".join(f"{e.frechet / trace:.3g} to {e.at_most / trace:.3g} for {name}" for name, e in found.items())
    return best, (
        f"{best}: a denoiser of rank {rank} for {len(eigenvalues)} directions is forecast to make samples at a squared "
        f"distance of {told}, in units of the data's variance; the first for Gaussian data, the second at most"
    )


def _floored_det(of: Target, t: Float[Tensor, "..."], floor: float) -> Float[Tensor, "..."]:
    c_x, c_eps = of.coefficients(t)
    det: Tensor = torch.as_tensor(floored(of.det(t), torch.as_tensor(c_eps - c_x), floor))
    return det
