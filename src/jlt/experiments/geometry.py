"""The geometry of stored latents: the spectrum of their covariance, and what each prediction target makes of it.

The covariance is that of tokens: the channels of one latent position, of one p x p patch of positions in (row,
column, channel) order, which is what the network's input layer sees, or of the whole image. Sums run in float64 over
the whole set. The record has one part a target (x, eps, v, and others of constant coefficients where they are asked
for) with the statistics of its covariance c_x^2 Sigma + c_eps^2 I, and figures of the spectra and, against t, of the
optimal linear coefficients and the ambiguity (paper, "Local linear-Gaussian analysis").

A whole image of more than DENSE numbers has its LEADING largest eigenvalues measured by subspace iteration (Halko,
Martinsson and Tropp, arXiv 0909.4061, algorithm 4.4), each with its error; the trace is exact, and what needs the rest
of the spectrum is given between bounds.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor
from tqdm import tqdm

from jlt import flow
from jlt.data.covariance import Measurable, patches, spectrum, token_moments
from jlt.evaluation.records import Figure, Record, Value
from jlt.flow import geometry
from jlt.flow.targets import CHANNELS

Moments = tuple[Float[Tensor, " d"], Float[Tensor, "d d"], int]  # mean, covariance and number of tokens
DENSE = 4096  # numbers whose covariance is still worked out whole: 134 MB
LEADING = 256
TARGETS = ("x", "eps", "v")


def measure_geometry(
    latents: Measurable,
    patch_size: int | None = 1,
    batch_size: int = 256,
    name: str = "Latent geometry",
    moments: Moments | None = None,
    targets: Sequence[str] = TARGETS,
) -> Record:
    """Measure the covariance of all tokens and return its statistics, for each target, as a record.

    A target whose coefficients change with t has no one covariance, and is a ValueError.
    `moments` are the tokens' (jlt.data.covariance.token_moments), where they are known already. A `patch_size` of None
    takes the whole image as one token. A singular covariance has no condition number: that value
    is then missing, and `singular directions` counts why.
    """
    if patch_size is None and latents.gather(torch.zeros(1, dtype=torch.int64)).numel() > DENSE:
        return measure_leading(latents, batch_size, name, targets)
    mean, covariance, num_tokens = moments or token_moments(latents, patch_size, batch_size)
    eigenvalues = spectrum(covariance)
    channels, height, width = latents.gather(torch.zeros(1, dtype=torch.int64)).shape[1:]
    return Record(
        kind="geometry",
        name=name,
        values={
            "tokens": Value(num_tokens),
            "largest absolute mean": Value(mean.abs().max().item()),
            "singular directions": Value(int((eigenvalues <= geometry.ROUNDING * eigenvalues[0]).sum())),
        },
        settings={
            "latents": len(latents),
            "latent shape": [channels, height, width],
            "patch_size": patch_size or "whole image",
        },
        figures=geometry_figures(eigenvalues, targets),
        parts=tuple(_target_record(target, eigenvalues) for target in targets),
    )


@dataclass(frozen=True)
class Leading:
    """The largest eigenvalues of a covariance in falling order, the error of each, the trace, and the dimension."""

    eigenvalues: Float[Tensor, " k"]
    errors: Float[Tensor, " k"]
    trace: float
    dimension: int

    @property
    def square(self) -> tuple[float, float]:
        """Bounds of tr Sigma^2: the rest of the variance is spread evenly, or all in one direction.

        In a basis that begins with the vectors found, Sigma is diagonal there, its block beside it has the errors for
        the lengths of its columns, and only the trace of its last block is known.
        """
        found = (self.eigenvalues.square() + 2 * self.errors.square()).sum().item()
        rest, left = max(self.trace - self.eigenvalues.sum().item(), 0.0), self.dimension - len(self.eigenvalues)
        return found + rest**2 / max(left, 1), found + rest**2


def leading_spectrum(
    latents: Measurable, count: int = LEADING, passes: int = 4, batch_size: int = 256, seed: int = 0
) -> Leading:
    """Find the `count` largest eigenvalues of the whole image's covariance in so many passes and one over the data.

    An eigenvalue's error is |Sigma u - lambda u| for the unit vector u found with it: one of Sigma's eigenvalues lies
    within it, and none found is above the true one of its rank.
    """
    dimension = latents.gather(torch.zeros(1, dtype=torch.int64)).numel()
    # a tenth more than asked for, at least 8, which the iteration sharpens the last ones with
    block = min(count + max(8, count // 10), dimension, max(len(latents) - 1, 1))
    if len(latents) < 2 or count < 1 or passes < 1:
        raise ValueError(f"a spectrum needs 2 latents, 1 eigenvalue and 1 pass, got {len(latents)}, {count}, {passes}")
    generator = torch.Generator().manual_seed(seed)
    basis = torch.linalg.qr(torch.randn(dimension, block, generator=generator, dtype=torch.float64)).Q
    batches = torch.arange(len(latents)).split(batch_size)
    mean = torch.zeros(dimension, dtype=torch.float64)
    for index in batches:
        mean += patches(latents.gather(index).double(), None).sum(0) / len(latents)
    if not mean.isfinite().all():
        raise ValueError(f"{int((~mean.isfinite()).sum())} of {dimension} directions are not finite")
    image, trace = basis, 0.0
    for turn in tqdm(range(passes + 1), desc="spectrum", unit="pass", disable=None):
        basis, image, trace = (torch.linalg.qr(image).Q if turn else basis), torch.zeros_like(basis), 0.0
        for index in batches:
            centred = patches(latents.gather(index).double(), None) - mean
            image += centred.T @ (centred @ basis) / (len(latents) - 1)
            trace += centred.square().sum().item() / (len(latents) - 1)
    eigenvalues, rotation = torch.linalg.eigh(basis.T @ image)
    eigenvalues, rotation = eigenvalues.flip(0)[:count].clamp(min=0), rotation.flip(1)[:, :count]
    errors = (image @ rotation - basis @ rotation * eigenvalues).norm(dim=0)
    return Leading(eigenvalues, errors, trace, dimension)


def measure_leading(
    latents: Measurable, batch_size: int = 256, name: str = "Latent geometry", targets: Sequence[str] = TARGETS
) -> Record:
    """Measure the leading spectrum of the whole image, for each target, as a record."""
    found = leading_spectrum(latents, batch_size=batch_size)
    return Record(
        kind="geometry",
        name=name,
        values={
            "tokens": Value(len(latents)),
            "eigenvalues found": Value(len(found.eigenvalues)),
            "their share of the variance": Value(found.eigenvalues.sum().item() / found.trace),
            "largest error of an eigenvalue": Value(found.errors.max().item()),
        },
        settings={"latents": len(latents), "directions": found.dimension, "patch_size": "whole image"},
        figures={
            "spectrum": Figure(
                "The largest eigenvalues of the covariance of whole images, by subspace iteration, each with its "
                "error. A spectrum that falls fast leaves the network few directions to get right.",
                "direction", "variance, and its error",
                {
                    "variance": (list(range(1, len(found.eigenvalues) + 1)), found.eigenvalues.tolist()),
                    "error": (list(range(1, len(found.eigenvalues) + 1)), found.errors.tolist()),
                },
                x_scale="log", y_scale="log",
            )
        },
        parts=tuple(_leading_record(target, found) for target in targets),
    )  # fmt: skip


def _leading_record(target: str, found: Leading) -> Record:
    c_x, c_eps = constants(target)
    trace = c_x**2 * found.trace + c_eps**2 * found.dimension
    squares: list[float] = [
        c_x**4 * square + 2 * (c_x * c_eps) ** 2 * found.trace + c_eps**4 * found.dimension for square in found.square
    ]
    values = {
        "largest eigenvalue": Value(c_x**2 * found.eigenvalues[0].item() + c_eps**2),
        "trace": Value(trace),
        "effective rank, at least": Value(trace**2 / max(squares)),
        "effective rank, at most": Value(trace**2 / min(squares)),
    }
    held = geometry.target_spectrum(found.eigenvalues, c_x, c_eps).cumsum(0)  # of as many eigenvectors at least
    if len(enough := (held >= 0.9 * trace * (1 - geometry.ROUNDING)).nonzero()):
        values["directions for 90 % of the variance, at most"] = Value(int(enough[0]) + 1)
    settings = {"covariance": formula(target), "c_x": c_x, "c_eps": c_eps}
    return Record(kind="target", name=target, values=values, settings=settings)


def constants(target: str) -> tuple[float, float]:
    """Return c_x and c_eps of a target, which may not change with t."""
    of = flow.target(target)
    if of.short == CHANNELS:
        raise ValueError(f"the covariance of {CHANNELS} changes with t, and its coefficients with the channel")
    start, end = (tuple(map(float, of.coefficients(t))) for t in (0.0, 1.0))
    if start != end:
        raise ValueError(f"the covariance of {target} changes with t: c_x, c_eps are {start} at t = 0, {end} at t = 1")
    return start[0], start[1]


def formula(target: str) -> str:
    """Return a target's covariance as a formula, such as "Σ + 0.25 I"."""
    squares = zip((c**2 for c in constants(target)), ("Σ", "I"), strict=True)
    return " + ".join(name if square == 1 else f"{square:g} {name}" for square, name in squares if square)


