"""Batches of latents from disk: `Latents.gather` against a plain DataLoader, and against reading the same bytes.

    python benchmarks/batches.py [--cold]

8,192 latents of 128 x 16 x 16 in 16 bits (537 MB), batches of 256 in a random order. Warm: the files are in memory, and
a DataLoader takes one sample at a time from the same memory-mapped shards and stacks them. With --cold (root only: it
drops the page cache) each way starts from the disk, and a sequential read of the shards is the floor.
"""

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from jlt.data import Latents, Pixels, open_latents
from jlt.data.writing import identity, read_summaries, write_manifest, write_shard

SHAPE, SHARD, COUNT, BATCH = (128, 16, 16), 1024, 8192, 256


class Samples(Dataset[tuple[Tensor, Tensor]]):
    """One latent at a time, as a plain data set gives them."""

    def __init__(self, latents: Latents) -> None:
        self.latents = latents

    def __len__(self) -> int:
        return len(self.latents)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        raw = self.latents.shards[index // SHARD][index % SHARD]
        return self.latents.manifest.affine.normalise(raw.float()[None])[0], self.latents.labels[index]


def write(folder: Path) -> None:
    """Write the shards."""
    representation = Pixels(SHAPE[0])
    representation.save(folder / "representation")
    (split := folder / "train").mkdir()
    for k in range(COUNT // SHARD):
        values = torch.randn(SHARD, *SHAPE, generator=torch.Generator().manual_seed(k)).half()
        write_shard(split, k, {"latents": values, "labels": torch.arange(SHARD) % 1000})
    summaries, names = read_summaries(split, COUNT // SHARD), tuple(map(str, range(1000)))
    write_manifest(split, summaries, SHAPE, SHARD, names, {}, representation, identity(SHAPE[0]), mirrored=False)


def gather(latents: Latents) -> None:
    order = torch.randperm(COUNT, generator=torch.Generator().manual_seed(0))
    batch = torch.empty(BATCH, *SHAPE)  # as in training, whose batches use the same memory again
    for part in order.split(BATCH):
        latents.gather(part, out=batch)


def loader(latents: Latents) -> None:
    for _ in DataLoader(Samples(latents), batch_size=BATCH, shuffle=True):
        pass


def sequential(latents: Latents) -> None:
    for path in sorted(latents.folder.glob("*.safetensors")):
        with path.open("rb", buffering=0) as file:
            while file.read(2**24):
                pass


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--cold", action="store_true")
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    ways: dict[str, Callable[[Latents], None]] = {"gather": gather, "DataLoader": loader, "sequential read": sequential}
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    with tempfile.TemporaryDirectory(dir=".") as temporary:
        folder = Path(temporary)
        write(folder)
        latents = open_latents(folder)
        for k in range(options.rounds + 1):
            for name, way in ways.items():
                if options.cold:
                    del latents
                    os.sync()  # what is not written yet, or mapped, cannot be dropped
                    Path("/proc/sys/vm/drop_caches").write_text("1\n")
                    latents = open_latents(folder)  # reads a sixteenth of it, to check its statistics
                began = time.perf_counter()
                way(latents)
                if k:
                    seconds[name].append(time.perf_counter() - began)
    for name, values in seconds.items():
        print(f"{name}: {COUNT / statistics.median(values):,.0f} images/s ({min(values):.3g} to {max(values):.3g} s)")
    for name in ("DataLoader", "sequential read"):
        ratios = [b / a for a, b in zip(seconds["gather"], seconds[name], strict=True)]
        print(f"gather against {name}: {statistics.median(ratios):.2f} times as fast")


if __name__ == "__main__":
    main()
