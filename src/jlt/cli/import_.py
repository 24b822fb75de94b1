"""`jlt import CHECKPOINT OUT` and `jlt import LATENTS OUT`."""

from pathlib import Path
from typing import Annotated

import tyro

from jlt.cli.places import OutPath
from jlt.data import Affine, Representation, load_representation, open_latents
from jlt.data.authors_checkpoint import import_checkpoint
from jlt.data.authors_latents import import_latents
from jlt.data.autoencoders import open_autoencoder


def run(
    source: Annotated[Path, tyro.conf.arg(metavar="CHECKPOINT_OR_LATENTS"), tyro.conf.Positional],
    out: OutPath,
    *,
    representation: str = "flux2",
    latents: Path | None = None,
    target: str = "x",
    latent_size: int = 16,
    floor: float = 0.05,
    num_held_out: int = 0,
    shard_size: int = 4096,
) -> None:
    """Turn what the authors of JLT released into what jlt works with: a checkpoint, or a folder of latents.

    A file is a checkpoint (checkpoint-last.pth): its weights become `model`, its averages `ema-0.9999`, `ema-0.9996`.
    A folder holds latents (safetensors with latents, latents_flip and labels). Nothing in either is executed.

    Args:
        source: the file or the folder.
        out: folder for the checkpoint, or for the latents; a stopped import of latents goes on there.
        representation: what decodes the latents: flux2, flux2-small-decoder or autoencoder:FOLDER_OR_ID.
        latents: a folder made by `jlt encode`, whose representation and class names to take instead.
        target: what a checkpoint's network predicts: x, eps, v.
        latent_size: side of the latents that a checkpoint is for: 16 at 256 px.
        floor: bound on |det| in a checkpoint's velocities.
        num_held_out: latents set apart, evenly over the classes.
        shard_size: latents a shard.
    """
    if not source.exists():
        raise ValueError(f"{source} is not there; a checkpoint's file or a folder of latents is wanted")
    affine: Affine | None = None
    decoder: Representation
    names: tuple[str, ...] | None = None
    if latents is not None:
        manifest = open_latents(latents).manifest
        decoder, affine, names = load_representation(latents / "representation"), manifest.affine, manifest.class_names
    else:
        decoder = open_autoencoder(representation)
    if source.is_dir():
        if affine is not None and not affine.is_identity:
            raise ValueError(
                f"{latents} normalises what its representation gives; the authors' latents are as they are"
            )
        import_latents(source, out, names, decoder, num_held_out, shard_size)
    else:
        import_checkpoint(
            source, out, decoder, affine=affine, class_names=names, target=target, latent_size=latent_size, floor=floor
        )
    print(out)
