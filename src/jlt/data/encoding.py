"""Encoding: a source's images to latents on disk, split into training and held-out images.

A stopped encoding goes on when it is started again: shards whose bytes are those of the hash beside them
(jlt.data.writing) are kept, others are made again, and the bytes of shards and manifest are those of an encoding that
was never stopped. The folder's encoding.json states what it is made from, first of all files, so that another source or
another setting is refused. The manifests come last: latents without one are unfinished.

Under torchrun process r of n writes shards r, r + n, r + 2n, ...; the first one does what is done once. A shard's bytes
are the same whoever writes it. Images are decoded in threads while the representation works on earlier ones, and a
shard is written while it works on the next.

Bad input leaves nothing behind that the same call has begun, but for whole shards where an image is broken, and for
what several processes have begun: started again with `skip_broken` the encoding goes on. Which images are held out does
not depend on the broken ones, and only shards that end before the first of them are kept. skipped.json names them by
their index in the source.
"""

import contextlib
import dataclasses
import shutil
import time
from collections import defaultdict
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Int, UInt8
from torch import Tensor
from tqdm import tqdm

from jlt import files
from jlt.data.autoencoders import KNOWN, PREFIX, open_autoencoder
from jlt.data.batches import cut, read_batches, read_ranges
from jlt.data.hub import find_checkpoint
from jlt.data.images import BrokenImage, quiet
from jlt.data.representations import Pixels, Representation, fit_patch_pca, image_batch, load_representation
from jlt.data.shards import MANIFEST, SPLITS, Affine, open_latents, read_manifest, shard_name
from jlt.data.sources import Source, Subset, held_out_indices, open_source
from jlt.data.writing import (
    fit_affine,
    identity,
    moments,
    read_summaries,
    read_summary,
    summary_path,
    to_half,
    write_manifest,
    write_shard,
)
from jlt.nn import checkpoint
from jlt.processes import Processes, joined, open_device

NORMALISATIONS = ("none", "global", "channel")
OFFLINE = ("patch-pca", "pixels")  # made of the images themselves
SAME = "of:"  # before a folder of latents or of a run, whose representation and normalisation are taken


