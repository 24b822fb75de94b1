"""What a visitor of `jlt app` may wish for, and the views of its making: no page here, and no state between wishes.

A wish comes from a stranger, so it is checked against limits before anything is computed. Several models answer the
same wish one after the other, from the same noise.
"""

import math
import queue
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import UInt8
from PIL import Image
from torch import Tensor

from jlt import files
from jlt.evaluation.records import Figure
from jlt.experiments import film, plots
from jlt.experiments.asking import balanced_labels
from jlt.sampling import SOLVERS, Generator, Making

EACH = "all classes in turn"
PREVIEWS = 8  # at most, in a sampling: each is decoded
STRIPS = 2  # images whose path is drawn


@dataclass(frozen=True)
class Limits:
    """The most that one wish may ask for; `evaluations` are those of the field an image."""

    images: int = 16
    steps: int = 100
    evaluations: int = 200
    scale: float = 20.0


@dataclass(frozen=True)
class Wish:
    """What to make, as the page's fields give it: numbers may be of any kind, or missing."""

    label: Any = EACH
    num_images: Any = 8
    seed: Any = 0
    solver: Any = Making.solver
    steps: Any = Making.steps
    scale: Any = 2.0
    low: Any = 0.1
    high: Any = 1.0
    weights: Any = "ema"


@dataclass(frozen=True)
class View:
    """A sampling under way: the predicted x so far (the images, once `done`), and then the strip of the path."""

    share: float
    images: UInt8[Tensor, "n c h w"]
    strip: Image.Image | None = None


def solvers(limits: Limits) -> list[str]:
    """Return the solvers whose number of evaluations is known beforehand."""
    return [name for name, row in SOLVERS.items() if (row.evaluations(1) or math.inf) <= limits.evaluations]


def labels(generator: Generator) -> list[str]:
    """Return what a wish may name as its label."""
    count = generator.model.config.num_classes
    return [EACH, *(generator.class_names or map(str, range(count)))] if count else [EACH]


def whole(name: str, value: Any, least: int, most: int) -> int:
    """Return a whole number in [least, most]; anything else is a ValueError."""
    if isinstance(value, bool) or not isinstance(value, int | float) or value != value // 1:
        raise ValueError(f"{name} must be a whole number, got {value!r:.40}")
    if not least <= value <= most:
        raise ValueError(f"{name} must be in [{least}, {most}], got {value:g}")
    return int(value)


def real(name: str, value: Any, least: float, most: float) -> float:
    """Return a number in [least, most]; anything else is a ValueError."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not least <= value <= most:
        raise ValueError(f"{name} must be in [{least:g}, {most:g}], got {value!r:.40}")
    return float(value)


def checked(wish: Wish, generator: Generator, limits: Limits) -> tuple[Tensor, dict[str, Any]]:
    """Return the labels and the arguments of `Generator.sample` for a wish; one beyond the limits is a ValueError."""
    count = generator.model.config.num_classes
    num_images = whole("the number of images", wish.num_images, 1, limits.images)
    steps = whole("steps", wish.steps, 1, limits.steps)
    solver = SOLVERS[files.choose("solver", str(wish.solver), dict.fromkeys(solvers(limits), str(wish.solver)))]
    if (evaluations := solver.evaluations(steps) or 0) > limits.evaluations:
        raise ValueError(
            f"{wish.solver} evaluates {evaluations} times in {steps} steps, the most is {limits.evaluations}"
        )
    if str(wish.label) == EACH:
        label = balanced_labels(num_images, count)
    else:
        label = torch.full((num_images,), generator.label(str(wish.label)))
    how = {
        "seed": whole("the seed", wish.seed, 0, 2**32 - 1),
        "solver": str(wish.solver),
        "steps": steps,
        "scale": real("the guidance scale", wish.scale, 0, limits.scale) if count else 1.0,
        "interval": (
            real("the interval's lower end", wish.low, 0, 1),
            real("the interval's upper end", wish.high, 0, 1),
        ),
    }
    return label, how


def watch(generator: Generator, wish: Wish, limits: Limits) -> Iterator[View]:
    """Make what is wished for and yield views of it, the last with the images; closing the iterator ends the work."""
    label, how = checked(wish, generator, limits)
    views: queue.Queue[View | BaseException] = queue.Queue()
    stop, seen, steps = threading.Event(), list[tuple[float, Tensor, Tensor]](), how["steps"]
    every = math.ceil(steps / PREVIEWS)

    def decode(z: Tensor) -> Tensor:
        return generator.representation.decode(generator.affine.restore(z)).cpu()

    def look(i: int, t: float, z: Tensor, x: Tensor) -> None:
        if stop.is_set():
            raise InterruptedError
        if i % every == 0:
            seen.append((t, z[:STRIPS], x[:STRIPS]))
            views.put(View(i / steps, decode(x)))

    def work() -> None:
        try:
            images = generator.sample(label, **how, callback=look, progress=False).images
            times, noisy, clean = zip(*seen, strict=True)
            last = images[:STRIPS]
            path = film.Film(
                (*times, 1.0),
                torch.stack([*map(decode, noisy), last]),
                torch.stack([*map(decode, clean), last]),
            )
            views.put(View(1.0, images, film.strip(path, PREVIEWS + 1)))
        except BaseException as error:  # whatever it is, the visitor's own thread raises it
            views.put(error)

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    try:
        while True:
            view = views.get()
            if isinstance(view, BaseException):
                raise view
            yield view
            if view.share == 1:
                return
    finally:
        stop.set()


def watch_all(
    open_model: Callable[[str, str], Generator], runs: Sequence[str], wish: Wish, limits: Limits
) -> Iterator[dict[str, View]]:
    """Answer one wish with each run in turn; yield the views of all so far. `open_model(run, weights)` opens one."""
    views: dict[str, View] = {}
    generators = [open_model(run, str(wish.weights)) for run in runs]
    for generator in generators:
        checked(wish, generator, limits)
    for run, generator in zip(runs, generators, strict=True):
        for view in watch(generator, wish, limits):
            views = {**views, run: view}
            yield views


def check_alike(generators: Mapping[str, Generator]) -> None:
    """Raise a ValueError for runs that cannot answer the same wish from the same noise."""
    (first, own), *others = generators.items()
    for name, other in others:
        for what in ("shape", "num_classes"):
            here, there = getattr(own.model.config, what), getattr(other.model.config, what)
            if here != there:
                raise ValueError(f"{name} has {what} {there}, {first} has {here}: they answer no wish together")


def sheet(view: View) -> Image.Image:
    """Return a view's images as one picture, as near to a square as they go."""
    return plots.grid(view.images, math.ceil(len(view.images) ** 0.5))


def drawings(figures: Mapping[str, Figure]) -> str:
    """Return figures as HTML, each with its caption."""
    return "".join(
        f"<figure>{plots.svg(figure)}<figcaption>{figure.caption}</figcaption></figure>" for figure in figures.values()
    )
