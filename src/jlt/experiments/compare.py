"""The matched comparison: runs that differ in declared settings and in nothing else.

Each run is trained (or resumed), sampled and measured in the same way: data order, noise, times, initial weights where
the architecture is the same, averages, solver, guidance, and noise of image i. What a variant does not declare is the
base's, by construction; runs that were begun with other settings are refused with the list. Latents may differ, too,
where they are declared: then they must be of the same images.

    OUT/run-<name>.json             the record of one run, written when it is measured: it is never made again
    OUT/samples-<name>.png          its images
    OUT/runs/<name>/                the run (jlt.training.loop), with samples/ (jlt.sampling.storage)
    OUT/runs/comparison.json        what is compared
    OUT/tuned/<name>/               the sweep over guidance scales of one run (jlt.experiments.sweep), if asked for
    OUT/record.json, OUT/real.png   the outcome, once all runs are there

With several seeds a column of the outcome is the mean and standard deviation over them, and a section gives the paired
differences, seed by seed, from the first column, with 95 % intervals (Student's t). The guidance of all runs is the
same; what each gives at a scale tuned for itself is a table of its own.
"""

import dataclasses
import functools
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from jlt import files
from jlt.data import load_representation, open_latents
from jlt.evaluation import records
from jlt.evaluation.features import open_extractor
from jlt.evaluation.records import Figure, Record, Value
from jlt.experiments import placement
from jlt.experiments.asking import Sampling, balanced_labels
from jlt.experiments.evaluate import Judge, json_ready, measure, prepare_judge, save_grid
from jlt.experiments.geometry import measure_geometry
from jlt.experiments.sweep import Factors, sweep
from jlt.extras import needed
from jlt.flow import TARGETS
from jlt.nn import Transformer, checkpoint
from jlt.sampling import Generator, load
from jlt.training import TrainConfig, read_metrics, train
from jlt.training.held_out import BINS
from jlt.training.loop import describe, refuse_changes
from jlt.training.measured import settle
from jlt.training.metrics import tell

LATENTS = "latents"  # the one factor that is no setting of the training


@dataclasses.dataclass(frozen=True)
class Comparison:
    """What is compared: the arguments of `compare` that every run needs."""

    latents: Path
    out: Path
    base: TrainConfig
    variants: tuple[Mapping[str, Any], ...]
    sampling: Sampling
    extractor: str
    tune: tuple[float, ...] = ()
    tune_images: int = 1000
    reasons: tuple[str, ...] = ()

    @property
    def factors(self) -> list[str]:
        """The names of the settings in which runs differ."""
        return sorted({name for variant in self.variants for name in variant})

    def config(self, variant: Mapping[str, Any]) -> TrainConfig:
        """Return the recipe of one run."""
        return dataclasses.replace(self.base, **{k: v for k, v in variant.items() if k != LATENTS})

    def data(self, variant: Mapping[str, Any]) -> Path:
        """Return the latents of one run."""
        return Path(variant.get(LATENTS, self.latents))

    def settings(self, variant: Mapping[str, Any]) -> dict[str, Any]:
        """Return the declared settings of one run, those that it leaves to the base included."""
        whole = {LATENTS: self.data(variant).name, **dataclasses.asdict(self.config(variant))}
        return {name: whole[name] for name in self.factors}

    def name(self, variant: Mapping[str, Any]) -> str:
        """Return a run's name: its declared settings."""
        values = self.settings(variant)
        return "-".join(str(value) for value in values.values())


