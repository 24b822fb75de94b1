"""Where trained networks err: by eigen-direction of the latents' covariance, against t, over the Gaussian closed form.

For runs of any target, on the same held-out latents, noise and times, each prediction is read as the clean latent (an
exact conversion), and its error is projected on the eigenvectors of the covariance of tokens. In every direction it is
divided by the conditional variance lambda (1 - t)^2 / Var z (jlt.flow.geometry): 1 is what the best network reaches
that sees one token of a Gaussian and no more. Below 1 lies what context, classes and shape beyond covariance are
worth; above 1 what the network fails to do. In a direction the ratio of two runs is the same in x-, eps- and v-space.
Samples, too, are projected: unguided ones, of the classes of the held-out images, and their variance is divided by that
of these. Below 1 the samples lack what the direction says of the data, above 1 they keep noise.

Runs that differ in nothing but their seed count as one, with mean and standard deviation.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from jlt import flow
from jlt.data import Latents
from jlt.data.covariance import patches
from jlt.evaluation.records import Figure, Record, Value, mean_and_spread
from jlt.experiments.capacity import thirds
from jlt.flow import geometry, random
from jlt.flow.random import Stream
from jlt.sampling import Generator

TIMES = tuple(k / 20 for k in range(1, 20))
SHOWN = (0.1, 0.5, 0.9)
COMPARED = (0.05, 0.1, 0.3, 0.5, 0.7, 0.9)
STEPS = 25  # of Heun's method, for samples


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


def sample_variances(
    generator: Generator, latents: Latents, basis: Float[Tensor, "d d"], patch_size: int = 1, max_images: int = 500
) -> Float[Tensor, " d"]:
    """Return the mean square of samples along each column of `basis` over that of the latents; one image a latent."""
    index = torch.arange(min(len(latents), max_images))
    made = generator.sample(latents.labels[index], solver="heun", grid="uniform", steps=STEPS, scale=1.0).latents
    ours, theirs = ((patches(x.double(), patch_size) @ basis).square().mean(0) for x in (made, latents.gather(index)))
    return ours / theirs


def measure_mechanism(
    runs: Mapping[str, Sequence[Generator]],
    latents: Latents,
    covariance: Float[Tensor, "d d"],
    patch_size: int = 1,
    max_images: int = 500,
) -> Record:
    """Measure runs on held-out latents, in the eigenbasis of the covariance of (training) tokens.

    Under a name stand the seeds of one run. The first is what the others are compared with: over the seeds that both
    have, or by the means where there are none. Latents of another shape, or other latents, are a ValueError.
    """
    promised = latents.manifest
    for name, generator in ((name, generator) for name, seeds in runs.items() for generator in seeds):
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
    errors = {
        name: torch.stack([direction_errors(run, latents, basis, patch_size, max_images) for run in seeds])
        for name, seeds in runs.items()
    }
    figures, values = {}, dict[str, Value]()
    numbers = list(range(1, len(eigenvalues) + 1))
    for name, error in errors.items():
        figures[f"{name} over the closed form"] = Figure(
            f"Squared error of {name} (predicts {runs[name][0].target.short}) by direction, over that of the best "
            "denoiser of one Gaussian token. Below 1 the network gains from context and classes; above 1 it falls "
            f"short.{of_seeds(runs[name])}",
            "direction, from the largest variance", "error / closed form",
            {f"t = {t:g}": (numbers, (error.mean(0) / closed)[TIMES.index(t)].tolist()) for t in SHOWN},
            y_scale="log", level=1,
        )  # fmt: skip
    variances = {
        name: torch.stack([sample_variances(run, latents, basis, patch_size, max_images) for run in seeds])
        for name, seeds in runs.items()
    }
    figures["variance of samples"] = Figure(
        "Variance of unguided samples by direction, over that of held-out latents. Below 1 the samples lack variance "
        f"of the data, above 1 they keep noise.{of_seeds(next(iter(runs.values())))}",
        "direction, from the largest variance", "variance of samples / of data",
        {name: (numbers, found.mean(0).tolist()) for name, found in variances.items()},
        y_scale="log", level=1,
    )  # fmt: skip
    (first, reference), *others = errors.items()
    for name, error in others:
        rows, places = common_seeds(runs[name], runs[first])
        paired = (error[rows], reference[places]) if rows else (error.mean(0)[None], reference.mean(0)[None])
        ratios = ratio(*paired)
        figures[f"{name} over {first}"] = Figure(
            f"Squared error of {name} over that of {first}, in thirds of the directions by variance. Above 1, "
            f"{first} is the better one.{of_seeds(next(iter(ratios.values())))}",
            "t (0 = noise, 1 = data)", "ratio of errors",
            {f"{which} variances": (list(TIMES), found.mean(0).tolist()) for which, found in ratios.items()},
            y_scale="log", level=1,
        )  # fmt: skip
        values |= {
            f"{name} over {first}, {which} variances, t = {t:g}": mean_and_spread(found[:, TIMES.index(t)].tolist())
            for which, found in ratios.items()
            for t in COMPARED
        }
    return Record(
        kind="mechanism",
        name="Trained networks by direction",
        values=values,
        settings={"images": min(len(latents), max_images), "split": latents.manifest.split, "patch_size": patch_size},
        figures=figures,
        parts=tuple(
            Record(
                kind="run",
                name=name,
                values={
                    f"error / closed form, {which} variances, t = {t:g}": mean_and_spread(
                        (e[:, TIMES.index(t)].sum(1) / thirds(closed, 1)[which][TIMES.index(t)].sum()).tolist()
                    )
                    for t in SHOWN
                    for which, e in thirds(error, 2).items()
                }
                | {
                    f"variance of samples / of data, {which} variances": mean_and_spread(found.mean(1).tolist())
                    for which, found in thirds(variances[name], 1).items()
                },
                settings={"target": runs[name][0].target.short, "step": runs[name][0].header["step"]},
                fingerprints={"weights": " ".join(run.fingerprint for run in runs[name])},
            )
            for name, error in errors.items()
        ),
    )


def common_seeds(runs: Sequence[Generator], others: Sequence[Generator]) -> tuple[list[int], list[int]]:
    """Return the places, in either, of the runs whose seed both have."""
    seeds, theirs = ([training(run).get("seed") for run in each] for each in (runs, others))
    common = [seed for seed in seeds if seed in theirs]
    return [seeds.index(seed) for seed in common], [theirs.index(seed) for seed in common]


def ratio(error: Float[Tensor, "s t d"], reference: Float[Tensor, "s t d"]) -> dict[str, Float[Tensor, "s t"]]:
    """Return the ratio of errors in each third of the directions, by seed."""
    return {which: e.sum(2) / thirds(reference, 2)[which].sum(2) for which, e in thirds(error, 2).items()}


def of_seeds(each: Sequence[Generator] | Tensor) -> str:
    return f" Mean of {len(each)} seeds." if len(each) > 1 else ""


def by_seed(runs: Mapping[str, Generator]) -> dict[str, list[Generator]]:
    """Put together runs whose training differs in the seed alone, in the order of the seeds.

    Several are named by their target, and by the settings in which they differ from others; by their first name if
    that leaves two alike.
    """
    groups: dict[str, dict[str, Generator]] = {}
    for name, run in runs.items():
        others = {key: value for key, value in training(run).items() if key != "seed"} or {"name": name}
        groups.setdefault(repr((others, run.header.get("init"))), {})[name] = run
    recipes = [training(run) for group in groups.values() if len(group) > 1 for run in group.values()]
    known = [key for key in (recipes[0] if recipes else {}) if key not in ("seed", "target")]
    varied = [key for key in known if len({repr(recipe.get(key)) for recipe in recipes}) > 1]
    found: dict[str, list[Generator]] = {}
    for group in groups.values():
        first, run = next(iter(group.items()))
        name = ", ".join([run.target.short, *(f"{key} {training(run).get(key)}" for key in varied)])
        name = name if len(group) > 1 and name not in found else first
        found[name] = sorted(group.values(), key=lambda run: training(run).get("seed", 0))
    return found


def training(run: Generator) -> dict[str, Any]:
    """Return a run's recipe; an imported run has none."""
    return dict(run.header.get("training") or {})


def run_names(folders: tuple[Path, ...]) -> list[str]:
    """Name runs by their folders' own names where those differ, else by their paths."""
    short = [folder.name for folder in folders]
    return short if len(set(short)) == len(short) else [str(folder) for folder in folders]