def encode(
    source: str | Source,
    out: Path,
    *,
    representation: str = "patch-pca",
    image_size: int | None = None,
    stride: int | None = None,
    channels: int | None = None,
    num_held_out: int = 0,
    normalise: str | None = None,
    mirrored: bool = False,
    shard_size: int = 4096,
    batch_size: int | None = None,
    dtype: str = "float32",
    skip_broken: bool = False,
    upscale: bool = False,
    device: str = "cpu",
    announce: Callable[[str], None] | None = None,
) -> None:
    """Encode a source into the folder `out`; see jlt.data.shards for what it holds.

    Args:
        source: a spec such as "mnist" or "folder:photos" (jlt.data.sources).
        out: the folder; an unfinished encoding in it is continued, a finished one mended where shards are damaged.
        representation: patch-pca, fitted to the training images; pixels; of:FOLDER, that of other latents or of a run,
            or of:ORG/NAME of the Hub, with their normalisation (fine-tuning); or an autoencoder
            (jlt.data.autoencoders): flux2, flux2-small-decoder, autoencoder:FOLDER_OR_ID.
        image_size: side of the square crop (photographs: 256 by default).
        stride: side of a patch, 4 by default (patch-pca).
        channels: components kept (patch-pca), all by default.
        num_held_out: images set apart, evenly over the classes.
        normalise: "none", the latents as the representation gives them; "global", one scale for all channels, which
            makes the mean channel variance 1; or "channel", one each, which makes every variance 1 (patch-pca, whose
            channels are uncorrelated, is whitened by that). By default none for an autoencoder that states its own
            normalisation, channel for one that does not, global for the others.
        mirrored: encode the mirror image of each training image, too.
        shard_size: images a shard.
        batch_size: images at once, 256 by default, or 16 for an autoencoder, whose rounding may depend on it.
        dtype: of an autoencoder's weights, float32 or bfloat16.
        skip_broken: leave out images that cannot be decoded, named in skipped.json, instead of stopping at the first.
        upscale: enlarge images that are smaller than the crop, instead of stopping at the first.
        device: where the representation runs.
        announce: called with one line that estimates time and disk before the work starts.
    """
    learned = representation in KNOWN or representation.startswith(PREFIX)
    given: tuple[Path, Affine] | None = None
    if representation.startswith(SAME):
        given = find_representation(Path(representation.removeprefix(SAME)))
        if normalise is not None:
            raise ValueError(f"{representation} has its own normalisation, got normalise {normalise}")
    elif not learned:
        options = (*OFFLINE, *KNOWN, f"{PREFIX}FOLDER_OR_ID", f"{SAME}LATENTS_OR_RUN")
        files.choose("representation", representation, dict.fromkeys(options))
        if dtype != "float32":
            raise ValueError(f"dtype is that of an autoencoder's weights, {representation} is not one, got {dtype}")
    if normalise is not None:
        files.choose("normalisation", normalise, dict.fromkeys(NORMALISATIONS))
    if batch_size is None:
        batch_size = 16 if learned else 256
    for name, value in (("shard_size", shard_size), ("batch_size", batch_size)):
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    if representation != "patch-pca" and (stride, channels) != (None, None):
        raise ValueError(f"{representation} has its own stride and channels, got stride {stride}, channels {channels}")
    where = open_device(device)
    with joined() as processes:

        def look() -> Source:
            opened = open_source(source, image_size, upscale) if isinstance(source, str) else source
            root = Path(opened.spec.removeprefix("folder:"))
            if (
                opened.spec.startswith("folder:")
                and opened.class_names
                and out.resolve().is_relative_to(root.resolve())
            ):
                raise ValueError(f"{out} lies in {root}, whose folders are classes; latents go into a folder elsewhere")
            held_out_indices(opened.labels(), num_held_out)  # a number that is too large is refused before any writing
            return opened

        opened = processes.first(look) or look()
        settings: dict[str, Any] = {
            "source": opened.spec,
            "source_fingerprint": opened.fingerprint,
            "image_shape": list(opened.image_shape),
            "representation": representation,
            "stride": {"pixels": 1, "patch-pca": 4 if stride is None else stride}.get(representation),
            "channels": channels,
            "num_held_out": num_held_out,
            "normalise": normalise or (None if learned else "global"),
            "mirrored": mirrored,
            "shard_size": shard_size,
            "skip_broken": skip_broken,
            "upscale": upscale,
        } | ({"dtype": dtype, "batch_size": batch_size} if learned else {})
        if given:
            check_images(load_representation(given[0]), opened, representation)
            settings["representation"] = f"{SAME}{load_representation(given[0]).fingerprint}"  # wherever it lies
            settings["normalise"] = dataclasses.asdict(given[1])
        existed = out.exists()
        # the fingerprint tells sources apart, wherever they lie; and skipping may begin at any time, but not end
        free = ("source", "skip_broken") if skip_broken else ("source",)
        begun = processes.first(lambda: files.claim(out, "encoding.json", settings, "latents", free))
        # the lock is outside of what clears up: another process's work is not ours to remove
        lock = files.locked(out / "encoding.json") if processes.rank == 0 else contextlib.nullcontext()
        with lock:
            try:
                fill(out, opened, settings, batch_size, where, processes, announce, given)
            except ValueError as error:  # bad input, met by another setting or another source: what is there is no use
                if isinstance(error, BrokenImage) and any(out.glob("*/shard-*.safetensors")):
                    raise
                made = ("train", "held-out", "representation", "skipped.json", "encoding.json")
                for path in [out / name for name in made] if existed else [out]:
                    if begun:
                        files.remove(path)
                raise