def compare(
    latents: Path,
    out: Path,
    base: TrainConfig,
    variants: Sequence[Mapping[str, Any]],
    sampling: Sampling,
    *,
    extractor: str = "efficientnet-lite0",
    kind: str = "compare",
    title: str = "Matched comparison",
    tune: Sequence[float] = (),
    tune_images: int = 1000,
    devices: Sequence[str] = ("cpu",),
    share: str = "1/1",
) -> Path:
    """Train, sample and measure a run for each variant of the base; return the record's path.

    The record is there once all runs are: after a share of them others may still be missing.

    Args:
        latents: folder made by `jlt encode` with a held-out split.
        out: folder for runs, pictures and record; what is finished there is not done again.
        base: the settings that runs share.
        variants: for each run, the settings in which it differs from the base; `latents` is a folder of others. A
            target auto is settled before the runs begin, and equal runs are made once.
        sampling: how each run is sampled.
        extractor: a key of EXTRACTORS.
        kind: kind of the record.
        title: name of the record.
        tune: guidance scales, of which each run's best is found on other noise, for a table of its own.
        tune_images: images a scale.
        devices: where runs are made, one at a time on each.
        share: "K/N" makes every N-th run only, from the K-th.
    """
    comparison = Comparison(latents, out, base, tuple(variants), sampling, extractor, tuple(tune), tune_images)
    check(comparison)
    comparison = settled(comparison)
    check_runs(comparison)
    variants = comparison.variants
    mine = placement.share(variants, share)
    placement.check(devices)
    for reason in comparison.reasons:
        tell(reason)
    described: dict[str, Any] = {"factors": comparison.factors, "runs": [comparison.settings(v) for v in variants]}
    described |= {"base": dataclasses.asdict(base), "sampling": dataclasses.asdict(sampling), "extractor": extractor}
    described |= {"tune": comparison.tune, "tune_images": tune_images}
    described |= {"auto": comparison.reasons} if comparison.reasons else {}
    files.claim(out / "runs", "comparison.json", described, "a comparison")
    missing = [v for v in mine if not record_path(comparison, v).is_file()]
    placement.spread(functools.partial(make_run, comparison), missing, devices, out / "runs")
    if all(record_path(comparison, variant).is_file() for variant in variants):
        conclude(comparison, kind, title, devices[0])
    return out / "record.json"


def settled(comparison: Comparison) -> Comparison:
    """Return the comparison with target auto settled, and why; a run that another already is, is left out."""
    choose = functools.cache(lambda config, folder: settle(config, open_latents(folder)))
    named = [variant for variant in comparison.variants if comparison.config(variant).target != "auto"]
    found, reasons = list[Mapping[str, Any]](), dict[str, None]()
    for variant in comparison.variants:
        if variant not in named:
            config = dataclasses.replace(comparison.config(variant), seed=0)  # which the choice does not look at
            target, reason = choose(config, comparison.data(variant))
            reasons[reason] = None
            variant = {**variant, "target": target}
            if variant in [*named, *found]:
                continue
        found.append(variant)
    return dataclasses.replace(comparison, variants=tuple(found), reasons=tuple(reasons))


def check(comparison: Comparison) -> None:
    """Raise a ValueError for factors that are none, runs that are the same, and latents of other images."""
    known = [*TrainConfig.__dataclass_fields__, LATENTS]
    unknown = [name for name in comparison.factors if name not in known]
    if unknown:
        raise ValueError(f"unknown setting {unknown[0]!r}{files.nearest(unknown[0], known)}")
    if not comparison.factors:
        raise ValueError("a comparison needs at least 1 setting in which its runs differ, got 0")
    names = [comparison.name(variant) for variant in comparison.variants]
    if twice := [name for name in names if names.count(name) > 1]:
        raise ValueError(f"{names.count(twice[0])} runs are {twice[0]}, each combination of settings is one run")
    seen: dict[str, Path] = {}
    for folder in dict.fromkeys([comparison.latents, *map(comparison.data, comparison.variants)]):
        seen.setdefault(
            "-".join(open_latents(folder, split).manifest.images for split in ("train", "held-out")), folder
        )
    if len(seen) > 1:
        first, second, *_ = seen.values()
        raise ValueError(f"{first} and {second} hold latents of different images, a comparison takes the same ones")


