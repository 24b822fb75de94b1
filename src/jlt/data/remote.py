"""Files anywhere: local paths as they are, URLs (s3://, gs://, https://, hf://, ...) through fsspec and a local cache.

A remote file is fetched whole when it is first read, into $JLT_HOME/staged (JLT_HOME is ~/.cache/jlt by default), under
a name made of its URL, size and version. $JLT_CACHE_GB gigabytes (100 by default, 1 GB = 10^9 bytes) are kept: where
the next file would pass them, those read longest ago go, a tenth of the limit at a time. Processes that share the cache
see each other's files whenever they measure it, which each does when it has fetched a hundredth of the limit.
"""

import contextlib
import functools
import hashlib
import os
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

from jlt import files
from jlt.extras import needed

ABANDONED = 86_400  # seconds since anything was written to a file that is being fetched
VERSIONS = ("ETag", "etag", "md5Hash", "crc32c", "blob_id")  # what stores call the identity of a file's content
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class File:
    """A local path or a URL, its size in bytes, and its store's word for the version, if any."""

    path: str
    size: int
    version: str = ""


def is_url(path: str) -> bool:
    return "://" in path


def absolute(path: str) -> str:
    """Return a local path made absolute, so that a spec opens from anywhere, or a URL as its store lists it."""
    if not is_url(path):
        return str(Path(path).absolute())
    system, name = _connect(path)
    url: str = system.unstrip_protocol(name)
    return url.rstrip("/")


def file_at(path: str) -> File:
    """Return the file at a path or a URL; one that is not there is a FileNotFoundError."""
    if not is_url(path):
        return File(path, os.stat(path).st_size)
    system, name = _connect(path)
    return _from_store(path, _asked(path, lambda: system.info(name)))


def list_files(path: str, pattern: str = "*") -> list[File]:
    """Return the file at a path, or the files below it whose names match, by rising path; hidden ones are left out."""
    if is_url(path):
        return _list_remote(path, pattern)
    root = Path(path)
    if root.is_file():
        return [File(path, root.stat().st_size)]
    if not root.is_dir():
        raise ValueError(f"{path} does not exist; a file or a folder is wanted")
    found = (file for file in root.rglob(pattern) if file.is_file() and not hidden(str(file.relative_to(root))))
    return [File(str(file), file.stat().st_size) for file in sorted(found)]


def hidden(name: str) -> bool:
    """Whether a part of a path below a folder starts with a dot (`._x.jpg`, which some systems put beside x.jpg)."""
    return any(part.startswith(".") for part in name.split("/"))


def _list_remote(url: str, pattern: str) -> list[File]:
    def listed() -> dict[str, dict[str, Any]]:
        found: dict[str, dict[str, Any]] = system.find(name, detail=True)
        return found

    system, name = _connect(url)
    root, found = absolute(url), []
    for info in _asked(url, listed).values():
        file = _from_store(system.unstrip_protocol(info["name"]), info)
        below = file.path.removeprefix(root).lstrip("/")
        if not hidden(below) and (not below or Path(below).match(pattern)):
            found.append(file)
    if not found:
        raise ValueError(f"{url} holds no file {pattern}")
    return sorted(found, key=lambda file: file.path)


def matching(pattern: str) -> list[File]:
    """Return the files that a pattern of *, ? and [...] matches, by rising path."""
    if not is_url(pattern):
        path = Path(pattern).absolute()
        found = sorted(Path(path.anchor).glob(str(path.relative_to(path.anchor))))
        return [File(str(file), file.stat().st_size) for file in found if file.is_file()]
    system, name = _connect(pattern)
    infos: dict[str, dict[str, Any]] = _asked(pattern, lambda: system.glob(name, detail=True))
    listed = (_from_store(system.unstrip_protocol(info["name"]), info) for info in infos.values())
    return sorted(listed, key=lambda file: file.path)


def _from_store(url: str, info: dict[str, Any]) -> File:
    if info.get("size") is None:
        raise ValueError(f"{url} does not state its size; a store that does is wanted")
    return File(url, int(info["size"]), next((str(info[key]) for key in VERSIONS if info.get(key)), ""))


def _connect(url: str) -> tuple[Any, str]:
    """Return the file system of a URL and the path in it."""
    scheme = url.partition("://")[0]
    if "::" in url:
        raise ValueError(f"{url} chains file systems, which jlt does not; one URL is wanted")
    with needed(url, "hub"):
        import fsspec
    try:
        found: tuple[Any, str] = fsspec.core.url_to_fs(url)
    except (ImportError, ValueError) as error:  # a protocol whose package is not installed, or an unknown one
        raise ValueError(f"{scheme}:// of {url} cannot be read: {error}") from None
    return found


