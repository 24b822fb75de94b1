"""The geometry of stored latents: the spectrum of their covariance, and what each prediction target makes of it.

The covariance is that of tokens: the channels of one latent position, or of one p x p patch of positions in (row,
column, channel) order, which is what the network's input layer sees. Sums run in float64 over the whole set. The
record has one part a target (x, eps, v) with the statistics of its covariance (Sigma, I, Sigma + I), and figures of
the spectra and, against t, of the optimal linear coefficients and the ambiguity (paper, "Local linear-Gaussian
analysis").
"""

from typing import Protocol

import torch
from jaxtyping import Float, Int64
from torch import Tensor
from tqdm import tqdm

from jlt import flow
from jlt.evaluation.records import Figure, Record, Value
from jlt.flow import geometry

COVARIANCES = {"x": "Σ", "eps": "I", "v": "Σ + I"}
TARGETS = {name: flow.TARGETS[name].coefficients(0.0) for name in COVARIANCES}  # c_x, c_eps; none depends on t


class Latents(Protocol):
    """What is measured: a set of latents that knows its size and gathers batches."""

    def __len__(self) -> int: ...

    def gather(self, indices: Int64[Tensor, " b"]) -> Float[Tensor, "b c h w"]:
        """Return the latents at `indices`."""


def measure_geometry(
    latents: Latents, patch_size: int = 1, batch_size: int = 256, name: str = "Latent geometry"
) -> Record:
    """Measure the covariance of all tokens and return its statistics, for each target, as a record.

    A singular covariance has no condition number: that value is then missing, and `singular directions` counts why.
    """
    mean, covariance, num_tokens = token_moments(latents, patch_size, batch_size)
    eigenvalues = torch.linalg.eigvalsh(covariance).flip(0).clamp(min=0)
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
            "patch_size": patch_size,
        },
        figures=geometry_figures(eigenvalues),
        parts=tuple(_target_record(target, eigenvalues) for target in TARGETS),
    )


def token_moments(
    latents: Latents, patch_size: int = 1, batch_size: int = 256
) -> tuple[Float[Tensor, " d"], Float[Tensor, "d d"], int]:
    """Return mean, covariance (n - 1) and number of the tokens, d = patch_size^2 channels, in float64.

    Sums are taken about the first batch's mean, so that a large common offset costs no digits.
    """
    if len(latents) < 1 or batch_size < 1:
        raise ValueError(f"moments need at least 1 latent and a batch of 1, got {len(latents)} and {batch_size}")
    origin = total = products = None
    num_tokens = 0
    for start in tqdm(range(0, len(latents), batch_size), desc="covariance", unit="batch", disable=None):
        batch = latents.gather(torch.arange(start, min(start + batch_size, len(latents))))
        tokens = patches(batch.double(), patch_size)
        if origin is None or total is None or products is None:
            origin = tokens.mean(0)
            total, products = torch.zeros_like(origin), origin.new_zeros(len(origin), len(origin))
        tokens = tokens - origin
        total += tokens.sum(0)
        products += tokens.T @ tokens
        num_tokens += len(tokens)
    assert origin is not None
    assert total is not None
    assert products is not None
    if num_tokens <= len(origin):
        raise ValueError(f"a covariance of {len(origin)} directions needs more tokens than that, got {num_tokens}")
    if not products.isfinite().all():
        raise ValueError(f"{int((~products.diagonal().isfinite()).sum())} of {len(origin)} directions are not finite")
    covariance = (products - torch.outer(total, total) / num_tokens) / (num_tokens - 1)
    return origin + total / num_tokens, covariance, num_tokens


def patches(latents: Float[Tensor, "b c h w"], patch_size: int) -> Float[Tensor, "n d"]:
    """Cut latents into p x p patches, flattened in (row, column, channel) order."""
    _, channels, height, width = latents.shape
    if patch_size < 1 or height % patch_size or width % patch_size:
        raise ValueError(f"patch_size must divide the latents' {height} x {width}, got {patch_size}")
    rows = latents.unfold(2, patch_size, patch_size).unfold(3, patch_size, patch_size)  # (b, c, h/p, w/p, p, p)
    return rows.permute(0, 2, 3, 4, 5, 1).reshape(-1, patch_size**2 * channels)


def geometry_figures(eigenvalues: Float[Tensor, " d"]) -> dict[str, Figure]:
    """Return the spectra, the optimal coefficients of x and v, and the ambiguity, for a spectrum in falling order."""
    directions = list(range(1, len(eigenvalues) + 1))
    time = torch.linspace(0, 0.98, 50, dtype=torch.float64)  # v's coefficient and ambiguity may diverge at t = 1
    chosen = {"largest": eigenvalues[0], "median": eigenvalues.median(), "smallest": eigenvalues[-1]}
    figures = {
        "spectrum": Figure(
            "Variance of each target along the eigen-directions of the latents' covariance. "
            "Velocity adds 1 to every direction, which hides the shape of the small ones.",
            "direction",
            "variance",
            {
                f"{target}: {COVARIANCES[target]}": (
                    directions,
                    geometry.target_spectrum(eigenvalues, *coefficients).tolist(),
                )
                for target, coefficients in TARGETS.items()
            },
            y_scale="log",
        )
    }
    for target, fact in (
        ("x", "damps directions of little variance"),
        ("v", "amplifies directions of little variance"),
    ):
        figures[f"coefficient of {target}"] = Figure(
            f"Optimal linear coefficient E[{target}|z]/z in the directions of largest, median and smallest variance: "
            f"a network that predicts {target} {fact}.",
            "t (0 = noise, 1 = data)",
            f"E[{target}|z] / z",
            {
                f"{name}, λ = {eigenvalue.item():.3g}": (
                    time.tolist(),
                    geometry.optimal_coefficient(eigenvalue, *TARGETS[target], time).tolist(),
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
                geometry.conditional_variance(eigenvalues, *coefficients, time[:, None]).mean(1).tolist(),
            )
            for target, coefficients in TARGETS.items()
        },
        y_scale="log",
    )
    return figures


def _target_record(target: str, eigenvalues: Float[Tensor, " d"]) -> Record:
    c_x, c_eps = TARGETS[target]
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
    settings = {"covariance": COVARIANCES[target], "c_x": c_x, "c_eps": c_eps}
    return Record(kind="target", name=target, values=values, settings=settings)
