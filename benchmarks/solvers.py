"""Which solver needs the fewest evaluations: end points against a fine solution, then Frechet distances.

    python benchmarks/solvers.py OUT          # hours; the same command goes on where it stopped
    python benchmarks/solvers.py OUT --data mnist    # one half, the other beside it in a process of its own
    python benchmarks/solvers.py OUT --plot   # OUT/table.md, distances.png and fd.png, from what there is

Four small models (3 blocks of width 96, else the `digits` preset) are trained: Fashion-MNIST and MNIST, predicting x
and v, both in patch-PCA latents of 64 x 4 x 4. Nothing is guided, but for one screening that says so. For each model:

    screen   every solver that draws no noise, grid and floor at BUDGETS: the mean L2 distance of the end points of 256
             images from those that fine solutions (rk4, 799 evaluations) reach from the same noise
    fd       the four solvers that come nearest, with their best grid, the package's default, Euler and Heun in even
             steps, and for x both of these without the floor: FD of 5,000 images and as many real ones, 3 seeds, on the
             features of a small convolutional classifier of the same data (not FID, and comparable within one set of
             data alone). With 99 evaluations the nearest of the four stands for all of them: they solve the same
             equation by then.

A model of x has two flows: with the floor, and without, where the velocity (x - z) / (1 - t) draws z to what the model
takes for clean, the more the nearer to t = 1, so that the end depends on how near the last step begins. So there are
two fine solutions, `value` and `unfloored` are the distances from them, and two solvers are chosen by each.

A solver gets as many steps as its evaluations allow. The floor acts on solvers that read v from a model of x alone, so
only these have rows for both. Real images of Fashion-MNIST are 5,000 held-out ones; MNIST has 5,000 in all, and the
reference is all of them.

OUT/DATA/rows.jsonl       a line a measurement: what was measured, its value, seconds, commit
OUT/DATA/latents, OUT/DATA/TARGET (jlt.training.loop), OUT/DATA/classifier.safetensors, OUT/environment.json
"""

import argparse
import dataclasses
import itertools
import json
import math
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from jlt import files
from jlt.data import encode, real_images
from jlt.evaluation import records
from jlt.evaluation.distances import frechet_distance
from jlt.evaluation.moments import Moments
from jlt.evaluation.protocol import extract
from jlt.evaluation.records import Figure
from jlt.experiments import plots
from jlt.experiments.asking import balanced_labels
from jlt.experiments.evaluate import stack_images
from jlt.experiments.presets import DIGITS
from jlt.sampling import SOLVERS, Generator, Making, load
from jlt.training import train

FLOOR, BATCH = 0.05, 125
GRIDS = ("uniform", "shifted=0.5", "shifted=2", "logit=3", "logit=5", "karras=7")
CHOOSING, BUDGETS = (10, 25), (5, 50)  # evaluations: the four are chosen at the first, the others come later
SCALE = 2.5  # of the guided screening, where 0.1 < t < 1
Row = dict[str, Any]
Lines = dict[str, tuple[list[float], list[float]]]


@dataclasses.dataclass(frozen=True)
class Data:
    """Images, how many are held out, the splits that images are compared with, and what the recipe changes."""

    source: str
    num_held_out: int
    reference: tuple[str, ...]
    changes: dict[str, Any]


