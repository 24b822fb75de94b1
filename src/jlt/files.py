"""How files are written: whole or not at all.

A file is written under a temporary name in its own folder, flushed to the disk, and renamed over the old one; a folder
is filled under a temporary name and renamed. Whatever happens in between, the last good state stays readable; but for a
folder that takes another's place, which a process killed between two renames leaves under a temporary name.
Temporary names start with `.tmp-`; nothing that reads a folder looks at them.
"""

import contextlib
import difflib
import fcntl
import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Container, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

TEMPORARY = ".tmp-"
T = TypeVar("T")


@contextlib.contextmanager
def replaced(path: Path) -> Iterator[Path]:
    """Yield a temporary path; on success flush it and rename it to `path`, on any error remove it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.parent / f"{TEMPORARY}{uuid.uuid4().hex[:8]}-{path.name}"
    old = temporary.with_name(temporary.name + ".old")
    try:
        yield temporary
        flush(temporary)
        if temporary.is_dir() and path.exists():  # a rename replaces a file, but only an empty folder
            path.rename(old)
        temporary.replace(path)
        sync(path.parent)
    finally:
        if old.exists() and not path.exists():
            old.rename(path)
        remove(temporary)
        remove(old)


def remove(path: Path) -> None:
    """Remove a file or a whole folder; one that is not there is no error."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def flush(path: Path) -> None:
    """Flush a file, or a folder with everything below it, to the disk."""
    if path.is_dir():
        for entry in path.iterdir():
            flush(entry)
    sync(path)


def sync(path: Path) -> None:
    """Flush one file, or a folder's own list of names."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_bytes(path: Path, data: bytes) -> None:
    """Write `data` to `path`, whole or not at all."""
    with replaced(path) as temporary:
        temporary.write_bytes(data)


def write_json(path: Path, value: Any) -> None:
    """Write `value` as indented JSON; NaN and infinities are refused with a ValueError."""
    write_bytes(path, (json.dumps(value, indent=1, allow_nan=False) + "\n").encode())


def read_json(path: Path) -> Any:
    """Read a JSON file; a file that is no JSON is a ValueError that names it."""
    try:
        return json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:  # JSONDecodeError and UnicodeDecodeError are both ValueErrors
        raise ValueError(f"{path} is not a JSON file: {error}") from None


def names(folder: Path) -> list[str]:
    """Return the names in a folder but for temporary ones; none for a folder that is not there."""
    return [entry.name for entry in folder.iterdir() if not entry.name.startswith(TEMPORARY)] if folder.is_dir() else []


def remove_temporaries(folder: Path) -> None:
    """Remove what an interrupted writer left behind in `folder`."""
    for leftover in folder.glob(f"{TEMPORARY}*"):
        remove(leftover)


def sha256(path: Path) -> str:
    """Return the hexadecimal SHA-256 of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def fingerprint(value: Any) -> str:
    """Return 16 hexadecimal digits that identify a JSON-serialisable value."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]


def choose(kind: str, name: str, table: Mapping[str, T]) -> T:
    """Look `name` up in `table`; an unknown one is a ValueError with the nearest name and all the options."""
    if name in table:
        return table[name]
    raise ValueError(f"unknown {kind} {name!r}{nearest(name, table)}; the options are {', '.join(table)}")


def nearest(name: str, options: Iterable[str]) -> str:
    """Return `, did you mean 'x'?` for the option closest to `name`, or nothing."""
    close = difflib.get_close_matches(name, list(options), n=1)
    return f", did you mean {close[0]!r}?" if close else ""


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold an exclusive lock on the file `path`; one that another process holds is a ValueError.

    The system drops the lock when the process ends, however it ends.
    """
    with path.open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"{path.parent} is in use by another process") from None
        yield


def claim(folder: Path, name: str, settings: Mapping[str, Any], what: str, free: Container[str] = ()) -> bool:
    """Make `folder` the place of what `settings` describe, stated first of all in its file `name`; or check that it is.

    Returns whether it begins here. A file, a folder of something else, or settings that differ (other than the `free`
    ones, which are stated anew) are a ValueError; `what` says what the folder is for.
    """
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder} is a file; a folder for {what} is wanted")
    path, others = folder / name, names(folder)  # looked at first: another process may begin here, too
    if not path.is_file():
        if others:
            raise ValueError(f"{folder} is not empty and holds no {name}; {what} go into a folder of their own")
        write_json(path, settings)
        return True
    found = read_json(path)
    if not isinstance(found, dict):
        raise ValueError(f"{path} holds {found!r:.40}, the settings of {what} are wanted")
    asked = json.loads(json.dumps(settings))
    fixed = [key for key in asked if key not in free]
    if listed := list(differences({key: found.get(key) for key in fixed}, {key: asked[key] for key in fixed})):
        raise ValueError(f"{folder} holds {what} made with other settings: {'; '.join(listed)}")
    if any(found.get(key) != asked[key] for key in asked):
        write_json(path, {**found, **asked})
    return False


def differences(there: Any, here: Any, name: str = "") -> Iterator[str]:
    """Yield a phrase for each setting that differs between two JSON values: its dotted name, and both its values."""
    if isinstance(there, dict) and isinstance(here, dict):
        for key in {**there, **here}:
            yield from differences(there.get(key), here.get(key), f"{name}.{key}".lstrip("."))
    elif there != here and all(isinstance(side, list) and side and isinstance(side[0], dict) for side in (there, here)):
        alone = [f"{name} has {item} there alone" for item in there if item not in here]
        alone += [f"{name} has {item} here alone" for item in here if item not in there]
        yield from alone or [f"{name} are in another order"]
    elif there != here:
        yield f"{name} is {there!s:.200} there and {here!s:.200} here"
