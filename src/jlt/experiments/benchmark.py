"""Scores at full count: images of a run, or made elsewhere, against statistics of real images on disk.

    jlt evaluate RUN --reference REF.npz --extractor inception --num-images 50000
    jlt evaluate npz:SAMPLES.npz --reference REF.npz --extractor inception

Memory holds a batch, the moments, and the features of 10,000 images; a run's images are stored batch by batch, so the
same command goes on where it stopped. Several processes take batches in turn and send their features to the first,
which adds them up in the order of batches: the result is that of one process.

OUT/record.json, OUT/samples.png; of a run also OUT/samples/ (jlt.sampling.storage)
"""

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from jaxtyping import Float, Int, UInt8
from torch import Tensor
from tqdm import tqdm

from jlt import files
from jlt.data import Source, Subset, load_representation, open_latents, open_source, real_images
from jlt.data.batches import cut, read_ranges
from jlt.data.hub import find_checkpoint
from jlt.data.npz import open_npz
from jlt.evaluation import references
from jlt.evaluation.distances import frechet_distance
from jlt.evaluation.features import Extractor, metric_name, open_extractor, views
from jlt.evaluation.moments import Moments
from jlt.evaluation.protocol import Reference, compare
from jlt.evaluation.reconstruction import Fidelity
from jlt.evaluation.records import Record, Value, over_seeds
from jlt.evaluation.statistics import KEPT, Statistics
from jlt.experiments import plots
from jlt.experiments.asking import Sampling, balanced_labels, by_seed
from jlt.experiments.evaluate import check_fit, class_section, decode, stated, write_record
from jlt.nn import checkpoint
from jlt.processes import Processes, joined, open_device
from jlt.sampling import load, storage

Batches = Iterable[UInt8[Tensor, "b c h w"]]
AS_THEY_ARE = ("npz:", "idx:", "idx-test:", "mnist")  # sources whose images are not cut to a size


@dataclass(frozen=True)
class Subject:
    """Images to be measured: `read(ranges)` yields those of each range of numbers, `finish()` what they took."""

    name: str
    count: int
    batch_size: int
    read: Callable[[Sequence[range]], Batches]
    settings: Mapping[str, Any]
    fingerprints: Mapping[str, str]
    finish: Callable[[], dict[str, Value]] = field(default=dict)
    labels: Int[Tensor, " n"] | None = None
    class_names: Sequence[str] | None = None

    def __post_init__(self) -> None:
        if self.batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {self.batch_size}")


def benchmark(
    source: str,
    reference: Path,
    out: Path,
    sampling: Sampling,
    extractor: str,
    image_size: int | None = None,
    device: str = "cpu",
    seeds: Sequence[int] = (),
    latents: Path | None = None,
) -> Path | None:
    """Measure a run, or images that a spec names, against a reference; return the record's path on the first process.

    Args:
        source: a run or checkpoint folder, ORG/NAME of the Hub, or a spec of `jlt.data.sources`, such as tar:PATH or
            FILE.npz.
        reference: statistics of real images, .npz; see `jlt.evaluation.references`.
        out: folder for the record, a picture, and a run's images.
        sampling: how a run is sampled; for other images only its batch size may be other than the default.
        extractor: a spec of `features.open_extractor`.
        image_size: side that photographs are cropped to, where the images are not a run's.
        device: where networks run.
        seeds: several, in place of the sampling's: values are then mean and spread over them.
        latents: what a run was trained on; its held-out images, encoded and decoded, are measured in the same way.
    """
    with joined() as processes:
        where = open_device(device)
        network = open_extractor(extractor)
        run = processes.first(lambda: find_checkpoint(Path(source))) or find_checkpoint(Path(source))
        if is_run(run):
            if image_size is not None:
                raise ValueError(f"image_size is {image_size}, but {source} is a run, whose images have their own size")
            return score(run, reference, out, sampling, seeds, network, where, processes, latents)
        if latents is not None or seeds:
            raise ValueError(f"{source} is no run: it has neither latents nor seeds")
        plain = dataclasses.asdict(Sampling(batch_size=sampling.batch_size))
        if asked := [name for name, value in vars(sampling).items() if value != plain[name]]:
            raise ValueError(
                f"{source} is no run: its images are all measured as they are, {', '.join(asked)} is for runs"
            )
        real = processes.first(lambda: open_reference(reference, network, sampling.batch_size, where))
        subject = of_images(source, image_size, sampling.batch_size)
        statistics = observe(subject, network, where, processes)
        return processes.first(lambda: finish([(subject, statistics)], real, reference, network, out))


