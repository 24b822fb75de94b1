"""Encoding: a source's images to latents on disk, split into training and held-out images.

A stopped encoding goes on when it is started again: shards whose bytes are those of the hash beside them
(shard-00000.sha256) are kept, others are made again, and the bytes of shards and manifest are those of an encoding that
was never stopped. The folder's encoding.json states what it is made from, first of all files, so that another source or
another setting is refused. The manifests come last: latents without one are unfinished.

Bad input leaves nothing behind that the same call has begun, but for whole shards before a broken image: started again
with `skip_broken` the encoding goes on. Which images are held out does not depend on the broken ones, and whole shards
end before the first of them. skipped.json names them by their index in the source.
"""

import hashlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Int, UInt8
from safetensors.torch import load_file, save
from torch import Tensor
from tqdm import tqdm

from jlt import files
from jlt.data.images import BrokenImage, quiet
from jlt.data.representations import Pixels, Representation, fit_patch_pca, image_batch, load_representation
from jlt.data.shards import MANIFEST, Affine, Manifest, open_latents, read_manifest, shard_name
from jlt.data.sources import Source, Subset, held_out_indices, open_source

NORMALISATIONS = ("global", "channel")
OFFLINE = ("patch-pca", "pixels")


def encode(
    source: str | Source,
    out: Path,
    *,
    representation: str = "patch-pca",
    image_size: int | None = None,
    stride: int | None = None,
    channels: int | None = None,
    num_held_out: int = 0,
    normalise: str = "global",
    mirrored: bool = False,
    shard_size: int = 4096,
    batch_size: int = 256,
    skip_broken: bool = False,
    upscale: bool = False,
) -> None:
    """Encode a source into the folder `out`; see jlt.data.shards for what it holds.

    Args:
        source: a spec such as "mnist" or "folder:photos".
        out: the folder; an unfinished encoding in it is continued, a finished one mended where shards are damaged.
        representation: patch-pca, fitted to the training images, or pixels.
        image_size: side of the square crop (folders: 256 by default).
        stride: side of a patch, 4 by default (patch-pca).
        channels: components kept (patch-pca), all by default.
        num_held_out: images set apart, evenly over the classes.
        normalise: one scale for all channels, which makes the mean channel variance 1 ("global"), or one each, which
            makes every variance 1 ("channel": for patch-pca, whose channels are uncorrelated, that whitens).
        mirrored: encode the mirror image of each training image, too.
        shard_size: images a shard.
        batch_size: images at once; no byte depends on it.
        skip_broken: leave out images that cannot be decoded, named in skipped.json, instead of stopping at the first.
        upscale: enlarge images that are smaller than the crop, instead of stopping at the first.
    """
    files.choose("representation", representation, dict.fromkeys(OFFLINE))
    files.choose("normalisation", normalise, dict.fromkeys(NORMALISATIONS))
    for name, value in (("shard_size", shard_size), ("batch_size", batch_size)):
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    if representation == "pixels" and (stride, channels) != (None, None):
        raise ValueError(f"pixels have stride 1 and keep all channels, got stride {stride} and channels {channels}")
    opened = open_source(source, image_size, upscale) if isinstance(source, str) else source
    root = Path(opened.spec.removeprefix("folder:"))
    if opened.spec.startswith("folder:") and opened.class_names and out.resolve().is_relative_to(root.resolve()):
        raise ValueError(f"{out} lies in {root}, whose folders are classes; latents go into a folder elsewhere")
    held_out_indices(opened.labels(), num_held_out)  # a number that is too large is refused before anything is written
    settings = {
        "source": opened.spec,
        "source_fingerprint": opened.fingerprint,
        "image_shape": list(opened.image_shape),
        "representation": representation,
        "stride": (4 if stride is None else stride) if representation == "patch-pca" else 1,
        "channels": channels,
        "num_held_out": num_held_out,
        "normalise": normalise,
        "mirrored": mirrored,
        "shard_size": shard_size,
        "skip_broken": skip_broken,
        "upscale": upscale,
    }
    existed, begun = out.exists(), claim(out, settings)
    with files.locked(out / "encoding.json"):  # outside of what clears up: another process's work is not ours to remove
        try:
            fill(out, opened, settings, batch_size)
        except ValueError as error:  # bad input, met by another setting or another source: what is there is no use
            if isinstance(error, BrokenImage) and any(out.glob("*/*.safetensors")):
                raise
            made = ("train", "held-out", "representation", "skipped.json", "encoding.json")
            for path in [out / name for name in made] if existed else [out]:
                if begun:
                    files.remove(path)
            raise


