"""The latents that the authors of JLT train on, turned into ours.

Theirs is a folder of safetensors files, latents_rank00_shard000.safetensors and so on, read in the order of their
names: `latents` (n, c, h, w) and `latents_flip`, those of the mirrored images, in 16 bits and already normalised, and
`labels` (n,). Ours is jlt.data.shards, with an affine that changes nothing. A stopped import goes on when it is started
again, as an encoding does: shards whose bytes are those of the hash beside them are kept, the manifests come last.
"""

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, groupby
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from safetensors import SafetensorError, safe_open
from torch import Tensor
from tqdm import tqdm

from jlt import files
from jlt.data.batches import cut
from jlt.data.classes import name_classes, usual_names
from jlt.data.representations import Representation, load_representation
from jlt.data.shards import MEAN_BOUND, VARIANCE_BOUND
from jlt.data.sources import held_out_indices
from jlt.data.writing import identity, read_summaries, read_summary, write_manifest, write_shard

KEYS = ("latents", "latents_flip", "labels")
DTYPES = ("F16", "BF16")  # as safetensors names them
CHECKED = 1024  # images looked at before anything is written, spread over all files


@dataclass(frozen=True)
class Theirs:
    """The authors' files: paths, the index of each one's first image (and of the end), shape of a latent, labels."""

    paths: tuple[Path, ...]
    starts: tuple[int, ...]
    shape: tuple[int, int, int]
    labels: Int[Tensor, " n"]

    def read(self, key: str, indices: Sequence[int]) -> Float[Tensor, "n c h w"]:
        """Return the latents of these images, by rising index, in float16; what is not finite there is a ValueError."""
        parts: list[Tensor] = []
        for k, mine in groupby(indices, lambda index: bisect_right(self.starts, index) - 1):
            with open_shard(self.paths[k]) as file:
                stored = file.get_slice(key)
                rows = [index - self.starts[k] for index in mine]
                for _, pairs in groupby(enumerate(rows), lambda pair: pair[1] - pair[0]):  # rows that follow each other
                    run = [row for _, row in pairs]
                    half = stored[run[0] : run[-1] + 1].half()
                    if not (finite := torch.isfinite(half).flatten(1).all(1)).all():
                        bad = run[int((~finite).nonzero()[0])]
                        raise ValueError(f"{self.paths[k]}: {key} of image {bad} are not finite, or above float16")
                    parts.append(half)
        return torch.cat(parts)


def import_latents(
    folder: Path,
    out: Path,
    class_names: Sequence[str] | None,
    representation: Representation,
    num_held_out: int = 0,
    shard_size: int = 4096,
) -> None:
    """Turn the authors' latents into a folder of ours; the same call again continues a stopped import.

    Args:
        folder: their files.
        out: folder for ours; it must be new, empty, or of this very import.
        class_names: names by label; without them, of 1,000 classes ImageNet's, else "0", "1", ...
        representation: what decodes the latents, as they are after normalisation.
        num_held_out: images set apart, evenly over the classes.
        shard_size: images a shard; two shards' latents of so many are held in memory.
    """
    if shard_size < 1:
        raise ValueError(f"shard_size must be at least 1, got {shard_size}")
    theirs = open_theirs(folder)
    if class_names is None:
        class_names = usual_names(int(theirs.labels.max()) + 1)
    names = name_classes(theirs.labels.numpy(), class_names, str(folder))
    if names is None:
        raise ValueError(f"{folder}: all labels are -1; the authors' files have classes")
    if theirs.shape[0] != representation.channels:
        raise ValueError(
            f"{folder} holds latents of {theirs.shape[0]} channels, {representation.name} has {representation.channels}"
        )
    held_out = held_out_indices(theirs.labels.numpy(), num_held_out)
    check_normalised(theirs, folder)
    listing = [[path.name, path.stat().st_size] for path in theirs.paths]
    settings: dict[str, Any] = {
        "source": f"authors-latents:{folder.absolute()}",
        "source_fingerprint": files.fingerprint([listing, theirs.labels.tolist()]),
        "class_names": list(names),
        "representation": representation.name,
        "representation_fingerprint": representation.fingerprint,
        "num_held_out": num_held_out,
        "shard_size": shard_size,
    }
    files.claim(out, "encoding.json", settings, "latents", free=("source",))  # the fingerprint tells sources apart
    with files.locked(out / "encoding.json"):
        for part in (out, out / "representation"):
            files.remove_temporaries(part)
        if not (out / "representation" / "representation.json").is_file():
            representation.save(out / "representation")
        if (found := load_representation(out / "representation").fingerprint) != representation.fingerprint:
            raise ValueError(f"{out} holds the representation {found}, {representation.fingerprint} is wanted")
        apart = set(held_out.tolist())
        training = [index for index in range(len(theirs.labels)) if index not in apart]
        for split, indices in {"train": training, "held-out": held_out.tolist()}.items():
            if indices:
                write_split(theirs, out / split, indices, settings, representation, names)