def score(
    run: Path,
    reference: Path,
    out: Path,
    sampling: Sampling,
    seeds: Sequence[int],
    extractor: Extractor,
    device: torch.device,
    processes: Processes,
    latents: Path | None = None,
) -> Path | None:
    """Measure a run against a reference, each seed anew; see `benchmark`."""
    if latents is not None:
        check_fit(checkpoint.read(run).header, open_latents(latents))
    real = processes.first(lambda: open_reference(reference, extractor, sampling.batch_size, device))
    measured, ceiling = [], None
    for each, folder in by_seed(sampling, seeds, out):
        subject = of_run(run, folder, each, device, processes)
        measured.append((subject, observe(subject, extractor, device, processes)))
    if latents is not None:
        fidelity = Fidelity()
        decoded = of_latents(latents, "held-out", sampling.batch_size, device, fidelity)
        statistics = observe(decoded, extractor, device, processes)
        fidelity.sums = processes.total(fidelity.sums)
        if real is not None:
            values = compare(statistics, real, extractor) | fidelity.values()
            ceiling = Record("reference", f"{decoded.count} {decoded.name}", values, {})
    return processes.first(lambda: finish(measured, real, reference, extractor, out, seeds, ceiling))


def is_run(path: Path) -> bool:
    """Say whether a path is a checkpoint's or a run's folder."""
    return (path / checkpoint.HEADER).is_file() or (path / "checkpoints").is_dir()


def own_folder(run: Path, name: str) -> Path:
    """Return the folder `name` in a run's; images and repositories of the Hub have none, which is a ValueError."""
    if not is_run(run):
        raise ValueError(f"{run} is no folder of a run; say with --out where its record goes")
    return run / name


