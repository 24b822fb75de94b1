"""Tar shards in the WebDataset layout, local or remote: images are read where they lie, nothing is unpacked.

A member KEY.jpg (.jpeg, .png, .webp) is an image; its label is the whole number that KEY.cls holds as text, or KEY.json
as {"label": 3}. A key is a member's name up to the first dot of its last part. Samples come in the order of shards (by
name, or as braces count) and of images in them. The class names are the lines of classes.txt beside the shards, or
"0", "1", ...; images have labels all or none.

Shards are uncompressed, as GNU tar and Python write them and POSIX states. Each is indexed once, by its headers alone.
What is no image and no label is passed over: folders, other files, hidden names, labels without an image. What could
lead out of an archive, or deceive, is refused with the member's name: links, devices, sparse files, absolute names and
names with `..`, a key's second image or second label, images above MAX_IMAGE bytes, labels and long names above
MAX_TEXT, and archives that are cut, have no end mark, or go on after it.
"""

import json
import os
import re
import tarfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import BinaryIO

import numpy as np

from jlt import files
from jlt.data import remote
from jlt.data.classes import name_classes
from jlt.data.folders import list_names, read
from jlt.data.images import SUFFIXES
from jlt.data.photos import IMAGE_SIZE, Photos
from jlt.data.remote import File

BLOCK = tarfile.BLOCKSIZE
MAX_IMAGE, MAX_TEXT = 2**28, 2**20
MAX_SHARDS = 10**5  # that braces may stand for


@dataclass(frozen=True, slots=True)
class Member:
    """A file in an archive: its name, and where its content lies."""

    name: str
    offset: int
    size: int


def open_tar(path: str, image_size: int | None = None, upscale: bool = False) -> Photos:
    """Open tar shards: a folder of *.tar, one file, or a pattern such as train-{0000..0146}.tar or train-*.tar."""
    path, side = remote.absolute(path), image_size or IMAGE_SIZE
    shards = find_shards(path)
    with ThreadPoolExecutor() as pool:
        indexed = list(pool.map(index, shards))
    images = [(shard, member) for shard, found in zip(shards, indexed, strict=True) for member, _ in found]
    labels = np.array([label for found in indexed for _, label in found], dtype=np.int64)
    if not images:
        raise ValueError(f"{path} holds no image ({', '.join(SUFFIXES)}) in {len(shards)} shards")
    beside = shards[0].path.rpartition("/")[0]
    names = read_names(f"{beside}/classes.txt")

    def read_member(i: int) -> tuple[bytes, str]:
        shard, member = images[i]
        with remote.open_whole(shard) as file:
            return content(file, member, shard.path), f"{shard.path}: {member.name}"

    return Photos(
        spec=f"tar:{path}",
        read=read_member,
        targets=labels,
        class_names=name_classes(labels, names, path),
        image_size=side,
        upscale=upscale,
        fingerprint=files.fingerprint([list_names(shards, beside), names, side]),
    )


def find_shards(path: str) -> list[File]:
    """List the shards that a path, a folder, or a pattern names; what exists is no pattern."""
    literal = os.path.exists(path)
    expanded = [path] if literal else list(braces(path))
    if len(expanded) > 1:
        return [remote.file_at(each) for each in expanded]
    pattern = not literal and re.search(r"[*?\[]", path)
    shards = remote.matching(path) if pattern else remote.list_files(path, "*.tar")
    if not shards:
        raise ValueError(f"{path} names no tar file")
    return shards


def braces(pattern: str) -> Iterator[str]:
    """Write out {0000..0146} as numbers of that many digits, and {a,b} as each."""
    found = re.search(r"\{(\d+)\.\.(\d+)\}|\{([^{}]*,[^{}]*)\}", pattern)
    if found is None:
        yield pattern
        return
    first, last, listed = found.groups()
    if listed is None and int(last) - int(first) >= MAX_SHARDS:
        raise ValueError(f"{found[0]} stands for {int(last) - int(first) + 1} shards, at most {MAX_SHARDS} are read")
    if listed is None and int(last) < int(first):
        raise ValueError(f"{found[0]} counts down; write the lower number first")
    options = listed.split(",") if listed is not None else (
        f"{k:0{len(first)}d}" for k in range(int(first), int(last) + 1)
    )  # fmt: skip
    for option in options:
        for rest in braces(pattern[found.end() :]):
            yield pattern[: found.start()] + option + rest


