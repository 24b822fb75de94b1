"""The record: one schema for every result that this project states.

A record is a JSON file with numbers and their provenance. Quickstart, evaluate, compare, geometry and sweeps all write
one, and a report reads nothing else (besides the pictures that lie beside it). `values` are the results; `settings`
what they were made with; `parts` the records of the runs that a comparison compares, each with the settings in which
it differs; `figures` are lines to plot; `pictures` map a caption to an image file beside the record.

Imports no PyTorch, so that reading a record is quick.
"""

import dataclasses
import datetime
import functools
import math
import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

from jlt import files

FORMAT_VERSION = 1
Number = int | float


@functools.cache
def current_commit() -> str:
    """Return this installation's git commit, `+changes` appended if files differ from it; no checkout: its version."""
    root = Path(__file__).parents[3]
    if (root / ".git").exists():
        try:
            git = functools.partial(subprocess.run, cwd=root, capture_output=True, text=True, check=True, timeout=10)
            head = git(["git", "rev-parse", "--short=12", "HEAD"]).stdout.strip()
            changes = git(["git", "status", "--porcelain", "--untracked-files=no"]).stdout.strip()
            return head + ("+changes" if changes else "")
        except (OSError, subprocess.SubprocessError):
            pass
    return f"release {package_versions()['jlt']}"


def describe_hardware() -> str:
    """Return the processor's name, the cores this process may use, the system, and the GPU if PyTorch is loaded."""
    name = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        lines = cpuinfo.read_text().splitlines()
        name = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), name)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    torch = sys.modules.get("torch")  # a process without it has used no GPU
    gpu = (
        f", {torch.cuda.device_count()} x {torch.cuda.get_device_name()}" if torch and torch.cuda.is_available() else ""
    )
    return f"{name}, {cores} cores, {platform.system()}{gpu}"


@functools.cache
def package_versions() -> dict[str, str]:
    """Return the versions of Python and of the packages that a number may depend on."""
    found = {"python": platform.python_version()}
    for package in ("jlt", "torch", "numpy", "onnxruntime", "scikit-learn"):
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            if package == "jlt":
                found[package] = "unknown"
    return found


@dataclass(frozen=True)
class Value:
    """One number: its `spread` (standard deviation) over `count` repetitions, and its unit, if any."""

    value: Number
    spread: Number | None = None
    count: int = 1
    unit: str = ""

    def __str__(self) -> str:
        spread = "" if self.spread is None else f" ± {self.spread:.2g}"
        return f"{self.value:.4g}{spread}{' ' + self.unit if self.unit else ''}"


@dataclass(frozen=True)
class Figure:
    """Lines to plot: `lines[name]` is a pair (x, y) of equally long lists. Scales are "linear" or "log".

    `spreads[name]`, where it is there, is the standard deviation of each y over repetitions. `level` is the y that
    lines are to be read against, such as 1 for ratios.
    """

    caption: str
    x_label: str
    y_label: str
    lines: Mapping[str, tuple[Sequence[Number], Sequence[Number]]]
    x_scale: str = "linear"
    y_scale: str = "linear"
    spreads: Mapping[str, Sequence[Number]] = field(default_factory=dict)
    level: Number | None = None


@dataclass(frozen=True)
class Record:
    """A result with its provenance; see the module's docstring."""

    kind: str
    name: str
    values: Mapping[str, Value]
    settings: Mapping[str, Any]
    fingerprints: Mapping[str, str] = field(default_factory=dict)
    figures: Mapping[str, Figure] = field(default_factory=dict)
    pictures: Mapping[str, str] = field(default_factory=dict)
    parts: tuple["Record", ...] = ()
    command: str = field(default_factory=lambda: shlex.join(["jlt", *sys.argv[1:]]))
    commit: str = field(default_factory=current_commit)
    hardware: str = field(default_factory=describe_hardware)
    versions: Mapping[str, str] = field(default_factory=package_versions)
    created: str = field(default_factory=lambda: datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"))
    format_version: int = FORMAT_VERSION


def mean_and_spread(values: Sequence[Number], unit: str = "") -> Value:
    """Return the mean and the sample standard deviation (n - 1) of repetitions; one repetition has no spread."""
    count = len(values)
    if count == 0:
        raise ValueError("a value needs at least 1 repetition, got 0")
    mean = math.fsum(values) / count
    spread = math.sqrt(math.fsum((v - mean) ** 2 for v in values) / (count - 1)) if count > 1 else None
    return Value(mean, spread, count, unit)


def over_seeds(repetitions: Sequence[Mapping[str, Value]]) -> dict[str, Value]:
    """Return mean and spread of each value over repetitions, with its name; what is the same in all has no spread.

    One repetition is returned as it is.
    """
    if len(repetitions) == 1:
        return dict(repetitions[0])
    names = [name for name in repetitions[0] if all(name in values for values in repetitions)]
    found = {name: [values[name] for values in repetitions] for name in names}
    return {
        name: Value(held[0].value, None, len(held), held[0].unit) if len({value.value for value in held}) == 1
        else mean_and_spread([value.value for value in held], held[0].unit)
        for name, held in found.items()
    }  # fmt: skip


def walk(record: Record) -> Iterator[Record]:
    """Yield a record, its parts, and theirs."""
    yield record
    for part in record.parts:
        yield from walk(part)


def write(record: Record, path: Path) -> None:
    """Write a record as JSON, whole or not at all."""
    files.write_json(path, dataclasses.asdict(record))


def read(path: Path) -> Record:
    """Read a record; another format version or a missing key is a ValueError."""
    data = files.read_json(path)
    if not isinstance(data, dict) or data.get("format_version") != FORMAT_VERSION:
        found = data.get("format_version") if isinstance(data, dict) else None
        raise ValueError(f"{path} is a record of format version {found}, this jlt reads {FORMAT_VERSION}")
    try:
        return _from_dict(data)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ValueError(f"{path} is not a complete record: {error}") from None


def _from_dict(data: dict[str, Any]) -> Record:
    return Record(
        **{
            **data,
            "values": {name: Value(**value) for name, value in data["values"].items()},
            "figures": {name: _figure(figure) for name, figure in data["figures"].items()},
            "parts": tuple(_from_dict(part) for part in data["parts"]),
        }
    )


def _figure(data: dict[str, Any]) -> Figure:
    return Figure(**{**data, "lines": {name: (x, y) for name, (x, y) in data["lines"].items()}})  # JSON has no tuples
