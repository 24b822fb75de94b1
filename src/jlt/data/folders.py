"""Folders of image files, local or remote: a folder a class, in the order of their names, or a flat one without labels.

Where all class folders are WordNet ids (n01440764, ...), as in ImageNet as downloaded, labels keep the order of the ids
and `class_names` are words.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from jlt import files
from jlt.data import remote
from jlt.data.classes import readable
from jlt.data.images import SUFFIXES
from jlt.data.photos import IMAGE_SIZE, Photos
from jlt.data.remote import File


def open_folder(path: str, image_size: int | None = None, upscale: bool = False) -> Photos:
    """Open a folder of class folders, or a flat folder; `image_size` (256 by default) is the side of the crop."""
    root, size = remote.absolute(path), image_size or IMAGE_SIZE
    names, found = (list_remote if remote.is_url(path) else list_local)(root)
    classed = [(file, label) for label, name in enumerate(names) for file in found[name]]
    loose = [(file, -1) for file in found[""]]
    if classed and loose:
        raise ValueError(
            f"{path} holds {len(loose)} images beside {len(names)} class folders; it must be one or the other"
        )
    if not classed and not loose:
        raise ValueError(f"{path} holds no image ({', '.join(SUFFIXES)})")
    if classed and len(names) == 1:
        raise ValueError(
            f"{path} has 1 class folder, {names[0]!r}; open {path}/{names[0]} itself for unlabelled images"
        )
    if classed and (empty := [name for name in names if not found[name]]):
        raise ValueError(f"class folder {path}/{empty[0]} holds no image, the other classes hold {len(classed)}")
    images = [file for file, _ in classed or loose]
    return Photos(
        spec=f"folder:{root}",
        read=lambda index: (read(images[index]), images[index].path),
        targets=np.array([label for _, label in classed or loose], dtype=np.int64),
        class_names=readable(names) if classed else None,
        image_size=size,
        upscale=upscale,
        fingerprint=files.fingerprint([list_names(images, root), size]),
    )


def read(file: File) -> bytes:
    """Return a file's bytes."""
    with remote.open_whole(file) as opened:
        return opened.read()


def list_names(found: Sequence[File], root: str) -> list[list[str | int]]:
    """Return (name below the root, size) of each file, and its version where its store states one."""
    start = len(root.rstrip("/")) + 1
    return [[file.path[start:], file.size, *([file.version] if file.version else [])] for file in found]


def list_local(path: str) -> tuple[list[str], dict[str, list[File]]]:
    """Return the names of the class folders, and the images in each and ("") beside them, by rising path."""
    root = existing_folder(Path(path))
    names = sorted(entry.name for entry in root.iterdir() if entry.is_dir() and not entry.name.startswith("."))
    for name in names:
        if root.resolve().is_relative_to((root / name).resolve()):
            raise ValueError(f"class folder {root / name} is a link to {(root / name).resolve()}, which holds it")
    return names, {
        "": image_files(root, deep=False),
        **{name: image_files(root / name, deep=True) for name in names},
    }


def image_files(folder: Path, deep: bool) -> list[File]:
    """List image files by rising path; beside samples.json, but for the sheets of them that `jlt sample` draws."""
    sheets = ("grid.png", "strip.png") if (folder / "samples.json").is_file() else ()
    entries = folder.rglob("*") if deep else folder.iterdir()
    seen = (file for file in entries if not remote.hidden(str(file.relative_to(folder))))
    found = sorted(f for f in seen if f.suffix.lower() in SUFFIXES and f.is_file() and f.name not in sheets)
    return [File(str(file), file.stat().st_size) for file in found]


def existing_folder(path: Path) -> Path:
    """Return the path if it is a folder that can be read."""
    if not path.exists():
        raise ValueError(f"{path} does not exist; a folder is wanted")
    if not path.is_dir():
        raise ValueError(f"{path} is a file; a folder is wanted")
    return path


def list_remote(url: str) -> tuple[list[str], dict[str, list[File]]]:
    """Do for a URL what `list_local` does for a path; a store knows no empty folders."""
    found: dict[str, list[File]] = {"": []}
    for file in remote.list_files(url):
        if file.path.lower().endswith(SUFFIXES):
            first, slash, _ = file.path.removeprefix(url).lstrip("/").partition("/")
            found.setdefault(first if slash else "", []).append(file)
    return sorted(set(found) - {""}), found