def read_names(path: str) -> list[str] | None:
    """Return the lines of a text file; None if there is no such file."""
    try:
        return read(remote.file_at(path)).decode().splitlines()
    except FileNotFoundError:
        return None
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is no text: {error}") from None


def index(shard: File) -> list[tuple[Member, int]]:
    """Return the images of a shard in their order, each with its label, or -1."""
    images: dict[str, Member] = {}
    labels: dict[str, int] = {}
    with remote.open_whole(shard) as file:
        for member in members(file, shard):
            folder, _, base = member.name.rpartition("/")
            stem, _, suffix = base.partition(".")
            key, suffix = f"{folder}/{stem}", f".{suffix.lower()}"
            if not stem or suffix not in (*SUFFIXES, ".cls", ".json"):
                continue
            if suffix in SUFFIXES:
                if key in images:
                    raise ValueError(f"{shard.path}: {member.name} is a second image beside {images[key].name}")
                if member.size > MAX_IMAGE:
                    raise ValueError(f"{shard.path}: {member.name} has {member.size} bytes, images at most {MAX_IMAGE}")
                images[key] = member
            elif (label := read_label(file, member, shard.path)) is not None:
                if key in labels:
                    raise ValueError(f"{shard.path}: {member.name} gives its image a second label")
                labels[key] = label
    return [(member, labels.get(key, -1)) for key, member in images.items()]


def read_label(file: BinaryIO, member: Member, path: str) -> int | None:
    """Return the label that a .cls or .json member gives; JSON without a label gives None."""
    if member.size > MAX_TEXT:
        raise ValueError(f"{path}: {member.name} has {member.size} bytes, labels at most {MAX_TEXT}")
    data = content(file, member, path)
    try:
        value = json.loads(data)
    except (ValueError, RecursionError):
        value = data
    if member.name.lower().endswith(".json"):
        if not isinstance(value, dict):
            raise ValueError(f'{path}: {member.name} is {data[:40]!r}, an object like {{"label": 3}} is wanted')
        if "label" not in value:
            return None
        value = value["label"]
    if type(value) is not int or not 0 <= value < 2**63:
        raise ValueError(f"{path}: {member.name} gives the label {value!r:.40}, a whole number from 0 on is wanted")
    return value


def content(file: BinaryIO, member: Member, path: str) -> bytes:
    """Read a member's content."""
    file.seek(member.offset)
    data = file.read(member.size)
    if len(data) < member.size:
        raise ValueError(f"{path} ends after {len(data)} of the {member.size} bytes of {member.name}")
    return data