def of_run(run: Path, out: Path, sampling: Sampling, device: torch.device, processes: Processes) -> Subject:
    """Return the images of a run, made as they are read."""
    generator = load(run, sampling.weights, device)
    classes = generator.model.config.num_classes
    labels = balanced_labels(sampling.num_images, classes)
    how = sampling.making(classes, device)
    processes.first(lambda: storage.begin(generator, labels, out, how))
    asked = files.read_json(out / storage.HEADER)

    def read(ranges: Sequence[range]) -> Batches:
        for numbers in ranges:
            yield storage.batch(generator, labels, out, how, numbers.start // sampling.batch_size)[0]

    def finish() -> dict[str, Value]:
        spent = storage.finish(out, asked)
        return {
            "evaluations": Value(spent.evaluations),
            "network passes": Value(spent.network_passes),
            "sampling time, of all processes": Value(spent.seconds, unit="s"),
        }

    stride = generator.representation.stride
    size = " x ".join(str(side * stride) for side in generator.model.config.shape[1:])
    return Subject(
        name=f"{generator.header['name']}, step {generator.header['step']}",
        count=len(labels),
        batch_size=sampling.batch_size,
        read=read,
        settings=stated(asked, classes) | {"image size": size},
        fingerprints={"weights": generator.fingerprint},
        finish=finish,
        labels=labels if classes else None,
        class_names=generator.class_names,
    )


def of_images(spec: str, image_size: int | None, batch_size: int) -> Subject:
    """Return images that were made elsewhere."""
    return of_source(open_images(spec, image_size), batch_size)


def of_source(source: Source, batch_size: int) -> Subject:
    """Return the images of a source."""
    _, height, width = source.image_shape
    settings = {
        "images": source.spec,
        "image size": f"{height} x {width}",
        "resize": "none" if source.spec.startswith(AS_THEY_ARE) else "centre crop, as ADM's",
        "num_images": len(source),
    }
    read = lambda ranges: (images for images, _ in read_ranges(source, ranges))  # noqa: E731
    labels, names = torch.from_numpy(source.labels()), source.class_names
    prints = {"images": source.fingerprint}
    return Subject(source.spec, len(source), batch_size, read, settings, prints, labels=labels, class_names=names)


def of_latents(
    folder: Path, split: str, batch_size: int, device: torch.device, fidelity: Fidelity | None = None
) -> Subject:
    """Return what the latents of a split decode to; `fidelity` is told how the images differ from the originals."""
    opened = open_latents(folder, split)
    height, width = (side * load_representation(folder / "representation").stride for side in opened.shape[1:])

    def read(ranges: Sequence[range]) -> Batches:
        decoded = decode(folder, split, ranges, device)
        if fidelity is None:
            yield from decoded
            return
        originals = read_ranges(real_images(folder, split), ranges)
        for images, (real, _) in zip(decoded, originals, strict=True):
            fidelity.update(real, images)
            yield images

    made = f"{opened.manifest.representation} {opened.manifest.representation_fingerprint}"
    name = "held-out images, encoded and decoded" if split == "held-out" else "training images, encoded and decoded"
    return Subject(
        name=name,
        count=len(opened),
        batch_size=batch_size,
        read=read,
        settings={"images": f"{name} by {made}", "image size": f"{height} x {width}", "resize": "none"},
        fingerprints={"representation": opened.manifest.representation_fingerprint},
        labels=opened.labels if opened.num_classes else None,
        class_names=opened.manifest.class_names,
    )


def open_images(spec: str, image_size: int | None) -> Source:
    """Open a source of images; of a folder of latents, those that its training split was made from."""
    if (Path(spec) / "encoding.json").is_file():
        if image_size is not None:
            raise ValueError(
                f"{spec} holds latents, whose images have their own size; image_size {image_size} has no use"
            )
        return real_images(Path(spec), "train")
    return open_source(spec, image_size)


def observe(
    subject: Subject, extractor: Extractor, device: torch.device, processes: Processes, keep: int = KEPT
) -> Statistics:
    """Pass over all images; the statistics are complete on the first process alone."""
    statistics = Statistics(subject.count, keep)
    ranges = cut(0, subject.count, subject.batch_size)
    mine = iter(subject.read(ranges[processes.rank :: processes.count]))
    progress = tqdm(
        total=subject.count, desc=f"measuring {subject.name}", unit="image", disable=processes.rank > 0 or None
    )
    for first in range(0, len(ranges), processes.count):
        images = next(mine, None)
        rows = None if images is None else views(extractor, images.to(device))
        for seen in together(rows, ranges[first : first + processes.count], extractor, subject.batch_size, processes):
            statistics.update(seen)
            progress.update(len(seen["features"]))
    progress.close()
    return statistics


def together(
    rows: Mapping[str, Tensor] | None,
    ranges: Sequence[range],
    extractor: Extractor,
    batch_size: int,
    processes: Processes,
) -> Iterator[Mapping[str, Float[Tensor, "b _"]]]:
    """Yield, on the first process, the views of each process's batch in the order of their numbers."""
    if processes.count == 1:
        if rows is not None:
            yield rows
        return
    if rows is None:  # this process has no batch left; it sends zeros of the same width
        rows = {name: view[:0] for name, view in views(extractor, torch.zeros(1, 3, 8, 8, dtype=torch.uint8)).items()}
    widths = {name: view.shape[1] for name, view in rows.items()}
    packed = torch.cat([view.float().cpu() for view in rows.values()], 1)
    packed = torch.nn.functional.pad(packed, (0, 0, 0, batch_size - len(packed)))
    received = [torch.empty_like(packed) for _ in range(processes.count)] if processes.rank == 0 else None
    dist.gather(packed, received, dst=0)
    for numbers, block in zip(ranges, received or [], strict=False):  # fewer ranges than processes in the last round
        yield dict(zip(widths, block[: len(numbers)].split(list(widths.values()), 1), strict=True))


def open_reference(path: Path, extractor: Extractor, batch_size: int, device: torch.device) -> Reference:
    """Read a reference; where it has images but not their features, as ADM's, make those."""
    reference = references.read(path, extractor)
    if reference.features is None and references.has_images(path):
        images = open_npz(str(path))
        chosen = Subset(images, range(min(KEPT, len(images))))
        batches = read_ranges(chosen, cut(0, len(chosen), batch_size))
        progress = tqdm(batches, desc="features of the reference's images", disable=None)
        features = torch.cat([extractor(batch.to(device)).float().cpu() for batch, _ in progress])
        reference = dataclasses.replace(reference, features=features)
    return reference


def floor(reference: Reference, extractor: Extractor, count: int) -> Record | None:
    """Return what real images score: those kept of the reference, as many as are measured if there are so many."""
    if reference.features is None or min(len(reference.features), count) < 2:
        return None
    if reference.count is not None and count >= reference.count:
        return None  # all of its images are at distance 0 from it, and tell nothing
    # drawn at random: a set may be ordered by class, so its first images are no fair draw
    drawn = torch.randperm(len(reference.features), generator=torch.Generator().manual_seed(0))[:count]
    some = reference.features[drawn]
    moments = Moments(reference.moments.dimension)
    moments.update(some)
    values = {metric_name("FD", extractor): Value(frechet_distance(moments, reference.moments))}
    return Record("reference", f"{len(some)} of the reference's own images", values, {})


def finish(
    measured: Sequence[tuple[Subject, Statistics]],
    real: Reference | None,
    path: Path,
    extractor: Extractor,
    out: Path,
    seeds: Sequence[int] = (),
    ceiling: Record | None = None,
) -> Path:
    """Write the record and a picture of the first images."""
    assert real is not None
    subject, statistics = measured[0]
    values = over_seeds([compare(found, real, extractor) | each.finish() for each, found in measured])
    beside = [part for part in (floor(real, extractor, subject.count), ceiling) if part is not None]
    first = next(iter(subject.read([range(min(subject.batch_size, subject.count))])))
    plots.save(out / "samples.png", plots.grid(first[:100], 10))
    settings = {
        **subject.settings,
        "extractor": extractor.name,
        "reference": path.name,
        "reference's images": real.name if real.count is None else f"{real.count} of {real.name}",
        "reference's image size": real.image_size or "not stated",
        "images compared for KD, precision, recall, density, coverage":
            "none" if real.features is None else f"{statistics.keep} with {len(real.features)}",
    }  # fmt: skip
    if len(seeds) > 1:
        settings = {name: value for name, value in settings.items() if name != "seed"} | {"seeds": list(seeds)}
    seen = Reference(
        subject.name, extractor.name, extractor.fingerprint, real.moments, statistics.kept,
        labels=None if subject.labels is None else subject.labels[statistics.kept_numbers],
    )  # fmt: skip
    return write_record(
        out,
        Record("evaluate", subject.name, values, {}, subject.fingerprints),
        beside=beside,
        settings=settings,
        fingerprints={"reference": files.sha256(path), "extractor": extractor.fingerprint},
        pictures={"The first images": "samples.png"},
        sections=class_section({subject.name: seen}, real, extractor, subject.class_names),
    )


def make_reference(
    source: str,
    out: Path,
    extractor: str,
    image_size: int | None = None,
    keep: int = KEPT,
    images: bool = False,
    batch_size: int = 100,
    device: str = "cpu",
    decoded: bool = False,
) -> str | None:
    """Write statistics of real images, and return a line that says of what, on the first process.

    Args:
        source: a spec of `jlt.data.sources`, or a folder of latents for the images it was made from.
        out: the .npz file.
        extractor: a spec of `features.open_extractor`.
        image_size: side that photographs are cropped to.
        keep: images, drawn at random, whose features are kept for KID, precision, recall, density and coverage.
        images: keep those images too, as ADM does; others can then take other features of them.
        batch_size: images at once.
        device: where the network runs.
        decoded: take what the latents of `source` decode to, in place of the images that they were made from.
    """
    if out.suffix != ".npz":
        raise ValueError(f"{out} does not end in .npz, as files of statistics do")
    with joined() as processes:
        where, network = open_device(device), open_extractor(extractor)
        subject = (
            of_latents(Path(source), "train", batch_size, where)
            if decoded
            else of_images(source, image_size, batch_size)
        )
        return write_reference(subject, out, network, where, processes, keep, images)


def write_reference(
    subject: Subject,
    out: Path,
    extractor: Extractor,
    device: torch.device,
    processes: Processes,
    keep: int = KEPT,
    images: bool = False,
) -> str | None:
    """Write statistics of these images; return a line that says of what, on the first process."""
    statistics = observe(subject, extractor, device, processes, keep)

    def write() -> str:
        kept = statistics.kept_numbers
        ranges = [range(i, i + 1) for i in kept if images]
        arrays = [batch.permute(0, 2, 3, 1).numpy() for batch in subject.read(ranges)]
        references.write(
            out, statistics, extractor, str(subject.settings["images"]),
            images=np.concatenate(arrays) if arrays else None,
            labels=None if subject.labels is None else subject.labels[kept].numpy(),
            image_size=str(subject.settings["image size"]),
        )  # fmt: skip
        seen = f"{statistics.count} images of {subject.settings['images']}"
        return f"{out}: {seen}, {extractor.name}, features of {statistics.keep} kept"

    return processes.first(write)