def check_runs(comparison: Comparison) -> None:
    """Raise a ValueError for runs that could not be trained or measured as asked, or were made of other latents."""
    open_extractor(comparison.extractor)
    if comparison.tune:
        tuning(comparison)
    sampling = comparison.sampling
    making = sampling.making(open_latents(comparison.latents).num_classes)
    for variant in comparison.variants:
        config, folder = comparison.config(variant), comparison.data(variant)
        data, run = open_latents(folder), comparison.out / "runs" / comparison.name(variant)
        header = describe(config, data, None, config.target)
        if checkpoint.list_steps(run):
            refuse_changes(checkpoint.read(run).header["latents"], json.loads(json.dumps(header["latents"])), run)
        kept = [f"ema-{decay:g}" for decay in config.ema_decays] + [f"power-{k:g}" for k in config.ema_lengths]
        files_of_run = {f"{name}.safetensors": "" for name in ["model", *kept]}
        checkpoint.Checkpoint(run, {"files": files_of_run}).resolve(sampling.weights)
        with torch.device("meta"):
            model = Transformer(config.model(data.shape, data.num_classes))
        representation, affine = load_representation(folder / "representation"), data.manifest.affine
        untrained = Generator(model, TARGETS["x"], representation, affine, data.manifest.class_names, header, "", "")
        untrained.check(balanced_labels(sampling.num_images, data.num_classes), making)


def record_path(comparison: Comparison, variant: Mapping[str, Any]) -> Path:
    return comparison.out / f"run-{comparison.name(variant)}.json"


judge_of = functools.lru_cache(maxsize=1)(prepare_judge)


def make_run(comparison: Comparison, variant: Mapping[str, Any], device: str) -> None:
    """Train, sample and measure one run, and write its record."""
    name, folder, sampling = comparison.name(variant), comparison.data(variant), comparison.sampling
    run = comparison.out / "runs" / name
    train(comparison.config(variant), folder, run, device=device)
    judge = judge_of(comparison.latents, sampling.num_images, comparison.extractor)
    picture = comparison.out / f"samples-{name}.png"
    settings = comparison.settings(variant)
    generator = load(run, sampling.weights, device)
    part = measure(generator, open_latents(folder), sampling, judge, settings, picture, run / "samples").record
    lines = read_metrics(run)
    held_out = [line["held_out"] for line in lines if "held_out" in line]
    curve = smoothed([line["loss"] for line in lines if line.get("loss") is not None])
    figures = loss_figures({part.name: curve}, {part.name: held_out[-1]} if held_out else {})
    if comparison.tune:
        tune(comparison, name, folder, device)
    records.write(dataclasses.replace(part, figures=figures), record_path(comparison, variant))


def tuning(comparison: Comparison) -> tuple[Factors, Sampling]:
    """Return the scales that are tried, and how: on other noise, and else as all runs are sampled."""
    sampling = comparison.sampling
    factors = Factors(
        scale=comparison.tune,
        interval=(sampling.interval,),
        weights=(sampling.weights,),
        solver=(sampling.solver,),
        steps=(sampling.steps,),
        grid=(sampling.grid,),
        guidance=(sampling.guidance,),
    )
    return factors, dataclasses.replace(sampling, num_images=comparison.tune_images, seed=sampling.seed + 1)


def tune(comparison: Comparison, name: str, latents: Path, device: str) -> None:
    """Find the best guidance scale of one run, and score it as all runs are."""
    factors, few = tuning(comparison)
    sweep(
        comparison.out / "runs" / name, comparison.out / "tuned" / name, factors, few, latents=latents,
        extractor=comparison.extractor, full=comparison.sampling.num_images,
        final_seeds=(comparison.sampling.seed,), device=device,
    )  # fmt: skip


def tuned(comparison: Comparison, runs: Sequence[Record]) -> Record:
    """Return the table of the runs at the scales tuned for them, over seeds like the others."""
    parts = []
    for variant, run in zip(comparison.variants, runs, strict=True) if comparison.tune else ():
        found = records.read(comparison.out / "tuned" / comparison.name(variant) / "record.json")
        scale = Value(float(found.settings["guidance_scale"]))
        values = {"guidance scale": scale, **found.parts[0].values}
        parts.append(dataclasses.replace(run, values=values, figures={}, pictures={}))
    columns = [mean_over_seeds(group) for group in over_seeds(parts)]
    title = f"Guidance tuned for each run, among {', '.join(f'{scale:g}' for scale in comparison.tune)}"
    return Record("tuned", title, {}, {}, parts=tuple(columns))


