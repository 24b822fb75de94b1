"""Where trained networks err: by eigen-direction of the latents' covariance, against t, over the Gaussian closed form.

For runs of any target, on the same held-out latents, noise and times, each prediction is read as the clean latent (an
exact conversion), and its error is projected on the eigenvectors of the covariance of tokens. In every direction it is
divided by the conditional variance lambda (1 - t)^2 / Var z (jlt.flow.geometry): 1 is what the best network reaches
that sees one token of a Gaussian and no more. Below 1 lies what context, classes and shape beyond covariance are
worth; above 1 what the network fails to do. In a direction the ratio of two runs is the same in x-, eps- and v-space.
"""

from collections.abc import Mapping
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor

from jlt import flow
from jlt.data import Latents
from jlt.data.covariance import patches
from jlt.evaluation.records import Figure, Record, Value
from jlt.experiments.capacity import THIRDS
from jlt.flow import geometry, random
from jlt.flow.random import Stream
from jlt.sampling import Generator

TIMES = tuple(k / 20 for k in range(1, 20))
SHOWN = (0.1, 0.5, 0.9)


@torch.no_grad()
def direction_errors(
    generator: Generator,
    latents: Latents,
    basis: Float[Tensor, "d d"],
    patch_size: int = 1,
    max_images: int = 500,
    batch_size: int = 250,
) -> Float[Tensor, "t d"]:
    """Return the mean squared error of x along each column of `basis`, at each of TIMES; noise depends on the image."""
    count, device = min(len(latents), max_images), next(generator.model.parameters()).device
    sums = torch.zeros(len(TIMES), basis.shape[1], dtype=torch.float64)
    num_tokens = 0
    for index in torch.arange(count).split(batch_size):
        x = latents.gather(index)
        eps = random.normal(0, Stream.HELD_OUT_NOISE, 0, index, x.shape[1:])
        label = latents.labels[index].to(device)
        for k, time in enumerate(TIMES):
            z, t = flow.interpolate(x, eps, time), torch.full((len(index),), time)
            y = generator.model(z.to(device), t.to(device), label).cpu()
            error = flow.convert(y.double(), z.double(), t.double(), generator.target, flow.TARGETS["x"]) - x.double()
            sums[k] += (patches(error, patch_size) @ basis).square().sum(0)
        num_tokens += patches(x, patch_size).shape[0]
    return sums / num_tokens


def measure_mechanism(
    runs: Mapping[str, Generator],
    latents: Latents,
    covariance: Float[Tensor, "d d"],
    patch_size: int = 1,
    max_images: int = 500,
) -> Record:
    """Measure runs on held-out latents, in the eigenbasis of the covariance of (training) tokens.

    The first run is what the others are compared with. Latents of another shape, or other latents, are a ValueError.
    """
    promised = latents.manifest
    for name, generator in runs.items():
        for what, theirs, ours in (
            ("shape", generator.model.config.shape, latents.shape),
            ("representation", generator.representation.fingerprint, promised.representation_fingerprint),
            ("affine", generator.affine, promised.affine),
            ("noise scale", float(generator.header.get("noise_scale", 1.0)), 1.0),
        ):
            if theirs != ours:
                raise ValueError(f"{name} was trained with {what} {theirs!s:.60}, it is {ours!s:.60} here")
    eigenvalues, basis = (side.flip(-1) for side in torch.linalg.eigh(covariance))
    eigenvalues = eigenvalues.clamp(min=geometry.ROUNDING * eigenvalues[0].item())
    closed = geometry.conditional_variance(eigenvalues, 1, 0, torch.tensor(TIMES, dtype=torch.float64)[:, None])
    errors = {name: direction_errors(run, latents, basis, patch_size, max_images) for name, run in runs.items()}
    first, figures = next(iter(runs)), {}
    numbers = list(range(1, len(eigenvalues) + 1))
    for name, error in errors.items():
        figures[f"{name} over the closed form"] = Figure(
            f"Squared error of {name} (predicts {runs[name].target.short}) by direction, over that of the best "
            "denoiser of one Gaussian token. Below 1 the network gains from context and classes; above 1 it falls "
            "short.",
            "direction, from the largest variance", "error / closed form",
            {f"t = {t:g}": (numbers, (error / closed)[TIMES.index(t)].tolist()) for t in SHOWN}, y_scale="log",
        )  # fmt: skip
    for name in list(errors)[1:]:
        ratio = {
            which: (e.sum(1) / o.sum(1)).tolist()
            for which, e, o in zip(THIRDS, *(errors[n].tensor_split(3, 1) for n in (name, first)), strict=True)
        }
        figures[f"{name} over {first}"] = Figure(
            f"Squared error of {name} over that of {first}, in thirds of the directions by variance. Above 1, "
            f"{first} is the better one.",
            "t (0 = noise, 1 = data)", "ratio of errors",
            {f"{which} variances": (list(TIMES), line) for which, line in ratio.items()}, y_scale="log",
        )  # fmt: skip
    return Record(
        kind="mechanism",
        name="Trained networks by direction",
        values={},
        settings={"images": min(len(latents), max_images), "split": latents.manifest.split, "patch_size": patch_size},
        figures=figures,
        parts=tuple(
            Record(
                kind="run",
                name=name,
                values={
                    f"error / closed form, {which} variances, t = {t:g}": Value(
                        (e[TIMES.index(t)].sum() / c[TIMES.index(t)].sum()).item()
                    )
                    for t in SHOWN
                    for which, e, c in zip(THIRDS, error.tensor_split(3, 1), closed.tensor_split(3, 1), strict=True)
                },
                settings={"target": runs[name].target.short, "step": runs[name].header["step"]},
                fingerprints={"weights": runs[name].fingerprint},
            )
            for name, error in errors.items()
        ),
    )


def run_names(folders: tuple[Path, ...]) -> list[str]:
    """Name runs by their folders' own names where those differ, else by their paths."""
    short = [folder.name for folder in folders]
    return short if len(set(short)) == len(short) else [str(folder) for folder in folders]
