"""`jlt encode SOURCE OUT`."""

import json as json_module
import os

from jlt import files
from jlt.cli.places import OutPath, SourceSpec
from jlt.data import encode, open_latents, splits


def run(
    source: SourceSpec,
    out: OutPath,
    *,
    representation: str = "patch-pca",
    image_size: int | None = None,
    stride: int | None = None,
    channels: int | None = None,
    num_held_out: int = 0,
    normalise: str | None = None,
    mirrored: bool = False,
    shard_size: int = 4096,
    batch_size: int | None = None,
    dtype: str = "float32",
    skip_broken: bool = False,
    upscale: bool = False,
    device: str = "cpu",
    json: bool = False,
) -> None:
    """Turn images into latents on disk; the same command again continues where it stopped.

    On several GPUs: torchrun --nproc-per-node 8 -m jlt encode ... --device cuda

    Args:
        source: a folder of class folders or of images; tar:, parquet: or idx: and a path; hf: and a data set's name on
            the Hub; or mnist. Paths may be URLs such as s3://bucket/folder.
        out: folder for the latents; it must be new, empty, or of this very encoding.
        representation: patch-pca, fitted to the training images; pixels; flux2 or flux2-small-decoder, the FLUX.2
            autoencoder; autoencoder:FOLDER_OR_ID, any image autoencoder of diffusers; or of:FOLDER, the one of other
            latents or of a run, with their normalisation (to fine-tune that run).
        image_size: side of the square crop (256 by default; digits are padded to 32).
        stride: side of a patch, 4 by default (patch-pca).
        channels: components kept (patch-pca), all by default.
        num_held_out: images set apart, evenly over the classes.
        normalise: global (one scale, the mean channel variance becomes 1), channel (one each, every variance does), or
            none; by default what the representation calls for.
        mirrored: encode the mirror image of each training image, too.
        shard_size: images a shard.
        batch_size: images at once, 256 by default, or 16 for an autoencoder.
        dtype: of an autoencoder's weights, float32 or bfloat16.
        skip_broken: leave out images that cannot be decoded, and count them, instead of stopping at the first.
        upscale: enlarge images that are smaller than the crop, instead of stopping at the first.
        device: where the representation runs: cpu, cuda (under torchrun each process has its own), mps.
        json: print a summary as JSON instead of the folder.
    """
    encode(
        source, out, representation=representation, image_size=image_size, stride=stride, channels=channels,
        num_held_out=num_held_out, normalise=normalise, mirrored=mirrored, shard_size=shard_size,
        batch_size=batch_size, dtype=dtype, skip_broken=skip_broken, upscale=upscale, device=device,
        announce=None if json else print,
    )  # fmt: skip
    if int(os.environ.get("RANK", "0")):
        return  # the first of torchrun's processes tells what all have made
    made = {split: open_latents(out, split) for split in splits(out)}
    skipped = len(files.read_json(out / "skipped.json")) if skip_broken else 0
    summary = {
        "folder": str(out),
        "images": sum(len(latents) for latents in made.values()),
        "skipped": skipped,
        "shape": made["train"].shape,
        "classes": made["train"].num_classes,
        "bytes": sum(file.stat().st_size for file in out.rglob("*") if file.is_file()),
        "splits": {split: len(latents) for split, latents in made.items()},
    }
    if json:
        print(json_module.dumps(summary))
        return
    if skip_broken:
        print(f"{skipped} images cannot be decoded and are left out; {out / 'skipped.json'} names them")
    print(out)
