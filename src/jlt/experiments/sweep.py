"""The sweep: which guidance, average and solver are best for a run, on few images; then the best at full count.

    jlt sweep RUN LATENTS --scale 1 2 3 --interval 0 1 0.1 1

A point is one combination of values. Each is sampled from the same noise and measured against the same reference, and
its record is written as it is done, so the same command goes on where it was stopped, and values added to it later cost
their points only. The best is then sampled with other seeds, so that its score is not the luck by which it was chosen.

    OUT/sweep.json          what all points share
    OUT/reference.npz       of the held-out images (jlt.evaluation.references), where no other reference is given
    OUT/points/NAME.json    a record; OUT/points/NAME/ its images, which are removed once they are measured
    OUT/best-NAME-COUNT/    the evaluation of the best at full count (jlt.experiments.benchmark)
    OUT/record.json, OUT/heat-map.png

Processes take points in turn, and so may the tasks of an array of jobs, by `share`; none waits for another before the
last point, and the records are those of one process alone.
"""

import dataclasses
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from jlt import files
from jlt.data import open_latents, real_images
from jlt.data.hub import find_checkpoint
from jlt.evaluation import records
from jlt.evaluation.features import Extractor, open_extractor
from jlt.evaluation.protocol import Reference, compare
from jlt.evaluation.records import Record
from jlt.experiments import placement, plots
from jlt.experiments.asking import Sampling, balanced_labels, by_seed
from jlt.experiments.benchmark import observe, of_run, of_source, open_reference, score, write_reference
from jlt.experiments.evaluate import check_fit
from jlt.experiments.report import direction
from jlt.nn import checkpoint
from jlt.processes import Processes, joined, open_device
from jlt.sampling import Making, load

SHARED = ("num_images", "seed", "guide", "batch_size")  # of Sampling; a sweep varies the others
METRICS = ("FD", "KD", "FID", "KID", "sFD", "sFID", "IS", "precision", "recall", "density", "coverage")


@dataclass(frozen=True)
class Factors:
    """The values of each setting; all combinations are measured.

    Attributes:
        scale: guidance scales, 1 is none.
        interval: pairs low high: guidance applies where low < t < high.
        weights: averages, by "ema" (the first), "model", or a decay; by default all averages of the checkpoint.
        solver: solvers, as in jlt sample.
        steps: steps of the time grid.
        grid: time grids: uniform, shifted=3, logit=3, karras=7.
        guidance: rules: cfg, cfg-zero, apg or auto, with options such as apg:eta=0.5.
    """

    scale: tuple[float, ...] = (1.0, 1.5, 2.0, 2.5, 3.0, 4.0)
    interval: tuple[tuple[float, float], ...] = ((0.0, 1.0), (0.1, 1.0), (0.3, 1.0))
    weights: tuple[str, ...] = ()
    solver: tuple[str, ...] = (Making.solver,)
    steps: tuple[int, ...] = (Making.steps,)
    grid: tuple[str, ...] = (Making.grid,)
    guidance: tuple[str, ...] = (Making.guidance,)

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            values = getattr(self, field.name)
            if len(set(values)) < len(values) or (not values and field.name != "weights"):
                raise ValueError(f"{field.name} needs one value or several that differ, got {list(values)}")


Point = dict[str, Any]  # a value of each factor


def points(factors: Factors) -> list[Point]:
    """Return all combinations, the last factor changing fastest."""
    names = [field.name for field in dataclasses.fields(factors)]
    return [dict(zip(names, values, strict=True)) for values in itertools.product(*vars(factors).values())]


def settled(point: Point, factors: Factors) -> Point:
    """Return the point that gives the same images: at scale 1 neither interval nor rule matters."""
    if point["scale"] != 1:
        return point
    return {**point, "interval": factors.interval[0], "guidance": Making.guidance}


def name_of(point: Point) -> str:
    """Return a point's name, which is that of its file."""
    low, high = point["interval"]
    guided = f"-interval-{low:g}-{high:g}-{point['guidance']}" if point["scale"] != 1 else ""
    return f"{point['weights']}-{point['solver']}-{point['steps']}-{point['grid']}-scale-{point['scale']:g}{guided}"


