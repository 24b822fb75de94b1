"""The authors' released checkpoint as one of ours: sampled, evaluated and fine-tuned like any other."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import torch

from jlt import files
from jlt.data.classes import usual_names
from jlt.data.representations import Representation
from jlt.data.shards import Affine
from jlt.data.writing import identity
from jlt.flow import target as known_target
from jlt.flow.targets import check_floor
from jlt.nn import EMA, Transformer, authors, checkpoint, model_name

DECAYS = (0.9999, 0.9996)  # of model_ema1 and model_ema2, by the recipe; the file does not name them


def import_checkpoint(
    path: Path,
    out: Path,
    representation: Representation,
    *,
    affine: Affine | None = None,
    class_names: Sequence[str] | None = None,
    target: str = "x",
    latent_size: int = 16,
    floor: float = 0.05,
) -> Path:
    """Turn a `checkpoint-last.pth` into a checkpoint folder: `model`, `ema-0.9999` and `ema-0.9996`.

    Nothing in the file is executed; sizes come from its tensors, and every tensor must have its place.

    Args:
        path: the file.
        out: folder for the checkpoint; it must not exist, or be empty.
        representation: what decodes the latents it was trained on.
        affine: what normalises that representation's latents; by default nothing, as with FLUX.2, whose output is.
        class_names: names by label; by default, of 1,000 classes ImageNet's, else 0, 1, ...
        target: what the network predicts, which the file does not say reliably.
        latent_size: side of the latents, which leaves no trace in the tensors.
        floor: bound on |det| in every velocity.
    """
    if files.names(out) or (out.exists() and not out.is_dir()):
        raise ValueError(f"{out} is not an empty folder; a checkpoint has a folder of its own")
    known_target(target)
    check_floor(floor)
    found = authors.read(path)
    config = found.config(latent_size)
    if representation.channels != config.latent_channels:
        raise ValueError(
            f"{path} is of latents with {config.latent_channels} channels, {representation.name} has "
            f"{representation.channels}"
        )
    known = usual_names(config.num_classes) if class_names is None else tuple(class_names)
    names = tuple(map(str, range(config.num_classes))) if known is None else known
    if len(names) != config.num_classes:
        raise ValueError(f"{path} knows {config.num_classes} classes, there are {len(names)} names")
    with torch.device("meta"):  # nothing is allocated for a network that the tensors do not fit
        empty = Transformer(config)
    for state in (found.model, found.ema1, found.ema2):
        checkpoint.check_weights(empty, state, path)
    model = Transformer(config)
    checkpoint.load_weights(model, found.model, path)
    ema = EMA(model, DECAYS)
    for decay, state in zip(DECAYS, (found.ema1, found.ema2), strict=True):
        ema.averages[decay] = {name: state[name].float() for name, _ in model.named_parameters()}
    header = {
        "name": model_name(target, config),
        "target": target,
        "floor": floor,
        "step": 0,  # the file counts epochs, whose steps depend on the batch size
        "seconds": 0.0,
        "origin": {"file": path.name, "sha256": files.sha256(path), "epoch": found.epoch},
        "latents": {
            "affine": dataclasses.asdict(affine or identity(config.latent_channels)),
            "class_names": names,
            "representation_fingerprint": representation.fingerprint,
        },
    }
    files.remove(out)
    checkpoint.save(out, model, ema, None, header, extra=lambda inner: representation.save(inner / "representation"))
    return out
