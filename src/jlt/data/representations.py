"""Representations: images to latents and back. Each has channels, a stride, and a fingerprint of all that matters.

`encode` gives the raw output, which shards store; the affine that normalises it belongs to them (jlt.data.shards), but
for an autoencoder's own statement, which its encode and decode hold (jlt.data.autoencoders). On disk a representation
is a folder with representation.json and, if it has any, tensors.safetensors. To add one, write a class with these
methods and give it a row in REPRESENTATIONS.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Float, UInt8
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from jlt import files

FORMAT_VERSION = 1


@runtime_checkable
class Representation(Protocol):
    """Turns images into latents of `channels` at 1/`stride` of their size, and back."""

    @property
    def name(self) -> str: ...

    @property
    def image_channels(self) -> int: ...

    @property
    def channels(self) -> int: ...

    @property
    def stride(self) -> int: ...

    @property
    def normalisation(self) -> str:
        """What its latents want before training: "none" (they are normalised), "global" or "channel"."""

    @property
    def fingerprint(self) -> str: ...

    def encode(self, images: UInt8[Tensor, "b c h w"]) -> Float[Tensor, "b k y x"]:
        """Return the raw latents, float32."""

    def decode(self, latents: Float[Tensor, "b k y x"]) -> UInt8[Tensor, "b c h w"]:
        """Return images from raw latents, rounded to 8 bits."""

    def save(self, folder: Path) -> None:
        """Write representation.json and tensors.safetensors into `folder`, which may exist."""


def to_float(images: UInt8[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
    """Map 0..255 to [-1, 1]."""
    return images.float() / 127.5 - 1


def to_uint8(pixels: Float[Tensor, "b c h w"]) -> UInt8[Tensor, "b c h w"]:
    """Map [-1, 1] to 0..255: clamped and rounded, never truncated."""
    return ((pixels + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)


@dataclass(frozen=True)
class Pixels:
    """The pixels themselves, in [-1, 1]."""

    image_channels: int
    name: str = "pixels"
    stride: int = 1
    normalisation: str = "global"

    @property
    def channels(self) -> int:
        return self.image_channels

    @property
    def fingerprint(self) -> str:
        return files.fingerprint([self.name, self.image_channels])

    def encode(self, images: UInt8[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
        return to_float(images)

    def decode(self, latents: Float[Tensor, "b c h w"]) -> UInt8[Tensor, "b c h w"]:
        return to_uint8(latents)

    def save(self, folder: Path) -> None:
        save_parts(folder, {"name": self.name, "image_channels": self.image_channels}, {})


@dataclass(frozen=True, eq=False)
class PatchPCA:
    """The principal components of stride x stride patches: linear, orthonormal, sorted by falling variance.

    `mean` (p p c,), `basis` (p p c, channels) with orthonormal columns, `eigenvalues` (channels,) of the fitted
    patches' covariance, in pixels of [-1, 1]. Channels are uncorrelated over the images it was fitted to, so scaling
    each to variance 1 whitens them. With all channels kept it loses nothing but rounding.
    """

    image_channels: int
    stride: int
    mean: Float[Tensor, " d"]
    basis: Float[Tensor, "d k"]
    eigenvalues: Float[Tensor, " k"]
    name: str = "patch-pca"
    normalisation: str = "global"

    @property
    def channels(self) -> int:
        return self.basis.shape[1]

    @property
    def tensors(self) -> dict[str, Tensor]:
        return {"mean": self.mean, "basis": self.basis, "eigenvalues": self.eigenvalues}

    @property
    def fingerprint(self) -> str:
        values = {name: tensor.double().tolist() for name, tensor in self.tensors.items()}
        return files.fingerprint([self.name, self.image_channels, self.stride, values])

    def encode(self, images: UInt8[Tensor, "b c h w"]) -> Float[Tensor, "b k y x"]:
        # in float64 a product's rounding, which varies with the batch size, stays far below the 16 bits stored
        exact = images.cpu() if images.device.type == "mps" else images  # which has no float64
        patches = cut_patches(to_float(exact), self.stride).double()
        latents = (patches - self.mean.to(patches)) @ self.basis.to(patches)
        return latents.float().permute(0, 3, 1, 2).to(images.device)

    def decode(self, latents: Float[Tensor, "b k y x"]) -> UInt8[Tensor, "b c h w"]:
        patches = latents.permute(0, 2, 3, 1) @ self.basis.T.to(latents.device) + self.mean.to(latents.device)
        return to_uint8(join_patches(patches, self.stride))

    def save(self, folder: Path) -> None:
        header = {"name": self.name, "image_channels": self.image_channels, "stride": self.stride}
        save_parts(folder, header, self.tensors)


def cut_patches(pixels: Float[Tensor, "b c h w"], stride: int) -> Float[Tensor, "b y x d"]:
    """Cut images into patches, each flattened in (channel, row, column) order."""
    if pixels.shape[2] % stride or pixels.shape[3] % stride:
        raise ValueError(f"images of {pixels.shape[2]} x {pixels.shape[3]} are not a multiple of the stride {stride}")
    blocks = pixels.unflatten(3, (-1, stride)).unflatten(2, (-1, stride))  # (B, C, y, p, x, p)
    return blocks.permute(0, 2, 4, 1, 3, 5).flatten(3)


def join_patches(patches: Float[Tensor, "b y x d"], stride: int) -> Float[Tensor, "b c h w"]:
    """Put patches together again."""
    blocks = patches.unflatten(3, (-1, stride, stride))  # (B, y, x, C, p, p)
    return blocks.permute(0, 3, 1, 4, 2, 5).flatten(4).flatten(2, 3)


def fit_patch_pca(images: Iterable[UInt8[Tensor, "b c h w"]], stride: int = 4, channels: int | None = None) -> PatchPCA:
    """Fit to batches of images, streaming: one pass, second moments in float64.

    Args:
        images: batches of equal image shape.
        stride: side of a patch.
        channels: components kept, all by default.
    """
    if stride < 1:
        raise ValueError(f"stride must be at least 1, got {stride}")
    count, total, second, image_channels = 0, torch.zeros(()), torch.zeros(()), 0
    for batch in images:
        image_channels = batch.shape[1]
        size = image_channels * stride**2
        if channels is not None and not 1 <= channels <= size:
            raise ValueError(f"channels must be in [1, {size}] for {stride} x {stride} patches, got {channels}")
        # sums of whole numbers below 2^53 are exact, so neither batches nor threads change a bit of the fit
        patches = cut_patches(batch.double(), stride).flatten(0, 2)
        count += len(patches)
        total, second = total + patches.sum(0), second + patches.T @ patches
    if count < 2:
        raise ValueError(f"patch PCA needs at least 2 patches to fit, got {count}")
    mean = total / count
    eigenvalues, basis = torch.linalg.eigh((second / count - torch.outer(mean, mean)) / 127.5**2)
    eigenvalues, basis = eigenvalues.flip(0).clamp(min=0), basis.flip(1)
    # an eigenvector's sign is arbitrary: make its largest entry positive
    signs = basis.gather(0, basis.abs().argmax(0, keepdim=True)).sign()
    return PatchPCA(
        image_channels,
        stride,
        (mean / 127.5 - 1).float(),
        (basis * signs)[:, :channels].float().contiguous(),
        eigenvalues[:channels].float(),
    )


def save_parts(folder: Path, header: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    if tensors:
        files.write_bytes(folder / "tensors.safetensors", save({k: v.contiguous() for k, v in tensors.items()}))
    files.write_json(folder / "representation.json", {"format_version": FORMAT_VERSION, **header})


def _load_pixels(header: dict[str, Any], tensors: dict[str, Tensor]) -> Pixels:
    return Pixels(int(header["image_channels"]))


def _load_patch_pca(header: dict[str, Any], tensors: dict[str, Tensor]) -> PatchPCA:
    mean, basis, eigenvalues = (tensors[name].float() for name in ("mean", "basis", "eigenvalues"))
    image_channels, stride = int(header["image_channels"]), int(header["stride"])
    size = image_channels * stride**2
    if mean.shape != (size,) or basis.ndim != 2 or len(basis) != size or eigenvalues.shape != basis.shape[1:]:
        raise ValueError(
            f"mean is {list(mean.shape)}, basis {list(basis.shape)} and eigenvalues {list(eigenvalues.shape)}, "
            f"patches of {stride} x {stride} x {image_channels} want [{size}], [{size}, k] and [k]"
        )
    return PatchPCA(image_channels, stride, mean, basis, eigenvalues)


def _load_autoencoder(header: dict[str, Any], tensors: dict[str, Tensor]) -> Representation:
    from jlt.data.autoencoders import load_autoencoder  # which is made of parts of this module

    return load_autoencoder(header, tensors)


REPRESENTATIONS: dict[str, Callable[[dict[str, Any], dict[str, Tensor]], Representation]] = {
    "pixels": _load_pixels,
    "patch-pca": _load_patch_pca,
    "autoencoder": _load_autoencoder,
}


def load_representation(folder: Path) -> Representation:
    """Read a representation that `save` wrote."""
    if not (folder / "representation.json").is_file():
        raise ValueError(f"{folder} holds no representation.json")
    header = files.read_json(folder / "representation.json")
    version = header.get("format_version") if isinstance(header, dict) else None
    if version != FORMAT_VERSION:
        raise ValueError(f"{folder} is a representation of format version {version}, this jlt reads {FORMAT_VERSION}")
    path = folder / "tensors.safetensors"
    try:
        load = files.choose("representation", str(header["name"]), REPRESENTATIONS)
        return load(header, load_file(path) if path.is_file() else {})
    except SafetensorError as error:
        raise ValueError(f"{path} is not a safetensors file: {error}") from None
    except KeyError as error:
        raise ValueError(f"{folder} lacks {error} of a representation") from None
    except (TypeError, ValueError, OverflowError) as error:
        raise ValueError(f"{folder} is no representation: {error}") from None


def image_batch(images: Iterable[UInt8[np.ndarray, "c h w"]]) -> UInt8[Tensor, "b c h w"]:
    """Stack images to one tensor."""
    return torch.from_numpy(np.stack(list(images)))
