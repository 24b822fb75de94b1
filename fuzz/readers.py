"""Coverage-guided fuzzing of the readers of foreign files: whatever the bytes, a ValueError or an OSError, or a result.

    pip install atheris
    python fuzz/readers.py idx -max_total_time=600
    python fuzz/readers.py manifest -max_total_time=600
    python fuzz/readers.py tar -max_total_time=600 -max_len=16384

Options after the reader's name are libFuzzer's. A crash writes its input to a file of the working folder; give that
file as an argument to see it again. What runs have found stands in docs/failures.md.
"""

import contextlib
import gzip
import io
import json
import sys
import tarfile
import tempfile
from collections.abc import Callable
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["jlt"]):
    from jlt.data import idx, tar
    from jlt.data.remote import File
    from jlt.data.shards import MANIFEST, read_manifest

FOLDER = Path(tempfile.mkdtemp()) / "train"  # a manifest names its folder
FOLDER.mkdir()


def read_idx(data: bytes) -> None:
    """Read as IDX images or labels, plain or compressed, by the first byte."""
    kind, body = (data[0] if data else 0), data[1:]
    path = FOLDER / ("file.gz" if kind & 1 else "file")
    path.write_bytes(gzip.compress(body, compresslevel=1) if kind & 2 else body)
    array = idx.read_idx(path, dimensions=1 if kind & 4 else 3)
    assert array.size <= len(body)


def read_split(data: bytes) -> None:
    """Read as a split's manifest."""
    (FOLDER / MANIFEST).write_bytes(data)
    manifest = read_manifest(FOLDER)
    assert sum(count for _, count, _ in manifest.shards) == manifest.num_images


def read_tar(data: bytes) -> None:
    """Read as a tar shard; an odd first byte mends the checksums, which chance would hardly meet."""
    body = bytearray(data[1:])
    for start in range(0, len(body) - 511, 512) if data[:1] and data[0] & 1 else ():
        body[start + 148 : start + 156] = b" " * 8
        body[start + 148 : start + 156] = b"%06o\0 " % sum(body[start : start + 512])
    path = FOLDER / "shard.tar"
    path.write_bytes(body)
    shard = File(str(path), len(body))
    for member, label in tar.index(shard):
        assert label >= -1
        assert 0 < member.offset <= member.offset + member.size <= len(body)
        assert not member.name.startswith("/")
        assert ".." not in member.name.split("/")


READERS: dict[str, Callable[[bytes], None]] = {"idx": read_idx, "manifest": read_split, "tar": read_tar}


def shard(form: int) -> bytes:
    """Return a small shard with a long name."""
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=form) as archive:
        for name, content in (
            ("a.jpg", b"x"),
            ("a.cls", b"1"),
            (f"{'b' * 80}/{'c' * 90}.png", b""),
            ("d.json", b'{"label": 2}'),
        ):
            header = tarfile.TarInfo(name)
            header.size = len(content)
            archive.addfile(header, io.BytesIO(content))
    return file.getvalue()


SEEDS: dict[str, list[bytes]] = {
    "idx": [
        b"\0" + bytes([0, 0, 8, 3, 0, 0, 0, 1, 0, 0, 0, 2, 0, 0, 0, 2, 1, 2, 3, 4]),
        b"\7" + bytes([0, 0, 8, 1, 0, 0, 0, 0]),
    ],
    "manifest": [
        json.dumps(
            {
                "format_version": 1, "split": "train", "num_images": 3, "shard_size": 2, "shape": [1, 2, 2],
                "class_names": ["a", "b"], "source": {"images": "0"}, "representation": "pixels",
                "representation_fingerprint": "0", "affine": {"shift": [0.0], "scale": [1.0]}, "mean": [0.0],
                "variance": [1.0], "mirrored": False, "dtype": "float16",
                "shards": [["shard-00000.safetensors", 2, "0"], ["shard-00001.safetensors", 1, "0"]],
            }
        ).encode()
    ],
    "tar": [b"\0" + shard(form) for form in (tarfile.GNU_FORMAT, tarfile.PAX_FORMAT, tarfile.USTAR_FORMAT)],
}  # fmt: skip


def main() -> None:
    """Fuzz the reader that the first argument names."""
    if len(sys.argv) < 2 or sys.argv[1] not in READERS:
        sys.exit(f"usage: python fuzz/readers.py {{{','.join(READERS)}}} [libFuzzer options]")
    name = sys.argv.pop(1)

    def once(data: bytes) -> None:
        with contextlib.suppress(ValueError, OSError):
            READERS[name](data)

    corpus = Path(tempfile.mkdtemp())
    for i, seed in enumerate(SEEDS[name]):
        READERS[name](seed)  # a seed is a whole file
        (corpus / str(i)).write_bytes(seed)
    atheris.Setup([sys.argv[0], *sys.argv[1:], str(corpus)], once)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