def conclude(comparison: Comparison, kind: str, title: str, device: str) -> None:
    """Write the outcome of the runs, all of which have their record."""
    latents, out, sampling = comparison.latents, comparison.out, comparison.sampling
    data = open_latents(latents)
    judge = judge_of(latents, sampling.num_images, comparison.extractor)
    runs = [records.read(record_path(comparison, variant)) for variant in comparison.variants]
    factors = comparison.factors
    shared = {name: value for name, value in dataclasses.asdict(comparison.base).items() if name not in factors}
    shared |= {"sampling": dataclasses.asdict(sampling), "training images": len(data)} | judge.settings()
    shared |= {"target auto": "; ".join(comparison.reasons)} if comparison.reasons else {}
    save_grid(out / "real.png", judge.images, judge.labels, data)
    groups = over_seeds(runs)
    columns = [mean_over_seeds(group) for group in groups]
    sections = [tuned(comparison, runs)]
    if len(groups) < len(runs):
        plain = tuple(dataclasses.replace(run, figures={}, pictures={}) for run in runs)
        sections += [paired_differences(groups), Record("runs", "Each run", {}, {}, parts=plain)]
    geometries = [
        measure_geometry(open_latents(folder), patch_size, name=f"Geometry of {label}")
        for (folder, patch_size), label in tokens_of(comparison).items()
    ]
    record = Record(
        kind=kind,
        name=title,
        values={},
        settings=json_ready(shared),
        fingerprints=judge.fingerprints(data),
        figures=mean_figures(groups),
        pictures={"Real held-out images": "real.png"},
        parts=(
            *columns,
            judge.real_part,
            *ceilings(comparison, judge, device),
            *(section for section in sections if section.parts),
            *geometries,
        ),
    )
    records.write(record, out / "record.json")


def ceilings(comparison: Comparison, judge: Judge, device: str) -> list[Record]:
    """Measure what each of the runs' latents leaves of the held-out images."""
    found = [judge.ceiling(folder, device) for folder in dict.fromkeys(map(comparison.data, comparison.variants))]
    if len(found) == 1:
        return found
    return [dataclasses.replace(part, name=f"{part.name}, {part.settings['latents']}") for part in found]


def tokens_of(comparison: Comparison) -> dict[tuple[Path, int], str]:
    """Return the latents and patch sizes that the runs' tokens are made of, and what each pair is called."""
    runs = comparison.variants
    pairs = list(dict.fromkeys((comparison.data(run), comparison.config(run).patch_size) for run in runs))
    folders, sizes = (set(each) for each in zip(*pairs, strict=True))
    return {
        (folder, size): (folder.name if len(folders) > 1 else "the latents")
        + (f" in patches of {size}" if len(sizes) > 1 else "")
        for folder, size in pairs
    }


def over_seeds(runs: Sequence[Record]) -> list[list[Record]]:
    """Group runs that differ in their seed alone, by rising seed."""
    groups: dict[str, list[Record]] = {}
    for run in sorted(runs, key=lambda run: run.settings.get("seed", 0)):
        groups.setdefault(without_seed(run), []).append(run)
    order = [without_seed(run) for run in runs]
    return sorted(groups.values(), key=lambda group: order.index(without_seed(group[0])))


def without_seed(run: Record) -> str:
    return ", ".join(f"{name} {value}" for name, value in run.settings.items() if name != "seed")


def mean_over_seeds(group: Sequence[Record]) -> Record:
    """Return mean and standard deviation over a group's seeds; a count that is the same in all has no spread."""
    first = dataclasses.replace(group[0], figures={})
    if len(group) == 1:
        return first
    values = records.over_seeds([run.values for run in group])
    settings = {name: value for name, value in first.settings.items() if name != "seed"}
    return dataclasses.replace(first, name=seedless(first), values=values, settings=settings, fingerprints={})


def seedless(run: Record) -> str:
    return run.name.replace(f", seed {run.settings.get('seed')}", "")