def sweep(
    run: Path,
    out: Path,
    factors: Factors,
    sampling: Sampling,
    *,
    latents: Path | None = None,
    reference: Path | None = None,
    extractor: str = "efficientnet-lite0",
    by: str = "FD",
    full: int = 5000,
    final_seeds: Sequence[int] = (0,),
    share: str | None = None,
    device: str = "cpu",
) -> Path | None:
    """Measure all points, then the best of them at full count; return the record's path on the first process.

    Args:
        run: a run or checkpoint folder, or ORG/NAME of the Hub.
        out: folder for all that the sweep writes.
        factors: the values of each setting.
        sampling: number of images of a point, seed, guide and batch size; a sweep varies the others.
        latents: what the run was trained on: its held-out images are the reference, if no other is given.
        reference: statistics of real images, .npz.
        extractor: a spec of `features.open_extractor`.
        by: the metric that decides.
        full: images of the best.
        final_seeds: seeds of the best, of which none is that of the points.
        share: "K/N": measure every N-th point from the K-th on, and leave the best to a later call.
        device: where networks run.
    """
    files.choose("metric", by, dict.fromkeys(METRICS))
    if sampling.seed in final_seeds or not final_seeds:
        raise ValueError(
            f"the final seeds must be others than the points' seed {sampling.seed}, got {list(final_seeds)}"
        )
    if sampling.guide is not None and not any(rule.startswith("auto") for rule in factors.guidance):
        raise ValueError(f"guidance auto takes the guide {sampling.guide}, {', '.join(factors.guidance)} none")
    run = find_checkpoint(run)
    opened = checkpoint.read(run)
    factors = dataclasses.replace(factors, weights=tuple(opened.resolve(name) for name in averages(opened, factors)))
    todo = {name_of(point): point for point in (settled(point, factors) for point in points(factors))}
    here = placement.share(list(todo.items()), share or "1/1")
    by_seed(dataclasses.replace(sampling, num_images=full), final_seeds, out)  # the last step, refused before the first
    with joined() as processes:
        where, network = open_device(device), open_extractor(extractor)

        def begin() -> Path:
            check_points(run, list(todo.values()), sampling, where)
            if latents is not None:
                check_fit(opened.header, open_latents(latents))
            against, held_out = reference or out / "reference.npz", None if reference else latents
            shared = {name: getattr(sampling, name) for name in SHARED} | {
                "guide": None if sampling.guide is None else str(sampling.guide),
                "checkpoint": files.fingerprint(opened.header["files"]),
                "extractor": network.fingerprint,
                "reference": open_latents(held_out, "held-out").manifest.images if held_out else files.sha256(against),
            }
            files.claim(out, "sweep.json", shared, "points", free=("batch_size",))
            if held_out and not against.is_file():
                images = of_source(real_images(held_out, "held-out"), sampling.batch_size)
                write_reference(images, against, network, where, Processes())
            return against

        processes.first(begin)
        against = reference or out / "reference.npz"
        real = open_reference(against, network, sampling.batch_size, where)
        mine = here[processes.rank :: processes.count]
        for name, point in tqdm(mine, desc="points", unit="point", disable=processes.rank > 0 or None):
            measure_point(run, out / "points" / name, as_sampling(point, sampling), point, real, network, where, by)
        processes.wait()
        if missing := [name for name in todo if not (out / "points" / f"{name}.json").is_file()]:
            assert share is not None, f"{missing[0]} was not measured"
        if share is not None:
            return None
        found = {name: records.read(out / "points" / f"{name}.json") for name in todo}
        best = best_of(found, by)
        final = dataclasses.replace(as_sampling(todo[best], sampling), num_images=full)
        last = out / f"best-{best}-{full}"
        score(run, against, last, final, final_seeds, network, where, processes, latents)
        return processes.first(lambda: finish(out, last, factors, found, best, by, sampling))


def check_points(run: Path, todo: Sequence[Point], sampling: Sampling, device: torch.device) -> None:
    """Raise a ValueError for points that cannot be sampled; nothing is computed."""
    guide = None if sampling.guide is None else load(sampling.guide, device=device)
    asked = [as_sampling(point, sampling) for point in todo]
    generator = load(run, asked[0].weights, device)
    classes = generator.model.config.num_classes
    for each in asked:
        how = dataclasses.replace(each, guide=None).making(classes)
        labels = balanced_labels(each.num_images, classes)
        generator.check(labels, dataclasses.replace(how, guide=guide if each.guide else None))


def averages(opened: checkpoint.Checkpoint, factors: Factors) -> Sequence[str]:
    """Return the weights asked for, by default all averages."""
    return factors.weights or [f"{decay:g}" for decay in opened.decays] or ["model"]


def as_sampling(point: Point, sampling: Sampling) -> Sampling:
    """Return how a point is sampled."""
    weights = str(point["weights"]).removeprefix("ema-").replace("power-", "power=")
    guide = sampling.guide if str(point["guidance"]).startswith("auto") else None
    return dataclasses.replace(sampling, **{**point, "weights": weights, "guide": guide})