DATA = {
    "fashion-mnist": Data(
        "idx:/usr/share/datasets/fashion-mnist", 5000, ("held-out",),
        {"steps": 8000, "decay_steps": 5000, "ema_decays": (0.99,), "held_out_every": 2000, "save_every": 1000},
    ),
    "mnist": Data("mnist", 500, ("train", "held-out"), {"steps": 4000, "decay_steps": 2500, "held_out_every": 1000}),
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Way:
    """A way to make images: solver, grid, and the floor of the velocity."""

    solver: str
    grid: str = "uniform"
    floor: float = FLOOR

    def steps(self, evaluations: int) -> int:
        """Return the most steps that take no more evaluations."""
        row = SOLVERS[self.solver]
        return (evaluations + row.saved) // row.per_step

    @property
    def name(self) -> str:
        return f"{self.solver}, {self.grid}" + ("" if self.floor else ", no floor")


BASELINES = (Way("heun"), Way("euler"))
DEFAULT = Way(Making.solver, Making.grid)


def ways(target: str) -> list[Way]:
    """Return all that are screened."""
    solvers = [name for name, row in SOLVERS.items() if row.per_step and not row.stochastic]
    return [
        Way(solver, grid, floor)
        for solver, grid in itertools.product(solvers, GRIDS)
        for floor in ((FLOOR, 0.0) if target == "x" and SOLVERS[solver].reads == "v" else (FLOOR,))
    ]


class Study:
    """The rows measured so far; `measure` adds one unless it is there."""

    def __init__(self, out: Path, name: str) -> None:
        self.out, self.path = out, out / name / "rows.jsonl"
        lines = self.path.read_text().splitlines() if self.path.is_file() else []
        self.rows: list[Row] = [json.loads(line) for line in lines]
        self.commit = records.current_commit()

    def find(self, **key: Any) -> list[Row]:
        """Return the rows that agree with a key."""
        return [row for row in self.rows if all(row.get(name) == value for name, value in key.items())]

    def measure(self, values: Callable[[], Row], **key: Any) -> None:
        """Add the row of a key; `values` works it out."""
        if self.find(**key):
            return
        began = time.perf_counter()
        row = key | values() | {"seconds": round(time.perf_counter() - began, 1)}
        self.rows.append(row | {"commit": self.commit})
        files.write_bytes(self.path, "".join(json.dumps(row) + "\n" for row in self.rows).encode())
        print(time.strftime("%H:%M:%S"), json.dumps(row), flush=True)


class Classifier(nn.Module):
    """Three convolutions and a linear layer; its features are the 128 numbers before that. An `Extractor`."""

    name, dimension, fingerprint = "the data's own classifier", 128, ""

    def __init__(self) -> None:
        super().__init__()
        widths = (1, 32, 64, self.dimension)
        self.layers = nn.ModuleList(nn.Conv2d(a, b, 3, stride=2, padding=1) for a, b in itertools.pairwise(widths))
        self.head = nn.Linear(self.dimension, 10)

    def forward(self, images: Tensor) -> Tensor:
        hidden = images.float() / 127.5 - 1
        for layer in self.layers:
            hidden = F.gelu(layer(hidden))
        return hidden.mean((2, 3))


def open_classifier(study: Study, name: str) -> Classifier:
    """Return the classifier of a data set, fitted to the training images at its first use."""
    path, network = study.path.with_name("classifier.safetensors"), Classifier()
    if not path.is_file():
        torch.manual_seed(0)
        network = Classifier()
        images, labels = stack_images(real_images(study.path.parent / "latents", "train"))
        rounds = -(-2_000 * 64 // len(images))
        optimizer = torch.optim.AdamW(network.parameters(), lr=2e-3)
        order = torch.cat([torch.randperm(len(images)) for _ in range(rounds)]).split(64)
        for i, batch in enumerate(order):
            optimizer.param_groups[0]["lr"] = 2e-3 * (1 - i / len(order))
            loss = F.cross_entropy(network.head(network(images[batch])), labels[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        with files.replaced(path) as temporary:
            safetensors.torch.save_file(network.state_dict(), temporary)
    network.load_state_dict(safetensors.torch.load_file(path))
    network.requires_grad_(False)
    images, labels = stack_images(real_images(study.path.parent / "latents", "held-out"))
    study.measure(
        lambda: {"value": (network.head(network(images)).argmax(1) == labels).double().mean().item()},
        kind="classifier: share of held-out images that it names", data=name,
    )  # fmt: skip
    return network


def prepare(study: Study, name: str, target: str, steps: int | None) -> None:
    """Encode and train."""
    data, folder = DATA[name], study.path.parent
    encode(data.source, folder / "latents", representation="patch-pca", stride=8, num_held_out=data.num_held_out)
    config = dataclasses.replace(DIGITS, size="3x96x3", target=target, **data.changes)
    if steps:
        config = dataclasses.replace(config, steps=steps, decay_steps=0)
    train(config, folder / "latents", folder / target)


def reference(study: Study, name: str, classifier: Classifier) -> Moments:
    """Return the moments of the real images."""
    parts = [stack_images(real_images(study.path.parent / "latents", split))[0] for split in DATA[name].reference]
    return moments_of(torch.cat(parts), classifier)


def moments_of(images: Tensor, classifier: Classifier) -> Moments:
    return extract(images, classifier, 250, "features")[1]


def screen(study: Study, name: str, target: str, budgets: tuple[int, ...], scale: float, count: int) -> None:
    """Measure how far from the fine solution each way's end points are."""
    generator = load(study.out / name / target)
    labels = balanced_labels(count, generator.model.config.num_classes)

    def ends(way: Way, steps: int) -> Tensor:
        return generator.sample(
            labels, scale=scale, batch_size=256, progress=False,
            solver=way.solver, grid=way.grid, floor=way.floor, steps=steps,
        ).latents  # fmt: skip

    key = {"kind": "screen", "data": name, "target": target, "scale": scale, "images": count}
    missing = [
        (key | dataclasses.asdict(way) | {"budget": budget, "steps": steps}, way, steps)
        for budget, way in itertools.product(budgets, ways(target))
        if (steps := way.steps(budget)) >= 2  # some grids need two
    ]
    missing = [row for row in missing if not study.find(**row[0])]
    if not missing:
        return
    fine = {"value": ends(Way("rk4", "logit=3"), 200)}
    if target == "x":
        fine["unfloored"] = ends(Way("rk4", "logit=3", 0.0), 200)
    others = {"value": (Way("midpoint", "logit=3"), 400), "unfloored": (Way("unipc", "logit=3"), 500)}

    def distances(found: Tensor) -> Row:
        return {flow: distance(found, end) for flow, end in fine.items()}

    def checked() -> Row:
        return {flow: distance(end, ends(*others[flow])) for flow, end in fine.items()}

    study.measure(checked, **key | {"kind": "screen: error of the fine solution"})
    norm = fine["value"].flatten(1).norm(dim=1).mean().item()
    study.measure(lambda: {"value": norm}, **key | {"kind": "screen: norm of the end points"})
    if target == "x":
        study.measure(lambda: distances(fine["unfloored"]), **key | {"kind": "screen: floor"})
    for row, way, steps in missing:
        study.measure(lambda way=way, steps=steps: distances(ends(way, steps)), **row)  # type: ignore[misc]


def distance(a: Tensor, b: Tensor) -> float:
    """Return the mean L2 distance of images' latents."""
    return (a - b).flatten(1).double().norm(dim=1).mean().item()


def chosen(study: Study, name: str, target: str, count: int = 4) -> list[Way]:
    """Return the solvers that come nearest, Euler's and Heun's aside, each with its best grid and floor."""
    found: dict[str, Way] = {}
    flows = ("value", "unfloored") if target == "x" else ("value",)
    for k, flow in enumerate(flows, 1):
        for way in sorted(ways(target), key=lambda way: error(study, name, target, way, flow)):
            if way.solver not in ("euler", "heun", *found) and len(found) < count * k // len(flows):
                found[way.solver] = way
    return list(found.values())


def error(study: Study, name: str, target: str, way: Way, flow: str) -> float:
    """Return the product of a way's distances at the budgets that choose."""
    key = {"kind": "screen", "data": name, "target": target, "scale": 1.0, **dataclasses.asdict(way)}
    found = [row[flow] for budget in CHOOSING for row in study.find(**key, budget=budget)]
    return math.prod(found) if len(found) == len(CHOOSING) else math.inf


def frechet(study: Study, name: str, target: str, seed: int, classifier: Classifier, count: int) -> None:
    """Measure the chosen ways, and those that they are held against."""
    generator, real = load(study.out / name / target), reference(study, name, classifier)
    labels = balanced_labels(count, generator.model.config.num_classes)
    best = chosen(study, name, target)
    asked = [(way, budget) for budget in (25, 10) for way in dict.fromkeys((*BASELINES, *best, DEFAULT))]
    asked[len(asked) // 2 : len(asked) // 2] = [(way, 99) for way in (*BASELINES, best[0])]
    if target == "x":
        asked += [(dataclasses.replace(way, floor=0.0), budget) for budget in (25, 10) for way in BASELINES]
    for way, budget in asked:
        key = {"kind": "fd", "data": name, "target": target, "scale": 1.0, "images": count, "seed": seed}
        key |= dataclasses.asdict(way) | {"budget": budget, "steps": way.steps(budget)}
        study.measure(lambda key=key: {"value": fd(generator, labels, key, real, classifier)}, **key)  # type: ignore[misc]
    if DATA[name].reference == ("held-out",):  # else no real images are left to compare with
        images, _ = stack_images(real_images(study.out / name / "latents", "train"))
        drawn = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))[:count]
        study.measure(
            lambda: {"value": frechet_distance(moments_of(images[drawn], classifier), real)},
            kind="real against real", data=name, images=count, seed=seed,
        )  # fmt: skip


def fd(generator: Generator, labels: Tensor, key: Row, real: Moments, classifier: Classifier) -> float:
    """Make images and measure their distance from the real ones."""
    how = {name: key[name] for name in ("solver", "grid", "steps", "floor", "seed")}
    made = generator.sample(labels, batch_size=BATCH, progress=False, **how)
    return frechet_distance(moments_of(made.images, classifier), real)


def run(out: Path, options: argparse.Namespace) -> None:
    """Measure all that is missing, what matters most first."""
    files.write_json(
        out / "environment.json", {"hardware": records.describe_hardware(), "packages": records.package_versions()}
    )
    studies = {name: Study(out, name) for name in options.data}
    models = [(study, name, target) for name, study in studies.items() for target in ("x", "v")]
    classifiers = {}
    for study, name, target in models:
        prepare(study, name, target, options.steps)
        classifiers[name] = open_classifier(study, name)
        screen(study, name, target, CHOOSING, 1.0, options.screened)
    for seed in range(options.seeds):
        for study, name, target in models:
            frechet(study, name, target, seed, classifiers[name], options.images)
    for study, name, target in models:
        screen(study, name, target, BUDGETS, 1.0, options.screened)
    for study, name, target in models:
        screen(study, name, target, CHOOSING, SCALE, options.screened)


def report(out: Path) -> None:
    """Write the tables and the picture."""
    studies, text = {name: Study(out, name) for name in DATA}, []
    for name, target in itertools.product(DATA, ("x", "v")):
        study = studies[name]
        if study.find(kind="fd", data=name, target=target):
            text += [f"{name}, target {target}, FD (features of its classifier), 5,000 images, unguided:", ""]
            text += [*fd_table(study, name, target), ""]
    for name, target, scale in itertools.product(DATA, ("x", "v"), (1.0, SCALE)):
        study = studies[name]
        if study.find(kind="screen", data=name, target=target, scale=scale):
            one = {"data": name, "target": target, "scale": scale}
            norm, checked = (
                study.find(kind=f"screen: {kind}", **one)[0]
                for kind in ("norm of the end points", "error of the fine solution")
            )
            guidance = "unguided" if scale == 1 else f"guidance {scale}"
            for flow, said in (("value", "floor 0.05" if target == "x" else ""), ("unfloored", "no floor")):
                if flow in checked:
                    text += [
                        f"{name}, target {target}, {guidance}, distance from the model's own flow, {said} (the end "
                    ]
                    text += [
                        f"points' norm is {norm['value']:.1f}; two fine solutions differ by {checked[flow]:.2g}):",
                        "",
                    ]
                    text += [*screen_table(study, name, target, scale, flow), ""]
    files.write_bytes(out / "table.md", "\n".join(text).encode())
    distances = {
        f"{name}, {target}{', no floor' if flow == 'unfloored' else ''}: distance": screen_lines(
            studies[name], name, target, flow
        )
        for name, (target, flow) in itertools.product(DATA, (("x", "value"), ("x", "unfloored"), ("v", "value")))
    }
    draw(out / "distances.png", distances, columns=3)
    draw(
        out / "fd.png",
        {f"{name}, {target}: FD": fd_lines(studies[name], name, target) for name in DATA for target in ("x", "v")},
        columns=2,
    )
    print(out / "table.md", out / "distances.png", out / "fd.png")


def draw(path: Path, panels: Mapping[str, Lines], columns: int) -> None:
    """Write a picture with a panel for each set of lines over evaluations, those without any left out."""
    figures = [Figure("", "evaluations", said, lines, "log", "log") for said, lines in panels.items() if lines]
    plots.save(path, plots.panels(figures, columns))


def fd_lines(study: Study, name: str, target: str) -> Lines:
    """Return FD over evaluations, the mean over the seeds measured, of all ways with the floor."""
    rows = study.find(kind="fd", data=name, target=target, floor=FLOOR)
    lines = {}
    for way in dict.fromkeys(Way(row["solver"], row["grid"], row["floor"]) for row in rows):
        mine = [row for row in rows if is_of(row, way)]
        budgets = sorted({row["budget"] for row in mine})
        means = [statistics.mean(row["value"] for row in mine if row["budget"] == budget) for budget in budgets]
        lines[way.name] = [float(budget) for budget in budgets], means
    return lines


def fd_table(study: Study, name: str, target: str) -> list[str]:
    """Return FD by way and evaluations: mean and standard deviation over the seeds measured."""
    rows = study.find(kind="fd", data=name, target=target)
    found = dict.fromkeys(Way(row["solver"], row["grid"], row["floor"]) for row in rows)
    lines = ["| | 10 evaluations | 25 | 99 |", "|---|---|---|---|"]
    for way in found:
        cells = []
        for budget in (10, 25, 99):
            matching = study.find(kind="fd", data=name, target=target, budget=budget, **dataclasses.asdict(way))
            cells.append(mean_and_spread([row["value"] for row in matching]))
        lines.append(f"| {way.name} | {' | '.join(cells)} |")
    if real := study.find(kind="real against real", data=name):
        value = mean_and_spread([row["value"] for row in real])
        lines.append(f"| real against real | {value} | {value} | {value} |")
    return lines


def mean_and_spread(values: list[float]) -> str:
    if len(values) < 2:
        return f"{values[0]:.2f} (1 seed)" if values else ""
    seeds = "" if len(values) == 3 else f" ({len(values)} seeds)"
    return f"{statistics.mean(values):.2f} ± {statistics.stdev(values):.2f}{seeds}"


def screen_table(study: Study, name: str, target: str, scale: float, flow: str) -> list[str]:
    """Return the distance of each solver, with its best grid and floor at each budget."""
    rows = study.find(kind="screen", data=name, target=target, scale=scale)
    budgets = sorted({row["budget"] for row in rows})
    lines = [f"| | {' | '.join(map(str, budgets))} |", "|---|" + "---|" * len(budgets)]
    for solver in dict.fromkeys(row["solver"] for row in rows):
        cells = []
        for budget in budgets:
            matching = [row for row in rows if row["solver"] == solver and row["budget"] == budget]
            best = min(matching, key=lambda row: row[flow], default=None)
            grid = "" if best is None else best["grid"] + ("" if best["floor"] else ", no floor")
            cells.append("" if best is None else f"{best[flow]:.3f} ({grid})")
        lines.append(f"| {solver} | {' | '.join(cells)} |")
    for way in BASELINES:
        cells = [
            "".join(f"{row[flow]:.3f}" for row in rows if row["budget"] == budget and is_of(row, way))
            for budget in budgets
        ]
        lines.append(f"| {way.name}, floor {way.floor} | {' | '.join(cells)} |")
    return lines


def is_of(row: Row, way: Way) -> bool:
    return all(row[name] == value for name, value in dataclasses.asdict(way).items())


def screen_lines(study: Study, name: str, target: str, flow: str) -> Lines:
    """Return distance over evaluations of the chosen solvers, and of Heun and Euler in even steps."""
    lines = {}
    rows = study.find(kind="screen", data=name, target=target, scale=1.0)
    for way in (*BASELINES, *chosen(study, name, target)) if rows else ():
        mine = sorted((row for row in rows if is_of(row, way)), key=lambda row: row["budget"])
        evaluations = [float(SOLVERS[way.solver].evaluations(row["steps"]) or 0) for row in mine]
        lines[way.name] = evaluations, [float(row[flow]) for row in mine]
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--plot", action="store_true", help="write tables and picture from what there is")
    parser.add_argument("--data", nargs="+", choices=DATA, default=list(DATA))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--images", type=int, default=5000, help="of a Frechet distance")
    parser.add_argument("--screened", type=int, default=256, help="images of the screening")
    parser.add_argument("--steps", type=int, help="train this short, to try the program")
    options = parser.parse_args()
    if options.plot:
        report(options.out)
    else:
        run(options.out, options)


if __name__ == "__main__":
    main()
