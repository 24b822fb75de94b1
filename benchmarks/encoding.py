"""How much of the encoder's own pace an encoding keeps: FLUX.2's autoencoder at full size over 256 px JPEG files.

    python benchmarks/encoding.py

Weights are random, which changes no operation. Three rates, in images a second, in one process and by turns: the
encoder alone on batches in memory; `write_shards`, which reads, decodes, crops, encodes, rounds and writes; and the
source alone. The ratio of the second to the first is the figure (goal: 0.9). The floor is the encoder's: an
image of 256 px takes 273 GFLOP in it (PyTorch's counter), a JPEG file's decoding some milliseconds of one core.
"""

import argparse
import importlib.util
import statistics
import tempfile
import time
from pathlib import Path

import torch
from diffusers import AutoencoderKLFlux2
from PIL import Image

from jlt.data import open_source
from jlt.data.autoencoders import open_autoencoder
from jlt.data.batches import read_batches
from jlt.data.encoding import write_shards
from jlt.data.images import adm_crop
from jlt.processes import Processes


def photographs(folder: Path, count: int) -> None:
    """Write `count` JPEG files of 256 px, from the 20 photographs of the package foolbox."""
    package = importlib.util.find_spec("foolbox")
    assert package is not None and package.origin is not None, "pip install 'jlt[dev]'"  # noqa: PT018
    found = sorted((Path(package.origin).parent / "data").glob("imagenet_*.jpg"))
    folder.mkdir()
    for i in range(count):
        with Image.open(found[i % len(found)]) as image:
            crop = Image.fromarray(adm_crop(image.convert("RGB"), 256))
        crop.rotate(3 * (i // len(found))).save(folder / f"{i:05}.jpg", quality=92)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--images", type=int, default=24)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--dtype", default="float32", help="bfloat16 convolutions are slow on many CPUs")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    device, size, count = torch.device(options.device), options.batch_size, options.images
    with tempfile.TemporaryDirectory() as temporary:
        root = Path(temporary)
        photographs(root / "photos", count)
        torch.manual_seed(0)
        AutoencoderKLFlux2().save_pretrained(root / "vae")
        encoder = open_autoencoder(f"autoencoder:{root / 'vae'}", options.dtype)
        source = open_source(str(root / "photos"), 256)
        batches = [images for images, _ in read_batches(source, 0, count, size)]
        encoder.encode(batches[0].to(device))  # loads the weights
        rates: dict[str, list[float]] = {"encoder alone": [], "encoding": [], "source alone": []}
        settings = {"shard_size": 4096, "mirrored": False}
        for k in range(options.rounds):
            began = time.perf_counter()
            for images in batches:
                encoder.encode(images.to(device)).cpu()
            rates["encoder alone"].append(count / (time.perf_counter() - began))
            began = time.perf_counter()
            write_shards(encoder, source, root / f"train-{k}", settings, size, device, Processes())
            rates["encoding"].append(count / (time.perf_counter() - began))
            began = time.perf_counter()
            assert sum(len(images) for images, _ in read_batches(source, 0, count, size)) == count
            rates["source alone"].append(count / (time.perf_counter() - began))
            print(f"round {k}: " + ", ".join(f"{name} {values[-1]:.3g}" for name, values in rates.items()), flush=True)
    ratio = statistics.median(b / a for a, b in zip(rates["encoder alone"], rates["encoding"], strict=True))
    for name, values in rates.items():
        print(f"{name}: {statistics.median(values):.3g} images/s ({min(values):.3g} to {max(values):.3g})")
    print(f"encoding / encoder alone: {ratio:.3f}")


if __name__ == "__main__":
    main()