def paired_differences(groups: Sequence[Sequence[Record]]) -> Record:
    """Return each later group's differences from the first, seed by seed: mean, spread, and the 95 % interval.

    A group that has fewer than two seeds in common with the first is left out, and so is what differs in no pair.
    """
    base = {run.settings.get("seed"): run for run in groups[0]}
    parts = []
    for group in groups[1:]:
        pairs = [(run, base[seed]) for run in group if (seed := run.settings.get("seed")) in base]
        values = {}
        for name, value in pairs[0][0].values.items() if len(pairs) > 1 else ():
            each = [run.values[name].value - other.values[name].value for run, other in pairs if name in other.values]
            if len(each) == len(pairs) and any(each):
                low, high = interval(each)
                values[f"difference in {name}"] = records.mean_and_spread(each, value.unit)
                values[f"difference in {name}, 95 % from"] = Value(low, None, len(each), value.unit)
                values[f"difference in {name}, 95 % to"] = Value(high, None, len(each), value.unit)
        if values:
            settings = mean_over_seeds(group).settings
            parts.append(Record("difference", f"{seedless(group[0])} minus {seedless(groups[0][0])}", values, settings))
    return Record("differences", "Paired differences", {}, {}, parts=tuple(parts))


def interval(values: Sequence[float]) -> tuple[float, float]:
    """Return the 95 % interval of the mean of normal values, by Student's t."""
    with needed("confidence intervals", "evaluation"):
        from scipy.stats import t
    mean = records.mean_and_spread(values)
    assert mean.spread is not None
    half = float(t.ppf(0.975, len(values) - 1)) * mean.spread / math.sqrt(len(values))
    return mean.value - half, mean.value + half


def mean_figures(groups: Sequence[Sequence[Record]]) -> dict[str, Figure]:
    """Return each figure of the runs once, with a line for each group: mean and standard deviation over its seeds."""
    figures: dict[str, Figure] = {}
    for group in groups:
        for name, figure in group[0].figures.items():
            lines = [line for run in group for line in run.figures[name].lines.values()]
            steps = lines[0][0]  # a seed with a skipped step has fewer losses
            each = np.array([np.interp(steps, x, y) for x, y in lines])
            label, so_far = seedless(group[0]), figures.get(name, dataclasses.replace(figure, lines={}))
            spread = {label: each.std(0, ddof=1).tolist()} if len(each) > 1 else {}
            said = " Mean over seeds, in a band of their standard deviation." if spread else ""
            figures[name] = dataclasses.replace(
                so_far,
                caption=so_far.caption.removesuffix(said) + said,
                lines={**so_far.lines, label: (steps, each.mean(0).tolist())},
                spreads={**so_far.spreads, **spread},
            )
    return figures


def smoothed(losses: Sequence[float], points: int = 100) -> tuple[list[float], list[float]]:
    """Return (step, mean loss) over at most `points` equal stretches of training."""
    stretch = max(1, -(-len(losses) // points))
    means = [float(np.mean(losses[i : i + stretch])) for i in range(0, len(losses) - stretch + 1, stretch)]
    return [stretch * (i + 1) for i in range(len(means))], means


def loss_figures(
    curves: Mapping[str, tuple[list[float], list[float]]], by_time: Mapping[str, Mapping[str, Sequence[float]]]
) -> dict[str, Figure]:
    """Return the figures of the training loss and of the held-out loss by time in x- and v-space."""
    middle = [(i + 0.5) / BINS for i in range(BINS)]
    figures = {
        "training loss": Figure("Training loss, in each run's loss space.", "step", "loss", curves, y_scale="log")
    }
    for space, meaning in (("x", "the clean latent"), ("v", "the velocity")) if by_time else ():
        figures[f"held-out loss in {space}-space"] = Figure(
            f"Mean squared error of {meaning} on held-out images, by time, read from either model's output "
            "at the end of training: 0 is noise, 1 is data.",
            "t", f"{space}-space error", {name: (middle, list(losses[space])) for name, losses in by_time.items()},
            y_scale="log",
        )  # fmt: skip
    return figures
