"""Latents on disk: safetensors shards and a manifest, memory-mapped and gathered by whole batches.

    LATENTS/representation/                  see jlt.data.representations
    LATENTS/train/manifest.json              the contract below
    LATENTS/train/shard-00000.safetensors    `latents` (n, c, h, w) float16, the representation's raw output;
                                             `labels` (n,) int64; `mirrored`, latents of the mirrored images, if wanted
    LATENTS/train/shard-00000.json           what it holds, for whoever writes (jlt.data.writing)
    LATENTS/held-out/...                     likewise

Shard k holds images k * shard_size to (k + 1) * shard_size of the split's ordered source, whatever made it. The affine
is stated in the manifest and applied once, on load: normalised = (raw - shift) * scale, per channel.
"""

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from safetensors import SafetensorError, safe_open
from torch import Tensor

from jlt import files
from jlt.data.representations import load_representation

FORMAT_VERSION = 1
MANIFEST = "manifest.json"
SPLITS = ("train", "held-out")
# A split's measured mean and variance by channel may differ from the promised ones by this much of a standard
# deviation, and by this factor: wide enough for a few hundred images, far too narrow for forgotten normalisation.
MEAN_BOUND, VARIANCE_BOUND = 0.5, 2.0
CHECKED_VALUES = 2**24  # read on opening for that; a split of fewer values is checked whole