def geometry_figures(eigenvalues: Float[Tensor, " d"], targets: Sequence[str] = TARGETS) -> dict[str, Figure]:
    """Return the spectra, the optimal coefficients of x and v, and the ambiguity, for a spectrum in falling order."""
    directions = list(range(1, len(eigenvalues) + 1))
    time = torch.linspace(0, 0.98, 50, dtype=torch.float64)  # v's coefficient and ambiguity may diverge at t = 1
    chosen = {"largest": eigenvalues[0], "median": eigenvalues.median(), "smallest": eigenvalues[-1]}
    figures = {
        "spectrum": Figure(
            "Variance of each target along the eigen-directions of the latents' covariance. "
            "Velocity adds 1 to every direction, which hides the shape of what is far below 1.",
            "direction",
            "variance",
            {
                f"{target}: {formula(target)}": (
                    directions,
                    geometry.target_spectrum(eigenvalues, *constants(target)).tolist(),
                )
                for target in targets
            },
            y_scale="log",
        )
    }
    for target, fact in (
        ("x", "the coefficient of x is near 0, and the network damps z"),
        ("v", "that of v is near -1/(1-t), and the network amplifies z"),
    ):
        figures[f"coefficient of {target}"] = Figure(
            f"Optimal linear coefficient E[{target}|z]/z in the directions of largest, median and smallest variance. "
            f"Where tλ is far below (1-t)², {fact}.",
            "t (0 = noise, 1 = data)",
            f"E[{target}|z] / z",
            {
                f"{name}, λ = {eigenvalue.item():.3g}": (
                    time.tolist(),
                    geometry.optimal_coefficient(eigenvalue, *constants(target), time).tolist(),
                )
                for name, eigenvalue in chosen.items()
            },
        )
    figures["ambiguity"] = Figure(
        "Conditional variance of each target given z, mean over directions: the least squared error that any network "
        "reaches on a Gaussian of this covariance. Velocity's is 1/(1-t)² times that of x.",
        "t (0 = noise, 1 = data)",
        "Var(y|z)",
        {
            target: (
                time.tolist(),
                geometry.conditional_variance(eigenvalues, *constants(target), time[:, None]).mean(1).tolist(),
            )
            for target in targets
        },
        y_scale="log",
    )
    return figures


def _target_record(target: str, eigenvalues: Float[Tensor, " d"]) -> Record:
    c_x, c_eps = constants(target)
    statistics = geometry.spectrum_statistics(geometry.target_spectrum(eigenvalues, c_x, c_eps))
    values = {
        "condition number": Value(statistics.condition_number),
        "effective rank": Value(statistics.effective_rank),
        "directions for 90 % of the variance": Value(statistics.directions_90),
        "directions": Value(statistics.dimension),
        "largest eigenvalue": Value(statistics.largest),
        "smallest eigenvalue": Value(statistics.smallest),
        "trace": Value(statistics.trace),
    }
    if statistics.condition_number == float("inf"):  # which JSON cannot hold
        del values["condition number"]
    settings = {"covariance": formula(target), "c_x": c_x, "c_eps": c_eps}
    return Record(kind="target", name=target, values=values, settings=settings)
