"""References: statistics of real images in one .npz file, in the layout that the field's evaluators share.

| array | shape | who writes it |
|---|---|---|
| `mu`, `sigma` | (d,), (d, d) float64 | all: mean and covariance of the features, 2,048 from Inception |
| `mu_s`, `sigma_s` | (2023,), (2023, 2023) | ADM and jlt: of the spatial features, for sFID |
| `arr_0` | (n, height, width, 3) uint8 | ADM and jlt: some of the images, for precision and recall |
| `features` | (n, d) float32 | jlt: the features of those |
| `labels` | (n,) int64 | jlt: theirs, -1 for none, for distances by class |
| `count`, `extractor`, `fingerprint`, `source`, `image_size` | () | jlt: number, features and kind of the images |

A file that does not state its extractor is from elsewhere, and taken for Inception's if it has 2,048 dimensions. The
two references in use for ImageNet 256 differ, so a record names the file and its SHA-256. Nothing is unpickled.
"""

import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Int, UInt8

from jlt import files
from jlt.evaluation.features import Extractor
from jlt.evaluation.inception import Inception
from jlt.evaluation.moments import Stated, check_features
from jlt.evaluation.protocol import Reference
from jlt.evaluation.statistics import Statistics

STATED = ("count", "extractor", "fingerprint", "source", "image_size")
SMALL = ("mu", "sigma", "mu_s", "sigma_s", "features", "labels", *STATED)
IMAGES = "arr_0"


def write(
    path: Path,
    statistics: Statistics,
    extractor: Extractor,
    source: str,
    images: UInt8[np.ndarray, "n h w c"] | None = None,
    labels: Int[np.ndarray, " n"] | None = None,
    image_size: str = "",
) -> None:
    """Write statistics of the images of `source`, and those whose features are kept, if given; whole or not at all."""
    arrays: dict[str, Any] = {"extractor": extractor.name, "fingerprint": extractor.fingerprint, "source": source}
    arrays["count"] = np.int64(statistics.count)
    for name, suffix in (("features", ""), ("spatial", "_s")):
        if (moments := statistics.moments(name)) is not None:
            arrays |= {f"mu{suffix}": moments.mean.numpy(), f"sigma{suffix}": moments.covariance.numpy()}
    if statistics.keep:
        arrays["features"] = statistics.kept.numpy()
    optional = {IMAGES: images, "labels": labels, "image_size": image_size or None}
    arrays |= {name: value for name, value in optional.items() if value is not None}
    with files.replaced(path) as temporary, temporary.open("wb") as file:
        np.savez(file, **arrays)


def read(path: Path, extractor: Extractor) -> Reference:
    """Read a reference; one of other features or of another dimension is a ValueError with both.

    `features` is None where the file has none; a file of ADM's has the images to make them from.
    """
    arrays = read_arrays(path)
    if missing := {"mu", "sigma"} - arrays.keys():
        raise ValueError(f"{path} lacks {', '.join(sorted(missing))}; it holds no statistics of images")
    d = extractor.dimension
    if (found := arrays["mu"].shape) != (d,):
        raise ValueError(f"{path}: mu is {found}, features of {extractor.name} are of dimension {d}")
    if (fingerprint := text(arrays, "fingerprint")) is None:
        if not isinstance(extractor, Inception):
            raise ValueError(f"{path} does not state its features, so they are Inception's, not {extractor.name}'s")
    elif fingerprint != extractor.fingerprint:
        made = f"{text(arrays, 'extractor')} ({fingerprint})"
        raise ValueError(f"{path} was made with {made}, not with {extractor.name} ({extractor.fingerprint})")
    count = int(arrays["count"]) if "count" in arrays and arrays["count"].ndim == 0 else None
    features = torch.from_numpy(arrays["features"]).float() if "features" in arrays else None
    if features is not None:
        check_features(features, d)
    labels = torch.from_numpy(arrays["labels"]) if "labels" in arrays else None
    if labels is not None and (features is None or labels.shape != features.shape[:1] or labels.dtype != torch.int64):
        raise ValueError(f"{path}: labels are {tuple(labels.shape)} {labels.dtype}, one int64 a feature is wanted")
    return Reference(
        name=text(arrays, "source") or path.name,
        extractor=extractor.name,
        fingerprint=extractor.fingerprint,
        moments=stated(path, arrays, "", count),
        features=features,
        spatial=stated(path, arrays, "_s", count) if {"mu_s", "sigma_s"} <= arrays.keys() else None,
        labels=labels,
        image_size=text(arrays, "image_size"),
    )


def read_arrays(path: Path) -> dict[str, np.ndarray]:
    """Read all arrays but the images."""
    if not path.is_file():
        raise ValueError(f"{path} is not there; statistics of real images (.npz) are wanted, jlt reference makes them")
    if not zipfile.is_zipfile(path):
        raise ValueError(f"{path} is not a .npz file")
    try:
        with np.load(path, allow_pickle=False) as file:
            return {name: file[name] for name in SMALL if name in file.files}
    except Exception as error:  # a damaged archive raises half a dozen kinds
        raise ValueError(f"{path} cannot be read: {str(error).splitlines()[0] if str(error) else error!r}") from None


def has_images(path: Path) -> bool:
    """Say whether a reference holds some of its images."""
    with zipfile.ZipFile(path) as archive:
        return f"{IMAGES}.npy" in archive.namelist()


def stated(path: Path, arrays: dict[str, np.ndarray], suffix: str, count: int | None) -> Stated:
    """Return the mean and covariance of one view, checked."""
    mean, covariance = arrays[f"mu{suffix}"], arrays[f"sigma{suffix}"]
    if mean.ndim != 1 or covariance.shape != (len(mean),) * 2 or {mean.dtype.kind, covariance.dtype.kind} != {"f"}:
        raise ValueError(f"{path}: mu{suffix} is {mean.shape} {mean.dtype}, sigma{suffix} {covariance.shape}")
    if not (np.isfinite(mean).all() and np.isfinite(covariance).all()):
        raise ValueError(f"{path}: mu{suffix} or sigma{suffix} has numbers that are not finite")
    return Stated(torch.from_numpy(mean).double(), torch.from_numpy(covariance).double(), count)


def text(arrays: dict[str, np.ndarray], name: str) -> str | None:
    """Return an array that is one string, if it is there."""
    value = arrays.get(name)
    return str(value) if value is not None and value.ndim == 0 and value.dtype.kind == "U" else None
