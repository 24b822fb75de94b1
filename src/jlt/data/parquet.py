"""Images in parquet files, and data sets of the Hugging Face Hub, which come as such: read as needed, never copied.

A column holds encoded images, as bytes or as the Hub's {bytes, path}; another the labels, as numbers or as words. Which
they are is what `#IMAGE,LABEL` at the end of a spec says, else what the files' "huggingface" metadata or the data set's
features say (the Image and the ClassLabel column), else the first column named like IMAGE_COLUMNS and LABEL_COLUMNS.
Opening reads the footers and the labels. Images are read a row group at a time, the last ones kept (CACHE_BYTES).
No code of a data set is run.
"""

import contextlib
import json
import logging
import os
import re
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np

from jlt import files
from jlt.data import remote
from jlt.data.classes import name_classes
from jlt.data.folders import list_names
from jlt.data.images import BrokenImage
from jlt.data.photos import IMAGE_SIZE, Photos
from jlt.data.remote import File
from jlt.extras import needed

IMAGE_COLUMNS = ("image", "img")
LABEL_COLUMNS = ("label", "labels", "fine_label")
CACHE_BYTES = 2**29  # of row groups kept; the one read last always is
MAX_GROUP = 2**32  # bytes of images that a row group may hold
T = TypeVar("T")


def open_parquet(path: str, image_size: int | None = None, upscale: bool = False) -> Photos:
    """Open PATH[#IMAGE,LABEL]: a parquet file, or a folder of them."""
    path, columns = split_columns(path)
    path = remote.absolute(path)
    found = remote.list_files(path, "*.parquet")
    if not found:
        raise ValueError(f"{path} holds no *.parquet file")
    splits = sorted({match[1] for file in found if (match := re.match(r"(train|test|val\w*)\b", base(file.path)))})
    if len(splits) > 1:
        raise ValueError(f"{path} holds files of the splits {' and '.join(splits)}; write hf:{path}@{splits[-1]}")
    return photos(f"parquet:{path}{columns and '#' + columns}", found, columns, {}, image_size, upscale)


def open_hub(path: str, image_size: int | None = None, upscale: bool = False) -> Photos:
    """Open ID[@SPLIT][#IMAGE,LABEL]: a data set of the Hub, or a folder laid out like one; `train` by default.

    Only data sets whose files are parquet are read.
    """
    name, columns = split_columns(path)
    name, _, split = name.partition("@")
    if os.path.isdir(name):
        name = remote.absolute(name)
    split = split or "train"
    with needed(f"hf:{name}", "hub"):
        import datasets
    log = logging.getLogger("huggingface_hub")
    level = log.level
    try:
        log.setLevel(logging.ERROR)  # it tells of each attempt to reach the Hub
        builder = datasets.load_dataset_builder(name)
    except Exception as error:  # of the network, the Hub, the files, or the library: each has its own
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise ValueError(f"the data set {name} cannot be opened: {lines[0]}") from None
    finally:
        log.setLevel(level)
    data_files: Mapping[str, Sequence[str]] = {str(k): list(v) for k, v in (builder.config.data_files or {}).items()}
    paths = files.choose(f"split of {name}", split, data_files)
    if odd := [each for each in paths if not each.endswith(".parquet")]:
        raise ValueError(f"{name} is made of files like {base(odd[0])}; parquet is wanted (see also folder: and tar:)")
    features = builder.info.features.to_dict() if builder.info.features else {}
    found = [remote.file_at(each) for each in paths]
    spec = f"hf:{name}@{split}{columns and '#' + columns}"
    return photos(spec, found, columns, features, image_size, upscale)