def members(file: BinaryIO, shard: File) -> Iterator[Member]:
    """Yield the files of a tar archive in their order, reading headers alone; see the module on what is refused.

    The standard library's reader takes several times as long, and as much memory as a long name claims.
    """
    offset, long_name, records = 0, "", dict[str, str]()
    while True:
        file.seek(offset)
        block = file.read(BLOCK)
        if len(block) < BLOCK:
            raise ValueError(f"{shard.path} ends at byte {shard.size} without the end mark of a whole tar file")
        if not any(block):
            if any(file.read(2 * BLOCK)[BLOCK:]):
                raise ValueError(f"{shard.path} goes on after its end mark at byte {offset}; one archive is wanted")
            return
        header = decode_header(block)
        if header is None:
            raise ValueError(f"{shard.path} holds no tar header at byte {offset}")
        kind, size, stated_name = header
        name = records.get("path") or long_name or stated_name
        shown = name.encode(errors="replace").decode()
        start = offset + BLOCK
        if kind == tarfile.DIRTYPE:
            size = 0  # what a folder's header states is no content
        elif kind not in EXTENSIONS and "size" in records:
            size = number(records["size"])
        if kind not in (tarfile.REGTYPE, tarfile.AREGTYPE, tarfile.CONTTYPE, tarfile.DIRTYPE, *EXTENSIONS):
            raise ValueError(f"{shard.path}: {shown} is {KINDS.get(kind, f'of type {kind!r}')}, files are wanted")
        if not 0 <= size <= shard.size - start:
            raise ValueError(f"{shard.path}: {shown} has {size} bytes, {shard.size - start} are left in the archive")
        offset = start + -(-size // BLOCK) * BLOCK
        if kind in EXTENSIONS:
            if size > MAX_TEXT:
                raise ValueError(
                    f"{shard.path}: a header of {size} bytes stands at {start}, at most {MAX_TEXT} are read"
                )
            text = file.read(size)
            if kind == tarfile.GNUTYPE_LONGNAME:
                long_name = text.rstrip(b"\0").decode(errors="surrogateescape")
            elif kind == tarfile.XHDTYPE:
                records = pax_records(text, shard.path)
            continue
        long_name, records_used, records = "", records, {}
        if any(key.startswith("GNU.sparse") for key in records_used):
            raise ValueError(f"{shard.path}: {shown} is a sparse file, whole files are wanted")
        parts = name.split("/")
        if name.startswith("/") or ".." in parts:
            raise ValueError(f"{shard.path}: {shown} leads out of the archive")
        if kind != tarfile.DIRTYPE and not any(part.startswith(".") and part != "." for part in parts):
            yield Member(shown, start, size)


def decode_header(block: bytes) -> tuple[bytes, int, str] | None:
    """Return type, size and name as a header block states them; None if its checksum or its size is none."""
    checksum, size = octal(block[148:156]), octal(block[124:136])
    if block[124] == 0x80:  # GNU writes what octal digits cannot hold as a binary number
        size = int.from_bytes(block[125:136])
    if size < 0 or checksum != sum(block) - sum(block[148:156]) + 8 * ord(" "):
        return None
    name, kind = block[:100].partition(b"\0")[0], block[156:157]
    if block[257:263] == b"ustar\0" and block[345]:
        name = block[345:500].partition(b"\0")[0] + b"/" + name
    if kind == tarfile.AREGTYPE and name.endswith(b"/"):  # as archives older than types of members mark a folder
        kind = tarfile.DIRTYPE
    return kind, size, name.decode(errors="surrogateescape")


def octal(field: bytes) -> int:
    """Return the number in a header's field, -1 for anything else; an empty field is 0."""
    digits = field.partition(b"\0")[0].strip(b" ")
    return int(digits, 8) if re.fullmatch(rb"[0-7]+", digits) else -1 if digits else 0


# headers that tell more of the next member, or (global ones) of all, which nothing here needs
EXTENSIONS = (tarfile.GNUTYPE_LONGNAME, tarfile.XHDTYPE, tarfile.XGLTYPE)
KINDS = {
    tarfile.LNKTYPE: "a link", tarfile.SYMTYPE: "a link", tarfile.GNUTYPE_LONGLINK: "a link",
    tarfile.CHRTYPE: "a device", tarfile.BLKTYPE: "a device", tarfile.FIFOTYPE: "a pipe",
    tarfile.GNUTYPE_SPARSE: "a sparse file",
}  # fmt: skip


def pax_records(text: bytes, path: str) -> dict[str, str]:
    """Read the records "LENGTH KEY=VALUE\\n" of a POSIX extended header."""
    records, rest = {}, text
    while rest.strip(b"\0"):
        found = re.match(rb"(\d{1,7}) ([^=]+)=", rest)
        length = int(found[1]) if found else 0
        if found is None or not found.end() < length <= len(rest) or rest[length - 1 : length] != b"\n":
            raise ValueError(f"{path} holds a malformed extended header: {rest[:40]!r}")
        key, value = found[2].decode(errors="replace"), rest[found.end() : length - 1]
        records[key] = value.decode(errors="surrogateescape")
        rest = rest[length:]
    return records


def number(text: str) -> int:
    """Return a decimal number, or -1 for anything else."""
    return int(text) if re.fullmatch(r"[0-9]{1,18}", text) else -1