def fill(out: Path, opened: Source, settings: dict[str, Any], batch_size: int) -> None:
    """Write what is missing of the encoding that `settings` describe."""
    representation, normalise, mirrored = settings["representation"], settings["normalise"], settings["mirrored"]
    stride, channels, shard_size = settings["stride"], settings["channels"], settings["shard_size"]
    for folder in (out, out / "representation"):
        files.remove_temporaries(folder)
    parts = split_indices(opened, settings, out)
    if not parts["train"]:
        raise ValueError(f"{opened.spec} leaves 0 of {len(opened)} images to train on")
    training = parts["train"]
    encoder = make_representation(representation, Subset(opened, training), out, stride, channels, batch_size)

    affine: Affine | None = None
    _, height, width = opened.image_shape
    for split, indices in parts.items():
        if not indices:
            continue
        folder, images = out / split, Subset(opened, indices)
        folder.mkdir(parents=True, exist_ok=True)
        files.remove_temporaries(folder)
        both = mirrored and split == "train"
        shards = write_shards(encoder, images, folder, shard_size, batch_size, both)
        if (folder / MANIFEST).is_file():
            affine = read_manifest(folder).affine
            continue
        mean, variance = raw_statistics(folder, shards)
        if affine is None:
            affine = fit_affine(mean, variance, normalise)
        scale = torch.tensor(affine.scale, dtype=torch.float64)
        Manifest(
            split=split,
            num_images=len(images),
            shard_size=shard_size,
            shape=(encoder.channels, height // encoder.stride, width // encoder.stride),
            class_names=opened.class_names,
            source={**{key: settings[key] for key in ("source", "source_fingerprint", "image_shape")},
                    "images": files.fingerprint(indices)},
            representation=encoder.name,
            representation_fingerprint=encoder.fingerprint,
            affine=affine,
            mean=tuple(((mean - torch.tensor(affine.shift, dtype=torch.float64)) * scale).tolist()),
            variance=tuple((variance * scale**2).tolist()),
            mirrored=both,
            shards=tuple(shards),
        ).write(folder)  # fmt: skip


def split_indices(source: Source, settings: dict[str, Any], folder: Path) -> dict[str, list[int]]:
    """Return which images of a source make up each split, in order, without the broken ones if they are skipped."""
    held_out = held_out_indices(source.labels(), int(settings["num_held_out"]))
    broken = broken_images(source, folder / "skipped.json") if settings["skip_broken"] else []
    training = np.setdiff1d(np.arange(len(source)), held_out)
    return {"train": np.setdiff1d(training, broken).tolist(), "held-out": np.setdiff1d(held_out, broken).tolist()}


def claim(out: Path, settings: dict[str, Any]) -> bool:
    """Make `out` this encoding's folder, or check that it is; anything else in it is a ValueError.

    Returns whether the encoding begins here.
    """
    if out.exists() and not out.is_dir():
        raise ValueError(f"{out} is a file; a folder for latents is wanted")
    path = out / "encoding.json"
    if path.is_file():
        found = read_settings(out)
        # the fingerprint tells sources apart, wherever they lie; and skipping may begin at any time, but not end
        free = ("source", "skip_broken") if settings["skip_broken"] else ("source",)
        differing = [name for name in settings if name not in free and found.get(name) != settings[name]]
        if differing:
            listed = "; ".join(f"{name} is {found.get(name)} there and {settings[name]} here" for name in differing)
            raise ValueError(f"{out} holds latents made with other settings: {listed}")
        if found != settings:
            files.write_json(path, settings)
        return False
    if files.names(out):
        raise ValueError(f"{out} is not empty and holds no encoding.json; latents go into a folder of their own")
    files.write_json(path, settings)
    return True


def read_settings(out: Path) -> dict[str, Any]:
    """Read encoding.json; an entry that is missing is None."""
    found = files.read_json(out / "encoding.json")
    if not isinstance(found, dict):
        raise ValueError(f"{out / 'encoding.json'} holds {found!r:.40}, the settings of an encoding are wanted")
    return found


def broken_images(source: Source, path: Path) -> list[int]:
    """Return the indices of the images that cannot be decoded, which the file `path` names, or will name."""
    if not path.is_file():
        reasons = {}
        for index in tqdm(range(len(source)), desc="looking for broken images", unit="image", disable=None):
            try:
                source[index]
            except BrokenImage as error:
                reasons[str(index)] = str(error)
        if len(reasons) == len(source):
            raise ValueError(f"all {len(source)} images cannot be decoded")
        files.write_json(path, reasons)
    return sorted(int(index) for index in files.read_json(path))


def make_representation(
    name: str, training: Source, out: Path, stride: int, channels: int | None, batch_size: int
) -> Representation:
    """Return the representation of an encoding: what an interrupted one has saved, or a new one fitted and saved."""
    folder = out / "representation"
    if (folder / "representation.json").is_file():
        return load_representation(folder)
    made: Representation
    if name == "pixels":
        made = Pixels(training.image_shape[0])
    else:
        batches = read_batches(training, 0, len(training), batch_size)
        progress = tqdm(batches, desc="fitting patch PCA", total=-(-len(training) // batch_size), disable=None)
        made = fit_patch_pca((images for images, _ in progress), stride, channels)
    made.save(folder)
    return load_representation(folder)


def read_batches(
    source: Source, start: int, stop: int, batch_size: int
) -> Iterator[tuple[UInt8[Tensor, "b c h w"], Tensor]]:
    """Yield images and labels of source[start:stop] in batches, decoding in threads."""
    try:
        with ThreadPoolExecutor() as pool:
            for first in range(start, stop, batch_size):
                with quiet():
                    pairs = list(pool.map(source.__getitem__, range(first, min(first + batch_size, stop))))
                yield image_batch(image for image, _ in pairs), torch.tensor([label for _, label in pairs])
    except BrokenImage as error:
        raise BrokenImage(f"{error} (skip_broken leaves such images out)") from None


def write_shards(
    representation: Representation, images: Source, folder: Path, shard_size: int, batch_size: int, mirrored: bool
) -> list[tuple[str, int, str]]:
    """Write the shards that are missing or damaged; return (file, num_images, sha256) of all."""
    shards = []
    progress = tqdm(total=len(images), desc=f"encoding {folder.name}", unit="image", disable=None)
    for k, start in enumerate(range(0, len(images), shard_size)):
        stop, path = min(start + shard_size, len(images)), folder / shard_name(k)
        digest = path.with_suffix(".sha256")
        if not (path.is_file() and digest.is_file() and files.sha256(path) == digest.read_text().strip()):
            parts: dict[str, list[Tensor]] = {"latents": [], "labels": []}
            if mirrored:
                parts["mirrored"] = []
            for batch, labels in read_batches(images, start, stop, batch_size):
                parts["latents"].append(to_half(representation.encode(batch), folder))
                parts["labels"].append(labels)
                if mirrored:
                    parts["mirrored"].append(to_half(representation.encode(batch.flip(3)), folder))
                progress.update(len(batch))
            data = save({name: torch.cat(tensors).contiguous() for name, tensors in parts.items()})
            files.write_bytes(path, data)
            files.write_bytes(digest, f"{hashlib.sha256(data).hexdigest()}\n".encode())
        else:
            progress.update(stop - start)
        shards.append((path.name, stop - start, digest.read_text().strip()))
    progress.close()
    return shards


def to_half(raw: Tensor, folder: Path) -> Tensor:
    """Round to 16 bits; what does not fit, or is not finite, is a ValueError."""
    half = raw.half()
    if not torch.isfinite(half).all():
        raise ValueError(f"{folder}: raw latents reach {raw.abs().max().item():.3g}, float16 holds up to 65504")
    return half


def raw_statistics(folder: Path, shards: list[tuple[str, int, str]]) -> tuple[Tensor, Tensor]:
    """Measure mean and variance by channel of the raw latents as stored, in float64."""
    total, square, count = torch.zeros(()), torch.zeros(()), 0
    for name, _, _ in shards:
        latents = load_file(folder / name)["latents"]
        for part in latents.split(512):
            values = part.double()
            total, square = total + values.sum((0, 2, 3)), square + values.square().sum((0, 2, 3))
            count += values[:, 0].numel()
    mean = total / count
    return mean, (square / count - mean**2).clamp(min=0)


def fit_affine(mean: Tensor, variance: Tensor, normalise: str) -> Affine:
    """Return the affine that makes channel means 0 and their mean variance, or every variance, 1."""
    least, typical = variance.min().item(), variance.mean().item()
    if typical < 1e-10:
        raise ValueError(f"the latents' channel variance is {typical:.3g}: all images are the same")
    if normalise == "channel" and least < 1e-9 * typical:
        raise ValueError(
            f"a channel's variance is {least:.3g} where the mean is {typical:.3g}, scaled to 1 it would be noise; "
            f"keep the first {int((variance > 1e-9 * typical).sum())} channels, or normalise by one scale for all"
        )
    used = variance if normalise == "channel" else variance.mean().expand_as(variance)
    return Affine(tuple(mean.tolist()), tuple(used.rsqrt().tolist()))


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
