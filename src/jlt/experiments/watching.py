"""What looks at a training: sample grids, distances, and the memorisation alarm; see jlt.training.watching.

    RUN/samples/step-*.png        images of the first average; a column a class, the same noise every time
    RUN/neighbours/step-*.png     its images above the training images that are nearest to them, in latents

Every process makes its share of the images; image i is the same whoever makes it. The first process measures.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from jlt.data import load_representation
from jlt.evaluation.neighbours import nearest
from jlt.experiments import plots
from jlt.experiments.asking import balanced_labels
from jlt.experiments.evaluate import Judge
from jlt.flow import target
from jlt.sampling import Generator, Samples
from jlt.training import View
from jlt.training.config import at_least
from jlt.training.metrics import tell

FAR_NEARER = 0.5
TOO_MANY = 0.1


@dataclass(frozen=True)
class Watching:
    """What is looked at while a run trains; nothing of it changes what is learnt.

    Attributes:
        log: where metrics go besides metrics.jsonl: tensorboard, wandb.
        gradient_norms_every: steps between measurements of the gradient's norm by block; 0 never, as for the next.
        samples_every: steps between pictures of samples (RUN/samples).
        distances_every: steps between measurements of samples against held-out images, for each average; the
            checkpoint of the least distance is kept.
        neighbours_every: steps between comparisons of samples with the nearest training latents; for small sets.
        watch_images: images a measurement.
        watch_steps: steps of Heun's method for them.
        watch_scale: their guidance scale; by default the preset's.
        peak_tflops: peak of a device, of which the progress bar then tells the used share; known for some GPUs.
    """

    log: tuple[str, ...] = ()
    gradient_norms_every: int = 0
    samples_every: int = 0
    distances_every: int = 0
    neighbours_every: int = 0
    watch_images: int = 500
    watch_steps: int = 12
    watch_scale: float | None = None
    peak_tflops: float | None = None

    def __post_init__(self) -> None:
        at_least(0, self, "gradient_norms_every", "samples_every", "distances_every", "neighbours_every")
        at_least(2, self, "watch_images")
        at_least(1, self, "watch_steps")
        if self.peak_tflops is not None and not self.peak_tflops > 0:
            raise ValueError(f"peak_tflops must be above 0, got {self.peak_tflops}")


@dataclass(frozen=True)
class Drawing:
    """How watchers make images: Heun's method on a uniform grid, guided where 0.1 < t < 1."""

    steps: int = 12
    scale: float = 1.0
    seed: int = 0
    batch_size: int = 100

    def __call__(self, view: View, labels: Int[Tensor, " n"], weights: str | None = None) -> Samples:
        """Make an image for each label with an average's weights, by default the first's; all processes get them."""
        processes, count = view.processes, len(labels)
        share = -(-count // processes.count)  # the same for all, or they would wait for each other's parts of the model
        mine = labels.repeat(2 + share * processes.count // count)[processes.rank * share :][:share]
        with view.weights(weights):
            made = opened(view).sample(
                mine, seed=self.seed, solver="heun", grid="uniform", steps=self.steps, scale=self.scale,
                batch_size=self.batch_size, first_index=processes.rank * share, progress=False,
            )  # fmt: skip
        together = {name: processes.together(getattr(made, name))[:count] for name in ("images", "latents")}
        return Samples(
            **together, labels=labels, seeds=[(self.seed, i) for i in range(count)], settings=made.settings,
            evaluations=made.evaluations, network_passes=made.network_passes, seconds=made.seconds,
        )  # fmt: skip


def opened(view: View) -> Generator:
    """Return what samples with the weights that the model has now."""
    return Generator(
        model=view.model,
        target=target(view.config.target),
        representation=load_representation(view.latents / "representation"),
        affine=view.data.manifest.affine,
        class_names=view.data.manifest.class_names,
        header={**view.header, "step": view.step},
        weights="in training",
        fingerprint="",
    )


@dataclass(frozen=True)
class Grids:
    """Draws samples of the first average: ten of each of the first ten classes, or 100 of none."""

    every: int
    draw: Drawing
    columns: int = 10
    rows: int = 10

    def __call__(self, view: View) -> Mapping[str, Any]:
        columns = min(view.data.num_classes, self.columns) or self.columns
        labels = torch.arange(columns * self.rows) % (columns if view.data.num_classes else 1)
        samples = self.draw(view, labels)
        name = f"samples/step-{view.step:08d}.png"
        view.processes.first(lambda: plots.save(view.run / name, plots.grid(samples.images, columns)))
        return {"samples": name}


@dataclass(frozen=True)
class Distances:
    """Measures samples of each average against held-out images; the least Frechet distance keeps its checkpoint.

    `judge` is the first process's, None elsewhere.
    """

    every: int
    draw: Drawing
    judge: Judge | None
    num_images: int = 500

    def __call__(self, view: View) -> Mapping[str, Any]:
        labels = balanced_labels(self.num_images, view.data.num_classes)
        found: dict[str, dict[str, float]] = {}
        for name in view.ema.named or {"model": {}}:
            samples = self.draw(view, labels, name if view.ema.named else None)
            if self.judge is not None:
                values = self.judge.values(self.judge.see(samples, f"{name} at step {view.step}"), samples)
                found[name] = {metric: float(value.value) for metric, value in values.items()}
        if not found:
            return {}
        scores = {name: next(v for k, v in values.items() if k.startswith("F")) for name, values in found.items()}
        best = min(scores, key=lambda name: scores[name])
        return {"distances": found, "best_weights": {best: scores[best]}, "score": scores[best]}


@dataclass
class Neighbours:
    """The memorisation alarm: samples' distances to the nearest training latents, beside held-out latents' ones.

    `copied` is the share of samples nearer than half the held-out latents' median, `expected` the same share of the
    held-out latents themselves. Half, because even the mean of the data, the most typical sample there is, is at
    1/sqrt(2) of the distance between two independent ones. More than a tenth too many is told in a line, once.
    """

    every: int
    draw: Drawing
    num_images: int = 100
    usual: Tensor | None = field(default=None, init=False)
    told: bool = field(default=False, init=False)

    def __call__(self, view: View) -> Mapping[str, Any]:
        samples = self.draw(view, balanced_labels(self.num_images, view.data.num_classes))
        line = view.processes.first(lambda: self.compare(view, samples))
        return line or {}

    def compare(self, view: View, samples: Samples) -> Mapping[str, Any]:
        flip = view.config.flip
        if self.usual is None:
            assert view.held_out is not None
            some = torch.arange(min(len(view.held_out), 500)) * len(view.held_out) // min(len(view.held_out), 500)
            self.usual = nearest(view.held_out.gather(some), None, view.data, 1, flip).distances[:, 0]
        found = nearest(samples.latents, None, view.data, 1, flip)
        distance = found.distances[:, 0]
        usual = self.usual.median()
        copied, expected = (float((d < FAR_NEARER * usual).float().mean()) for d in (distance, self.usual))
        if copied > expected + TOO_MANY and not self.told:
            self.told = True
            tell(
                f"step {view.step}: {copied:.0%} of the samples are less than half as far from a training latent as "
                f"held-out latents are ({expected:.0%} of those): the run memorises; see RUN/neighbours"
            )
        order = distance.argsort()[:10]
        mask = found.mirrored[order, 0] if flip else None
        restore = view.data.manifest.affine.restore
        real = load_representation(view.latents / "representation").decode(
            restore(view.data.gather(found.numbers[order, 0], mask))
        )
        name = f"neighbours/step-{view.step:08d}.png"
        plots.save(view.run / name, plots.grid(torch.cat([samples.images[order], real.cpu()]), len(order)))
        return {
            "neighbours": {
                "median": float(distance.median()), "held_out_median": float(usual), "copied": copied,
                "expected": expected, "picture": name,
            }
        }  # fmt: skip