def _asked(url: str, question: Callable[[], T]) -> T:
    """Ask a store; whatever it raises is an OSError that names the URL."""
    try:
        return question()
    except FileNotFoundError:
        raise FileNotFoundError(f"{url} does not exist") from None
    except Exception as error:  # each store has errors of its own
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise OSError(f"{url} cannot be read: {lines[0]}") from None


def open_ranges(file: File) -> Any:
    """Open a file for reading parts of it; of a remote one only those are fetched. What stores open reads as a file."""
    if not is_url(file.path):
        return Path(file.path).open("rb")
    system, name = _connect(file.path)
    return _asked(file.path, lambda: system.open(name, "rb"))


def open_whole(file: File) -> BinaryIO:
    """Open a file, a remote one after it was fetched whole."""
    if not is_url(file.path):
        return Path(file.path).open("rb")
    home, gigabytes = os.environ.get("JLT_HOME") or "~/.cache/jlt", os.environ.get("JLT_CACHE_GB") or "100"
    try:
        limit = int(float(gigabytes) * 1e9)
    except (ValueError, OverflowError):
        raise ValueError(f"JLT_CACHE_GB is {gigabytes!r}, a number of gigabytes is wanted") from None
    return cache(Path(home).expanduser() / "staged", limit).open(file)


class Cache:
    """A folder that keeps the remote files read last, up to `limit` bytes; one for all threads of a process."""

    def __init__(self, folder: Path, limit: int) -> None:
        self.folder, self.limit = folder, limit
        self.total: int | None = None  # bytes kept, as last measured, and what was fetched since
        self.unmeasured = 0
        self.reserved = 0  # bytes being fetched
        self.changed = threading.Condition()
        self.fetching = [threading.Lock() for _ in range(256)]

    def open(self, file: File) -> BinaryIO:
        """Open the local copy of a remote file, fetched if there is none; it stays readable when it is removed."""
        key = hashlib.sha256(f"{file.path}\n{file.size}\n{file.version}".encode()).hexdigest()[:32]
        path = self.folder / key[:2] / key
        with self.fetching[int(key[:2], 16)]:  # threads that want the same file fetch it once
            with contextlib.suppress(FileNotFoundError):  # another process may remove it between two of these lines
                os.utime(path)
                return path.open("rb")
            return self.fetch(file, path)

    def fetch(self, file: File, path: Path) -> BinaryIO:
        """Copy a remote file to `path`, whole or not at all, and open it."""
        if file.size > self.limit:
            raise ValueError(f"{file.path} has {file.size} bytes, JLT_CACHE_GB allows {self.limit}")
        with self.room(file.size), files.replaced(path) as temporary:
            size = 0
            with open_ranges(file) as remote, temporary.open("wb") as local:
                while size <= file.size and (part := _asked(file.path, lambda: remote.read(2**20))):
                    size += local.write(part)
            if size != file.size:
                more = "or more" if size > file.size else "only"
                raise OSError(f"{file.path} is listed with {file.size} bytes and gave {size} {more}")
            return temporary.open("rb")  # before it can be removed again

    @contextlib.contextmanager
    def room(self, size: int) -> Iterator[None]:
        """Reserve `size` bytes, removing the files read longest ago, and waiting for other threads where it must."""
        with self.changed:
            while not self.fits(size):
                self.changed.wait()
            self.reserved += size
        fetched = 0
        try:
            yield
            fetched = size
        finally:
            with self.changed:
                self.reserved -= size
                self.total, self.unmeasured = (self.total or 0) + fetched, self.unmeasured + fetched
                self.changed.notify_all()

    def fits(self, size: int) -> bool:
        """Whether `size` bytes more stay below the limit, after removing what has to go."""
        stale = self.total is None or self.unmeasured > self.limit // 100
        if not stale and (self.total or 0) + self.reserved + size <= self.limit:
            return True
        kept = sorted(self.measure())
        self.total, self.unmeasured = sum(bytes_ for _, bytes_, _ in kept), 0
        if self.total + self.reserved + size > self.limit:
            goal = self.limit - max(size, self.limit // 10) - self.reserved
            for _, bytes_, path in kept:
                if self.total <= goal:
                    break
                Path(path).unlink(missing_ok=True)
                self.total -= bytes_
        return self.total + self.reserved + size <= self.limit

    def measure(self) -> Iterator[tuple[int, int, str]]:
        """Yield time of last use, bytes, and path of each file kept; remove what killed processes left half-fetched."""
        for folder in os.scandir(self.folder) if self.folder.is_dir() else ():
            for entry in os.scandir(folder):
                with contextlib.suppress(FileNotFoundError):  # another process may have removed it
                    if not entry.name.startswith(files.TEMPORARY):
                        yield entry.stat().st_mtime_ns, entry.stat().st_size, entry.path
                    elif entry.stat().st_mtime < time.time() - ABANDONED:
                        os.unlink(entry.path)


@functools.cache
def cache(folder: Path, limit: int) -> Cache:
    """Return this process's cache in a folder."""
    return Cache(folder, limit)