def fill(
    out: Path,
    opened: Source,
    settings: dict[str, Any],
    batch_size: int,
    where: torch.device,
    processes: Processes,
    announce: Callable[[str], None] | None,
    given: tuple[Path, Affine] | None,
) -> None:
    """Write what is missing of the encoding that `settings` describe."""

    def prepare() -> dict[str, list[int]]:
        for folder in (out, out / "representation", out / "train", out / "held-out"):
            files.remove_temporaries(folder)
        if settings["skip_broken"] and not (out / "skipped.json").is_file():
            skip_broken_images(opened, settings, out)
        parts = split_indices(opened, settings, out)
        if not parts["train"]:
            raise ValueError(f"{opened.spec} leaves 0 of {len(opened)} images to train on")
        if given and not (out / "representation" / "representation.json").is_file():
            load_representation(given[0]).save(out / "representation")
        make_representation(out / "representation", Subset(opened, parts["train"]), settings, batch_size)
        return parts

    parts = processes.first(prepare) or split_indices(opened, settings, out)
    encoder = load_representation(out / "representation")
    both = {"train": settings["mirrored"], "held-out": False}
    _, height, width = opened.image_shape
    shape = (encoder.channels, height // encoder.stride, width // encoder.stride)

    def estimate() -> None:
        bytes_each = 2 * shape[0] * shape[1] * shape[2]
        numbers = {split: len(indices) * (1 + both[split]) for split, indices in parts.items()}
        needed = bytes_each * sum(numbers.values())
        there = sum(path.stat().st_size for split in parts for path in (out / split).glob("shard-*.safetensors"))
        free = shutil.disk_usage(out).free
        if needed - there > free:
            raise ValueError(f"{out} needs {needed - there} more bytes for latents, its disk has {free} free")
        if announce and needed > there:
            speed = images_per_second(encoder, Subset(opened, parts["train"]), where)
            hours = (1 - there / needed) * sum(numbers.values()) / speed / processes.count / 3600
            announce(
                f"{len(opened)} images{' and their mirror images' if both['train'] else ''}: {needed / 1e9:.3g} GB of "
                f"latents {shape}, {free / 1e9:.3g} GB are free; at {speed:.3g} images/s a process about "
                f"{f'{hours:.1f} hours' if hours > 1 else f'{60 * hours:.1f} minutes'} (estimates)"
            )

    processes.first(estimate)
    filled = {split: indices for split, indices in parts.items() if indices}
    for split, indices in filled.items():
        write_shards(encoder, Subset(opened, indices), out / split, settings, batch_size, where, processes)
    processes.wait()

    def finish() -> None:
        counts = {split: len(cut(0, len(indices), settings["shard_size"])) for split, indices in filled.items()}
        written = {split: read_summaries(out / split, count) for split, count in counts.items()}
        kind = settings["normalise"] or encoder.normalisation
        mean, variance = moments(written["train"], shape[1] * shape[2])
        if given:
            affine = given[1]
        else:
            affine = identity(encoder.channels) if kind == "none" else fit_affine(mean, variance, kind)
        for split, summaries in written.items():
            if not (out / split / MANIFEST).is_file():
                source = {key: settings[key] for key in ("source", "source_fingerprint", "image_shape")}
                source |= {"images": files.fingerprint(parts[split])}
                write_manifest(
                    out / split, summaries, shape, settings["shard_size"], opened.class_names, source, encoder, affine,
                    both[split],
                )  # fmt: skip

    processes.first(finish)


def split_indices(source: Source, settings: dict[str, Any], folder: Path) -> dict[str, list[int]]:
    """Return which images of a source make up each split, in order, without the broken ones if they are skipped."""
    held_out = held_out_indices(source.labels(), int(settings["num_held_out"]))
    broken = list(map(int, files.read_json(folder / "skipped.json"))) if settings["skip_broken"] else []
    training = np.setdiff1d(np.arange(len(source)), held_out)
    return {"train": np.setdiff1d(training, broken).tolist(), "held-out": np.setdiff1d(held_out, broken).tolist()}


def read_settings(out: Path) -> dict[str, Any]:
    """Read encoding.json; an entry that is missing is None."""
    found = files.read_json(out / "encoding.json")
    if not isinstance(found, dict):
        raise ValueError(f"{out / 'encoding.json'} holds {found!r:.40}, the settings of an encoding are wanted")
    return found


def skip_broken_images(source: Source, settings: dict[str, Any], out: Path) -> None:
    """Name the images that cannot be decoded in skipped.json, after removing the shards that do not end before them.

    Another process than the one that met a broken image may have written such shards, which will hold other images.
    """
    scan = tqdm(total=len(source), desc="looking for broken images", unit="image", disable=None)
    reasons = {}
    with ThreadPoolExecutor() as pool, quiet():
        for span in cut(0, len(source), 1024):
            for index, reason in zip(span, pool.map(lambda i: why_broken(source, i), span), strict=True):
                if reason:
                    reasons[str(index)] = reason
            scan.update(len(span))
    scan.close()
    if len(reasons) == len(source):
        raise ValueError(f"all {len(source)} images cannot be decoded")
    for split, indices in split_indices(source, settings | {"skip_broken": False}, out).items():
        before = next((k for k, index in enumerate(indices) if str(index) in reasons), None)
        if before is not None:
            for k in range(before // settings["shard_size"], -(-len(indices) // settings["shard_size"])):
                for path in (out / split / shard_name(k), summary_path(out / split, k)):
                    files.remove(path)
    if reasons:
        for split in SPLITS:
            files.remove(out / split / MANIFEST)
    files.write_json(out / "skipped.json", reasons)


def why_broken(source: Source, index: int) -> str | None:
    """Return why an image cannot be decoded, or None."""
    try:
        source[index]
    except BrokenImage as error:
        return str(error)
    return None


def find_representation(folder: Path) -> tuple[Path, Affine]:
    """Return where the representation of latents or of a run lies, and its normalisation."""
    if (folder / "encoding.json").is_file():
        return folder / "representation", open_latents(folder).manifest.affine
    opened = checkpoint.read(find_checkpoint(folder))
    return opened.folder / "representation", Affine.stated(opened.header["latents"]["affine"])


def check_images(representation: Representation, images: Source, named: str) -> None:
    """Raise a ValueError for images that a representation was not made for."""
    channels, height, width = images.image_shape
    if channels != representation.image_channels:
        raise ValueError(f"images have {channels} channels, {named} takes {representation.image_channels}")
    if height % representation.stride or width % representation.stride:
        raise ValueError(f"images are {height} x {width}, {named} has patches of {representation.stride}")


def make_representation(folder: Path, training: Source, settings: dict[str, Any], batch_size: int) -> None:
    """Save the representation of an encoding into its folder, unless an interrupted one has."""
    if (folder / "representation.json").is_file():
        return
    made: Representation
    if settings["representation"] == "pixels":
        made = Pixels(training.image_shape[0])
    elif settings["representation"] != "patch-pca":
        made = open_autoencoder(settings["representation"], settings["dtype"])
    else:
        batches = read_batches(training, 0, len(training), batch_size)
        progress = tqdm(batches, desc="fitting patch PCA", total=-(-len(training) // batch_size), disable=None)
        made = fit_patch_pca((images for images, _ in progress), settings["stride"], settings["channels"])
    made.save(folder)


def images_per_second(encoder: Representation, images: Source, device: torch.device, num: int = 8) -> float:
    """Time reading and encoding a few images, the slower of which sets the pace of both at once."""
    began = time.perf_counter()
    ((batch, _),) = read_batches(images, 0, num := min(num, len(images)), num)
    reading = time.perf_counter() - began
    encoder.encode(batch.to(device)).cpu()  # the first call loads weights and compiles kernels
    began = time.perf_counter()
    encoder.encode(batch.to(device)).cpu()
    return num / max(reading, time.perf_counter() - began)


def write_shards(
    encoder: Representation,
    images: Source,
    folder: Path,
    settings: dict[str, Any],
    batch_size: int,
    device: torch.device,
    processes: Processes,
) -> None:
    """Write this process's share of the shards that are missing or damaged.

    A batch is decoded ahead in threads (jlt.data.batches), and one shard at a time is written in a thread.
    """
    folder.mkdir(parents=True, exist_ok=True)
    spans, mirrored = cut(0, len(images), settings["shard_size"]), settings["mirrored"] and folder.name == "train"
    mine = range(processes.rank, len(spans), processes.count)
    missing = [k for k in mine if read_summary(folder, k) is None]
    progress = tqdm(
        total=sum(len(spans[k]) for k in mine), initial=sum(len(spans[k]) for k in mine if k not in set(missing)),
        desc=f"encoding {folder.name}", unit="image", disable=None if processes.rank == 0 else True,
    )  # fmt: skip
    batches = read_ranges(images, [r for k in missing for r in cut(spans[k].start, spans[k].stop, batch_size)])
    written: Future[None] | None = None
    with contextlib.closing(batches), ThreadPoolExecutor(1) as writer:
        for k in missing:
            parts: dict[str, list[Tensor]] = defaultdict(list)
            for _ in cut(spans[k].start, spans[k].stop, batch_size):
                batch, labels = next(batches)
                sides = {"latents": batch} | ({"mirrored": batch.flip(3)} if mirrored else {})
                for name, side in sides.items():
                    parts[name].append(to_half(encoder.encode(side.to(device)).cpu(), folder))
                parts["labels"].append(labels)
                progress.update(len(batch))
            if written:
                written.result()
            written = writer.submit(write_shard, folder, k, {name: torch.cat(p) for name, p in parts.items()})
        if written:
            written.result()
    progress.close()


def reconstruct(
    folder: Path, split: str, indices: Int[Tensor, " n"]
) -> tuple[UInt8[Tensor, "n c h w"], UInt8[Tensor, "n c h w"]]:
    """Return some images of a split, and what their latents decode to."""
    latents, representation = open_latents(folder, split), load_representation(folder / "representation")
    source = real_images(folder, split)
    originals = image_batch(source[i][0] for i in indices.tolist())
    return originals, representation.decode(latents.manifest.affine.restore(latents.gather(indices)))


def real_images(folder: Path, split: str) -> Source:
    """Reopen the images that a split was encoded from; a source that has changed since is a ValueError."""
    settings, manifest = read_settings(folder), read_manifest(folder / split)
    wanted = ("source", "image_shape", "source_fingerprint", "num_held_out", "skip_broken", "upscale")
    if str(settings.get("source")).startswith("authors-latents:"):
        raise ValueError(f"{folder} was imported from latents, {settings['source']}: there are no images to reopen")
    if missing := [name for name in wanted if name not in settings]:
        raise ValueError(f"{folder / 'encoding.json'} lacks {', '.join(missing)}")
    source = open_source(settings["source"], int(settings["image_shape"][1]), bool(settings["upscale"]))
    if source.fingerprint != settings["source_fingerprint"]:
        raise ValueError(
            f"{settings['source']} has fingerprint {source.fingerprint}, "
            f"the latents in {folder} were made from {settings['source_fingerprint']}"
        )
    indices = split_indices(source, settings, folder)[split]
    if (found := files.fingerprint(indices)) != manifest.source.get("images"):
        raise ValueError(
            f"{folder / split} holds the {manifest.num_images} images {manifest.source.get('images')}, "
            f"its source gives the {len(indices)} images {found}"
        )
    return Subset(source, indices)