@dataclass(frozen=True)
class Affine:
    """Per-channel normalisation: normalised = (raw - shift) * scale."""

    shift: tuple[float, ...]
    scale: tuple[float, ...]

    @classmethod
    def stated(cls, sides: Any) -> "Affine":
        """Return the affine that a file states; TypeError, KeyError or ValueError where it states none."""
        return cls(*(tuple(map(float, sides[key])) for key in ("shift", "scale")))

    @property
    def is_identity(self) -> bool:
        return not any(self.shift) and all(value == 1 for value in self.scale)

    def normalise(self, raw: Float[Tensor, "b c h w"], out: Tensor | None = None) -> Float[Tensor, "b c h w"]:
        shift, scale = self._tensors(raw)
        if self.is_identity:
            return raw
        z = torch.sub(raw, shift, out=out)
        return torch.mul(z, scale, out=z)

    def restore(self, z: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
        shift, scale = self._tensors(z)
        return z / scale + shift

    def _tensors(self, like: Tensor) -> tuple[Tensor, Tensor]:
        if like.shape[1] != len(self.shift):
            raise ValueError(f"the affine has {len(self.shift)} channels, the latents have {like.shape[1]}")
        shift, scale = (torch.tensor(side, dtype=like.dtype, device=like.device) for side in (self.shift, self.scale))
        return shift[:, None, None], scale[:, None, None]


@dataclass(frozen=True)
class Manifest:
    """What a split promises; `shards` are (file, num_images, sha256) in order."""

    split: str
    num_images: int
    shard_size: int
    shape: tuple[int, int, int]
    class_names: tuple[str, ...] | None
    source: dict[str, Any]
    representation: str
    representation_fingerprint: str
    affine: Affine
    mean: tuple[float, ...]
    variance: tuple[float, ...]
    mirrored: bool
    shards: tuple[tuple[str, int, str], ...]
    dtype: str = "float16"
    format_version: int = FORMAT_VERSION

    @property
    def images(self) -> str:
        """What identifies the split's images, however they are encoded."""
        return f"{self.source['source_fingerprint']} {self.source['images']}"

    def write(self, folder: Path) -> None:
        files.write_json(folder / MANIFEST, dataclasses.asdict(self))


def read_manifest(folder: Path) -> Manifest:
    """Read a split's manifest; another version, missing keys, or impossible counts are a ValueError."""
    path = folder / MANIFEST
    if not path.is_file():
        raise ValueError(f"{path} does not exist; it is the last file that encoding writes")
    data = files.read_json(path)
    version = data.get("format_version") if isinstance(data, dict) else None
    if version != FORMAT_VERSION:
        raise ValueError(f"{path} is of format version {version}, this jlt reads {FORMAT_VERSION}")
    wanted, found = {field.name for field in dataclasses.fields(Manifest)}, set(data)
    if wanted - found:
        raise ValueError(f"{path} lacks {', '.join(sorted(wanted - found))}")
    if found - wanted:
        raise ValueError(f"{path} holds unknown {', '.join(sorted(found - wanted))}")
    try:
        if len(data["shape"]) != 3:
            raise ValueError(f"shape must be three numbers, got {data['shape']}")
        if not isinstance(data["mirrored"], bool):
            raise ValueError(f"mirrored must be true or false, got {data['mirrored']!r}")
        manifest = Manifest(
            **{
                **data,
                **{key: str(data[key]) for key in ("split", "representation", "representation_fingerprint", "dtype")},
                "source": dict(data["source"]),
                "num_images": int(data["num_images"]),
                "shard_size": int(data["shard_size"]),
                "shape": tuple(int(n) for n in data["shape"]),
                "class_names": None if data["class_names"] is None else tuple(map(str, data["class_names"])),
                "affine": Affine.stated(data["affine"]),
                "mean": tuple(map(float, data["mean"])),
                "variance": tuple(map(float, data["variance"])),
                "shards": tuple((str(file), int(count), str(sha)) for file, count, sha in data["shards"]),
            }
        )
    except (TypeError, KeyError, AttributeError, ValueError, OverflowError) as error:
        raise ValueError(f"{path} has a malformed entry: {error}") from None
    check_manifest(manifest, path)
    if manifest.split != folder.name:
        raise ValueError(f"{path} is of the split {manifest.split!r}, its folder is {folder.name!r}")
    return manifest


def check_manifest(manifest: Manifest, path: Path) -> None:
    """Raise a ValueError where the manifest contradicts itself."""
    channels = manifest.shape[0]
    if min(manifest.shape) < 1 or max(manifest.shape) > 2**16:
        raise ValueError(f"{path}: shape must be in [1, 65536], got {list(manifest.shape)}")
    if manifest.dtype != "float16":
        raise ValueError(f"{path}: dtype is {manifest.dtype!r}, this jlt reads float16")
    for name, values in (
        ("affine shift", manifest.affine.shift),
        ("affine scale", manifest.affine.scale),
        ("mean", manifest.mean),
        ("variance", manifest.variance),
    ):
        if len(values) != channels:
            raise ValueError(f"{path}: {name} has {len(values)} entries, the latents have {channels} channels")
        if not all(math.isfinite(value) for value in values):
            raise ValueError(f"{path}: {name} must be finite, got {values[:4]}...")
    if min(manifest.variance) < 0:
        raise ValueError(f"{path}: variance must be at least 0, got {min(manifest.variance)}")
    if min(manifest.affine.scale) <= 0:
        raise ValueError(f"{path}: affine scale must be above 0, got {min(manifest.affine.scale)}")
    if manifest.num_images < 1 or manifest.shard_size < 1:
        raise ValueError(
            f"{path}: num_images and shard_size must be at least 1, got {manifest.num_images} and {manifest.shard_size}"
        )
    counts, full = [count for _, count, _ in manifest.shards], manifest.shard_size
    expected = [
        min(full, manifest.num_images - start) for start in range(0, min(manifest.num_images, full * 10**6), full)
    ]
    if counts != expected:
        raise ValueError(
            f"{path}: {manifest.num_images} images in shards of {full} make {len(expected)} shards, "
            f"it lists {len(counts)} with {sum(counts)} images"
        )
    names = [file for file, _, _ in manifest.shards]
    if names != [shard_name(k) for k in range(len(names))]:
        raise ValueError(f"{path}: shards must be named {shard_name(0)}, ..., got {names[0]!r}, ...")


def shard_name(k: int) -> str:
    return f"shard-{k:05d}.safetensors"


class Latents:
    """A split's latents: `gather(indices)` returns a normalised batch, `labels` are in memory, latents stay on disk."""

    def __init__(self, folder: Path, manifest: Manifest, verify: bool = False) -> None:
        self.folder, self.manifest = folder, manifest
        check_files(folder, manifest)
        shards = [open_shard(folder, manifest, k, verify) for k in range(len(manifest.shards))]
        self.shards = [shard["latents"] for shard in shards]
        self.mirrored = [shard["mirrored"] for shard in shards] if manifest.mirrored else None
        self.labels: Int[Tensor, " n"] = torch.cat([shard["labels"] for shard in shards])
        low, high = int(self.labels.min()), int(self.labels.max())
        bounds = (0, self.num_classes - 1) if manifest.class_names is not None else (-1, -1)
        if low < bounds[0] or high > bounds[1]:
            raise ValueError(f"{folder}: labels are {low} to {high}, the manifest allows {bounds[0]} to {bounds[1]}")
        if manifest.class_names is None:
            self.labels = torch.zeros_like(self.labels)
        self.check_statistics()

    def __len__(self) -> int:
        return self.manifest.num_images

    @property
    def shape(self) -> tuple[int, int, int]:
        """(channels, height, width) of one latent."""
        return self.manifest.shape

    @property
    def num_classes(self) -> int:
        """The number of classes; 0 where images have no labels."""
        return len(self.manifest.class_names or ())

    def gather(
        self,
        indices: Int[Tensor, " b"] | Sequence[int],
        mirrored: Bool[Tensor, " b"] | None = None,
        out: Float[Tensor, "b c h w"] | None = None,
    ) -> Float[Tensor, "b c h w"]:
        """Return the normalised latents of these images, those of the mirrored images where `mirrored` is true.

        Each is copied once, from the mapped file into `out` (float32; a new tensor without it), and normalised there.
        """
        index = torch.as_tensor(indices, dtype=torch.int64)
        if len(index) and not 0 <= int(index.min()) <= int(index.max()) < len(self):
            raise ValueError(f"indices are {int(index.min())} to {int(index.max())}, there are {len(self)} latents")
        flips = [False] * len(index) if mirrored is None else mirrored.tolist()
        if any(flips) and self.mirrored is None:
            raise ValueError(f"{self.folder} holds no mirrored latents; encode with --mirrored")
        z = torch.empty(len(index), *self.shape) if out is None else out
        for row, i, flip in zip(z, index.tolist(), flips, strict=True):
            tensors = self.mirrored if flip and self.mirrored else self.shards
            row.copy_(tensors[i // self.manifest.shard_size][i % self.manifest.shard_size])
        return self.manifest.affine.normalise(z, z)

    def statistics(self) -> tuple[Float[Tensor, " c"], Float[Tensor, " c"]]:
        """Measure mean and variance by channel over all normalised latents, in float64; all must be finite."""
        total, square = torch.zeros(2, self.shape[0], dtype=torch.float64)
        for indices in torch.arange(len(self)).split(512):
            z = self.gather(indices).double()
            self.check_finite(z, indices)
            total, square = total + z.sum((0, 2, 3)), square + z.square().sum((0, 2, 3))
        mean = total / (len(self) * math.prod(self.shape[1:]))
        return mean, square / (len(self) * math.prod(self.shape[1:])) - mean**2

    def check_finite(self, z: Float[Tensor, "b c h w"], indices: Int[Tensor, " b"]) -> None:
        if not torch.isfinite(z).all():
            bad = int(indices[(~torch.isfinite(z)).flatten(1).any(1)][0])
            raise ValueError(f"{self.folder}: the latents of image {bad} are not finite")

    def check_statistics(self) -> None:
        """Compare the latents' mean and variance by channel with the manifest's, on images spread over the split.

        As many images as hold CHECKED_VALUES, at least 256. Raises a ValueError where latents are not finite, or off by
        more than MEAN_BOUND and VARIANCE_BOUND.
        """
        count = min(len(self), max(256, CHECKED_VALUES // math.prod(self.shape)))
        spread = torch.arange(count) * len(self) // count
        z = self.gather(spread).double()
        self.check_finite(z, spread)
        # held-out images all alike have no variance, but for rounding
        promised = torch.tensor(self.manifest.variance, dtype=torch.float64).mean().clamp(min=1e-6)
        mean, variance = z.mean((0, 2, 3)), z.var((0, 2, 3), correction=0).mean().clamp(min=1e-6)
        off = (mean - torch.tensor(self.manifest.mean, dtype=torch.float64)).abs().max() / promised.sqrt()
        if not (off <= MEAN_BOUND and 1 / VARIANCE_BOUND < variance / promised < VARIANCE_BOUND):
            raise ValueError(
                f"{self.folder}: latents have channel variance {variance:.3g} and a mean {off:.2g} deviations off, "
                f"the manifest promises variance {promised:.3g}"
            )


def check_files(folder: Path, manifest: Manifest) -> None:
    """Raise a ValueError for a missing or a surplus shard."""
    promised = {file for file, _, _ in manifest.shards}
    present = {path.name for path in folder.glob("shard-*.safetensors")}
    if promised - present:
        raise ValueError(f"{folder} lacks {min(promised - present)}; the manifest lists {len(promised)} shards")
    if present - promised:
        raise ValueError(f"{folder} holds {min(present - promised)}; the manifest lists only {len(promised)} shards")


def open_shard(folder: Path, manifest: Manifest, k: int, verify: bool) -> dict[str, Tensor]:
    """Map a shard into memory after checking its names, shapes and types (and its hash, if asked)."""
    name, count, promised = manifest.shards[k]
    path = folder / name
    if verify and (found := files.sha256(path)) != promised:
        raise ValueError(f"{path} has SHA-256 {found[:16]}..., the manifest promises {promised[:16]}...")
    shape = [count, *manifest.shape]
    wanted = {"latents": (torch.float16, shape), "labels": (torch.int64, [count])}
    if manifest.mirrored:
        wanted["mirrored"] = (torch.float16, shape)
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} is not a whole safetensors file: {error}") from None
    if tensors.keys() != wanted.keys():
        raise ValueError(f"{path} holds {sorted(tensors)}, the manifest promises {sorted(wanted)}")
    for key, (dtype, expected) in wanted.items():
        if tensors[key].dtype != dtype or list(tensors[key].shape) != expected:
            found_as = f"{tensors[key].dtype} {list(tensors[key].shape)}"
            raise ValueError(f"{path}: {key} is {found_as}, the manifest promises {dtype} {expected}")
    return tensors


def splits(folder: Path) -> list[str]:
    """Return the names of the splits in a folder of latents."""
    if not folder.is_dir():
        raise ValueError(f"{folder} is {'a file' if folder.exists() else 'not there'}; a folder of latents is wanted")
    found = [split for split in SPLITS if (folder / split).is_dir()]
    if not found:
        raise ValueError(f"{folder} holds neither of {' and '.join(SPLITS)}; a folder of latents is wanted")
    return found


def open_latents(folder: Path, split: str = "train", verify: bool = False) -> Latents:
    """Open a split of a folder made by `encode`, beside the representation that made it.

    `verify` checks every shard's hash.
    """
    files.choose("split", split, dict.fromkeys(splits(folder)))
    manifest, representation = read_manifest(folder / split), load_representation(folder / "representation")
    if representation.fingerprint != manifest.representation_fingerprint:
        raise ValueError(
            f"{folder / 'representation'} has fingerprint {representation.fingerprint}, "
            f"the latents beside it were made with {manifest.representation_fingerprint}"
        )
    return Latents(folder / split, manifest, verify)