def photos(
    spec: str, found: Sequence[File], columns: str, features: Mapping[str, Any], image_size: int | None, upscale: bool
) -> Photos:
    """Open parquet files, with the features that a data set states of them, if it does."""
    with needed(spec, "hub"):
        import pyarrow.parquet  # noqa: F401
    side = image_size or IMAGE_SIZE
    image, label, names = choose_columns(found[0], columns, features)
    with ThreadPoolExecutor() as pool:  # of remote files each waits for the network
        parts = list(pool.map(lambda file: read_labels(file, image, label), found))
    if not sum(len(part.labels) for part in parts):
        raise ValueError(f"{spec} has 0 rows in {len(found)} files")
    words = sorted({word for part in parts for word in part.labels if isinstance(word, str)})
    if words:
        names, rank = words, {word: k for k, word in enumerate(words)}
        labels = np.array([rank.get(str(word), -1) for part in parts for word in part.labels], dtype=np.int64)
    else:
        labels = np.array([number for part in parts for number in part.labels], dtype=np.int64)
    folder = min((file.path.rpartition("/")[0] for file in found), key=len)
    while not all(file.path.startswith(folder + "/") for file in found):
        folder = folder.rpartition("/")[0]
    return Photos(
        spec=spec,
        read=RowGroups(found, parts, image).read,
        targets=labels,
        class_names=name_classes(labels, names, spec),
        image_size=side,
        upscale=upscale,
        fingerprint=files.fingerprint([list_names(found, folder), image, label, side]),
    )


def choose_columns(
    file: File, columns: str, features: Mapping[str, Any]
) -> tuple[str, str | None, Sequence[str] | None]:  # fmt: skip
    """Return the image column, the label column, if any, and the class names, where they are stated."""
    schema = damaged(file, lambda: read_schema(file))
    features = features or stated_features(file, (schema.metadata or {}).get(b"huggingface", b"{}"))
    kinds = {name: feature.get("_type") for name, feature in features.items() if isinstance(feature, dict)}
    asked = columns.split(",") if columns else []
    for name in asked:
        files.choose(f"column of {file.path}", name, dict.fromkeys(schema.names))
    image = first(asked[:1], [k for k, kind in kinds.items() if kind == "Image"], IMAGE_COLUMNS, among=schema.names)
    label = first(
        asked[1:], [k for k, kind in kinds.items() if kind == "ClassLabel"], LABEL_COLUMNS, among=schema.names
    )
    if image is None:
        raise ValueError(f"{file.path} has the columns {', '.join(schema.names)}; which holds the images? add #COLUMN")
    if asked and len(asked) == 1:
        label = None
    names = features[label].get("names") if label is not None and kinds.get(label) == "ClassLabel" else None
    if names is not None and not (isinstance(names, list) and all(isinstance(name, str) for name in names)):
        raise ValueError(f"{file.path} states the class names {names!r:.40}, a list of words is wanted")
    return image, label, names


def read_schema(file: File) -> Any:
    with opened(file) as table:
        return table.schema_arrow


def first(*options: Sequence[str], among: Sequence[str]) -> str | None:
    """Return the first of the names in `options` that is in `among`."""
    return next((name for names in options for name in names if name in among), None)


def stated_features(file: File, text: bytes) -> Mapping[str, Any]:
    """Return the features in the metadata that the Hub's library writes."""
    try:
        features = json.loads(text).get("info", {}).get("features", {})
        return features if isinstance(features, dict) else {}
    except (ValueError, AttributeError, RecursionError):
        raise ValueError(f"{file.path} has malformed 'huggingface' metadata: {text[:40]!r}") from None


def split_columns(path: str) -> tuple[str, str]:
    """Split PATH#IMAGE,LABEL at the last # that no / follows."""
    found = re.fullmatch(r"(.*)#([^/#]+)", path)
    return (found[1], found[2]) if found else (path, "")


def base(path: str) -> str:
    return path.rpartition("/")[2]


@contextlib.contextmanager
def opened(file: File, metadata: Any = None) -> Iterator[Any]:
    """Open a parquet file; what was read of its footer before need not be read again."""
    import pyarrow.parquet

    with remote.open_ranges(file) as stream, pyarrow.parquet.ParquetFile(stream, metadata=metadata) as table:
        yield table