def open_theirs(folder: Path) -> Theirs:
    """Read the headers and labels of the authors' files; those that do not fit together are a ValueError."""
    if not folder.is_dir():
        raise ValueError(f"{folder} is {'a file' if folder.exists() else 'not there'}; a folder of latents is wanted")
    paths = sorted(path for path in folder.glob("*.safetensors") if not path.name.startswith("."))
    if not paths:
        raise ValueError(f"{folder} holds no *.safetensors file")
    shapes: list[tuple[int, int, int]] = []
    labels: list[Tensor] = []
    for path in paths:
        with open_shard(path) as file:
            if missing := [key for key in KEYS if key not in file.keys()]:  # noqa: SIM118
                raise ValueError(f"{path} lacks {', '.join(missing)}; it holds {', '.join(sorted(file.keys()))}")
            found = {key: file.get_slice(key) for key in KEYS}
            shape, flipped, count = (list(found[key].get_shape()) for key in KEYS)
            if len(shape) != 4 or flipped != shape or count != shape[:1] or min(shape) < 1:
                raise ValueError(f"{path}: latents are {shape}, latents_flip {flipped} and labels {count}")
            if shapes and shape[1:] != list(shapes[0]):
                raise ValueError(f"{path} holds latents of {shape[1:]}, {paths[0].name} of {list(shapes[0])}")
            for key in KEYS[:2]:
                if (dtype := found[key].get_dtype()) not in DTYPES:
                    raise ValueError(f"{path}: {key} are {dtype}, {' or '.join(DTYPES)} is wanted")
            values = file.get_tensor("labels")
            if values.is_floating_point() or values.is_complex() or values.dtype == torch.bool:
                raise ValueError(f"{path}: labels are {values.dtype}, whole numbers are wanted")
            shapes.append((shape[1], shape[2], shape[3]))
            labels.append(values.long())
    starts = accumulate((len(part) for part in labels), initial=0)
    return Theirs(tuple(paths), tuple(starts), shapes[0], torch.cat(labels))


def open_shard(path: Path) -> Any:
    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} is not a whole safetensors file: {error}") from None


def check_normalised(theirs: Theirs, folder: Path) -> None:
    """Raise a ValueError where channel variances are on average far from 1, or a mean is far from 0."""
    count = min(CHECKED, len(theirs.labels))
    indices = [k * len(theirs.labels) // count for k in range(count)]
    for key in KEYS[:2]:
        z = theirs.read(key, indices).double()
        mean, variance = z.mean((0, 2, 3)).abs().max().item(), z.var((0, 2, 3), correction=0).mean().item()
        if not (1 / VARIANCE_BOUND < variance < VARIANCE_BOUND and mean < MEAN_BOUND):
            raise ValueError(
                f"{folder}: {key} have channel variance {variance:.3g} and a channel mean of {mean:.2g}, normalised "
                f"ones 1 (within a factor of {VARIANCE_BOUND:g}) and 0 (within {MEAN_BOUND:g})"
            )


def write_split(
    theirs: Theirs,
    folder: Path,
    indices: Sequence[int],
    settings: dict[str, Any],
    representation: Representation,
    class_names: tuple[str, ...],
) -> None:
    """Write the shards of a split that are missing or damaged, and its manifest."""
    folder.mkdir(parents=True, exist_ok=True)
    files.remove_temporaries(folder)
    size, both = int(settings["shard_size"]), folder.name == "train"
    spans = cut(0, len(indices), size)
    for k, span in enumerate(tqdm(spans, desc=f"importing {folder.name}", disable=None)):
        if read_summary(folder, k) is None:
            mine = indices[span.start : span.stop]
            tensors = {"latents": theirs.read("latents", mine), "labels": theirs.labels[list(mine)]}
            if both:
                tensors["mirrored"] = theirs.read("latents_flip", mine)
            write_shard(folder, k, tensors)
    source = {key: settings[key] for key in ("source", "source_fingerprint")}
    source |= {"images": files.fingerprint(list(indices))}
    summaries = read_summaries(folder, len(spans))
    affine = identity(theirs.shape[0])
    write_manifest(folder, summaries, theirs.shape, size, class_names, source, representation, affine, both)