def measure_point(
    run: Path,
    folder: Path,
    sampling: Sampling,
    point: Point,
    real: Reference,
    extractor: Extractor,
    device: torch.device,
    by: str,
) -> None:
    """Sample and measure one point, unless its record is there; then its images are removed."""
    path = folder.with_name(f"{folder.name}.json")
    if not path.is_file():
        alone = Processes()  # the others have points of their own
        subject = of_run(run, folder, sampling, device, alone)
        values = compare(observe(subject, extractor, device, alone), real, extractor) | subject.finish()
        if not any(is_metric(name, by) for name in values):
            raise ValueError(f"{by} is not measured with this reference and {extractor.name}; {', '.join(values)} are")
        records.write(Record("point", folder.name, values, {**subject.settings}, subject.fingerprints), path)
    files.remove(folder)


def is_metric(name: str, by: str) -> bool:
    """Say whether a value's name is that metric's, on whatever features."""
    return name == by or (name.startswith(f"{by} (") and name.endswith(")"))


def metric_of(record: Record, by: str) -> float:
    """Return the metric of a point."""
    return next(float(value.value) for name, value in record.values.items() if is_metric(name, by))


def best_of(found: dict[str, Record], by: str) -> str:
    """Return the name of the best point; of equal ones the first."""
    sign = 1 if direction(by) == "lower" else -1
    return min(found, key=lambda name: sign * metric_of(found[name], by))


def finish(
    out: Path, last: Path, factors: Factors, found: dict[str, Record], best: str, by: str, sampling: Sampling
) -> Path:
    """Write the heat map and the record; the score at full count lies in the folder `last`."""
    final = records.read(last / "record.json")
    metric = next(name for name in found[best].values if is_metric(name, by))
    lower = direction(by) == "lower"
    rows, columns, table = heat(factors, found, by)
    title = f"{metric} of {sampling.num_images} images"
    heads = [(name, axis(factors, name)) for name in (rows, columns)]
    files.write_bytes(out / "heat-map.png", plots.heat_map(table, heads[0], heads[1], title, lower))
    others = [name for name, values in vars(factors).items() if name not in (rows, columns) and len(values) > 1]
    caption = f"{title} by {rows} and {columns}" + (f", each the best over {' and '.join(others)}" if others else "")
    ranked = sorted(found.values(), key=lambda record: metric_of(record, by), reverse=not lower)
    table_of_points = f"All points, {sampling.num_images} images each, the best first"
    first, *beside = final.parts
    here = Record("sweep", f"{final.name}: {len(found)} points", {}, {})  # this command, this commit, this moment
    record = dataclasses.replace(
        here,
        settings={
            **{f"swept {name}": axis(factors, name) for name in vars(factors)},
            "chosen by": f"{metric} of {sampling.num_images} images, seed {sampling.seed}",
            "chosen": best,
            **final.settings,
        },
        fingerprints=final.fingerprints,
        pictures={
            f"{caption}; the best is outlined": "heat-map.png",
            "The best, at full count": f"{last.name}/samples.png",
        },
        parts=(
            dataclasses.replace(first, name=best),
            *beside,
            Record("points", table_of_points, {}, {}, parts=tuple(ranked)),
        ),
    )
    records.write(record, out / "record.json")
    return out / "record.json"


def heat(factors: Factors, found: dict[str, Record], by: str) -> tuple[str, str, list[list[float]]]:
    """Return the two factors with the most values, and the best metric for each pair of their values."""
    names = [field.name for field in dataclasses.fields(factors)]
    most = sorted(names, key=lambda name: -len(getattr(factors, name)))[:2]  # of equal ones the first
    columns, rows = most
    better = min if direction(by) == "lower" else max
    cells: dict[tuple[Any, Any], list[float]] = {}
    for point in points(factors):
        value = metric_of(found[name_of(settled(point, factors))], by)
        cells.setdefault((point[rows], point[columns]), []).append(value)
    return rows, columns, [
        [better(cells[row, column]) for column in getattr(factors, columns)] for row in getattr(factors, rows)
    ]  # fmt: skip


def axis(factors: Factors, name: str) -> list[str]:
    """Return a factor's values as text."""
    values = getattr(factors, name)
    return [f"{v[0]:g} to {v[1]:g}" if isinstance(v, tuple) else v if isinstance(v, str) else f"{v:g}" for v in values]