def damaged(file: File, reading: Callable[[], T]) -> T:
    """Read; whatever pyarrow makes of damaged bytes is a ValueError that names the file."""
    import pyarrow

    try:
        return reading()
    except FileNotFoundError:
        raise
    except (pyarrow.ArrowException, OSError) as error:
        raise ValueError(f"{file.path} cannot be read as parquet: {(str(error).splitlines() or ['?'])[0]}") from None


@dataclass(frozen=True)
class Part:
    """What is kept of a file: its footer, and the labels of its rows, numbers or words (-1 where there is none)."""

    footer: Any
    labels: list[int | str]


def read_labels(file: File, image: str, label: str | None) -> Part:
    """Read a file's footer and labels."""
    import pyarrow

    def reading() -> Part:
        with opened(file) as table:
            schema, rows = table.schema_arrow, table.metadata.num_rows
            for name in (image, label):
                if name is not None and name not in schema.names:
                    raise ValueError(f"{file.path} has no column {name!r}, the first file has")
            if label is None:
                return Part(table.metadata, [-1] * rows)
            kind = schema.field(label).type
            plain = kind.value_type if pyarrow.types.is_dictionary(kind) else kind
            if not (pyarrow.types.is_integer(plain) or pyarrow.types.is_string(plain)):
                raise ValueError(f"{file.path}: column {label!r} is of {kind}, numbers or words are wanted")
            labels = table.read(columns=[label]).column(label).to_pylist()
            return Part(table.metadata, [-1 if value is None else value for value in labels])

    return damaged(file, reading)


class RowGroups:
    """The images of some parquet files by their number; row groups are read when needed, the last ones kept."""

    def __init__(self, found: Sequence[File], parts: Sequence[Part], column: str) -> None:
        self.files, self.footers, self.column = found, [part.footer for part in parts], column
        self.groups = [(f, g) for f, footer in enumerate(self.footers) for g in range(footer.num_row_groups)]
        counts = [self.footers[f].row_group(g).num_rows for f, g in self.groups]
        self.starts = np.concatenate([[0], np.cumsum(counts)])
        self.kept: OrderedDict[int, Any] = OrderedDict()
        self.lock = threading.Lock()
        self.reading = [threading.Lock() for _ in range(16)]  # threads that want the same group read it once

    def read(self, index: int) -> tuple[bytes, str]:
        """Return an encoded image and its name."""
        index = range(int(self.starts[-1]))[index]
        k = int(np.searchsorted(self.starts, index, side="right")) - 1
        with self.reading[k % len(self.reading)]:
            group = self.kept.get(k)
            if group is None:
                group = self.load(k)
            self.keep(k, group)
        file, row = self.files[self.groups[k][0]], index - int(self.starts[k])
        name, cell = f"{file.path}: image {row} of row group {self.groups[k][1]}", group[row].as_py()
        data = cell.get("bytes") if isinstance(cell, dict) else cell
        if not isinstance(data, bytes):
            raise BrokenImage(f"{name} is {'a path' if isinstance(cell, dict) and cell.get('path') else 'no bytes'}")
        return data, name

    def load(self, k: int) -> Any:
        """Read the image column of a row group."""
        f, g = self.groups[k]
        file, footer = self.files[f], self.footers[f].row_group(g)
        size = footer.total_byte_size
        if size > MAX_GROUP:
            raise ValueError(f"{file.path}: row group {g} holds {size} bytes, at most {MAX_GROUP} are read at once")

        def reading() -> Any:
            with opened(file, self.footers[f]) as table:
                return table.read_row_group(g, columns=[self.column]).column(self.column)

        return damaged(file, reading)

    def keep(self, k: int, group: Any) -> None:
        """Remember a group as the last one read, and forget those read longest ago."""
        with self.lock:
            self.kept[k] = group
            self.kept.move_to_end(k)
            while len(self.kept) > 1 and sum(each.nbytes for each in self.kept.values()) > CACHE_BYTES:
                self.kept.popitem(last=False)
