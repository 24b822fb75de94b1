"""The authors' released checkpoints (`checkpoint-last.pth`), read without running code from the file.

Their file is a pickle of `model`, `model_ema1`, `model_ema2`, `epoch` and `args`, an `argparse.Namespace`; PyTorch's
restricted loader is allowed exactly that class. The sizes are read from the tensors, since `args` may name another
model. `MAPPING` turns their names into ours:

    theirs                                      ours
    net.x_embedder.proj (D, C, p, p)            embed (D, p p C), transposed to (row, column, channel)
    net.t_embedder.mlp.0, .2                    time.hidden, time.out
    net.y_embedder.embedding_table              label
    net.blocks.I.norm1, .norm2                  blocks.I.norm_attention, .norm_mlp
    net.blocks.I.attn.{qkv,proj}                blocks.I.{qkv,project}
    net.blocks.I.attn.{q_norm,k_norm}           blocks.I.{norm_q,norm_k}
    net.blocks.I.mlp.{w12,w3}                   blocks.I.{mlp_in,mlp_out}
    net.blocks.I.adaLN_modulation.1             blocks.I.modulation
    net.final_layer.norm_final                  norm
    net.final_layer.adaLN_modulation.1          modulation
    net.final_layer.linear                      output
    net.mask_token                              dropped: no forward pass uses it
"""

import argparse
import re
import warnings
import zipfile
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from jlt.nn.transformer import TransformerConfig

MAPPING = (
    (r"net\.x_embedder\.proj\.", "embed."),
    (r"net\.t_embedder\.mlp\.0\.", "time.hidden."),
    (r"net\.t_embedder\.mlp\.2\.", "time.out."),
    (r"net\.y_embedder\.embedding_table\.", "label."),
    (r"net\.blocks\.(\d+)\.norm1\.", r"blocks.\1.norm_attention."),
    (r"net\.blocks\.(\d+)\.norm2\.", r"blocks.\1.norm_mlp."),
    (r"net\.blocks\.(\d+)\.attn\.qkv\.", r"blocks.\1.qkv."),
    (r"net\.blocks\.(\d+)\.attn\.proj\.", r"blocks.\1.project."),
    (r"net\.blocks\.(\d+)\.attn\.([qk])_norm\.", r"blocks.\1.norm_\2."),
    (r"net\.blocks\.(\d+)\.mlp\.w12\.", r"blocks.\1.mlp_in."),
    (r"net\.blocks\.(\d+)\.mlp\.w3\.", r"blocks.\1.mlp_out."),
    (r"net\.blocks\.(\d+)\.adaLN_modulation\.1\.", r"blocks.\1.modulation."),
    (r"net\.final_layer\.norm_final\.", "norm."),
    (r"net\.final_layer\.adaLN_modulation\.1\.", "modulation."),
    (r"net\.final_layer\.linear\.", "output."),
)


@dataclass(frozen=True)
class AuthorsCheckpoint:
    """What a released checkpoint holds: state dicts under our names, the patch size, and the epoch."""

    model: dict[str, Tensor]
    ema1: dict[str, Tensor]
    ema2: dict[str, Tensor]
    patch_size: int
    epoch: int

    def config(self, latent_size: int) -> TransformerConfig:
        """Read the network's configuration from the tensors' shapes; the latent size leaves no trace in them."""
        hidden_size, patch = self.model["embed.weight"].shape
        return TransformerConfig(
            latent_size=latent_size,
            latent_channels=patch // self.patch_size**2,
            patch_size=self.patch_size,
            hidden_size=hidden_size,
            depth=1 + max(int(name.split(".")[1]) for name in self.model if name.startswith("blocks.")),
            num_heads=hidden_size // self.model["blocks.0.norm_q.weight"].shape[0],
            num_classes=self.model["label.weight"].shape[0] - 1,
        )


def read(path: Path) -> AuthorsCheckpoint:
    """Read a released checkpoint.

    A file that needs any class but argparse.Namespace is refused unread; it and any other file are a ValueError.
    """
    if not path.is_file():
        raise ValueError(f"{path} is not a file; an authors' checkpoint is one .pth file")
    refuse_bomb(path)
    try:
        with torch.serialization.safe_globals([argparse.Namespace]), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of pickle protocols other than theirs, which are refused or read as well
            data = torch.load(path, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except Exception as error:  # the unpickler's are of any kind: a KeyError of text, an IndexError of nothing
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise ValueError(f"{path} is not a checkpoint that may be loaded without running code: {reason}") from None
    expected = {"model", "model_ema1", "model_ema2", "epoch"}
    if not isinstance(data, dict) or not expected <= data.keys():
        found = sorted(map(str, data)) if isinstance(data, dict) else type(data).__name__
        raise ValueError(f"{path} holds {found}, an authors' checkpoint holds {sorted(expected)}")
    try:
        model, ema1, ema2 = (rename(data[key]) for key in ("model", "model_ema1", "model_ema2"))
        patch_size = data["model"]["net.x_embedder.proj.weight"].shape[-1]
        opened = AuthorsCheckpoint(model, ema1, ema2, patch_size, int(data["epoch"]))
        opened.config(patch_size)
    except (LookupError, TypeError, AttributeError, RuntimeError, ArithmeticError) as error:
        raise ValueError(f"{path} is not laid out as the authors' checkpoints are: {error}") from None
    return opened


def refuse_bomb(path: Path) -> None:
    """Raise a ValueError for an archive that would unpack to more than it weighs; PyTorch compresses none."""
    if zipfile.is_zipfile(path):
        try:
            with zipfile.ZipFile(path) as archive:
                unpacked, weight = sum(entry.file_size for entry in archive.infolist()), path.stat().st_size
        except zipfile.BadZipFile as error:
            raise ValueError(f"{path} is a damaged archive: {error}") from None
        if unpacked > weight:
            raise ValueError(
                f"{path} has {weight} bytes and would unpack to {unpacked}; a checkpoint is not compressed"
            )


def rename(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Turn the authors' state dict into ours; a name that MAPPING does not know is a ValueError."""
    renamed = {}
    for theirs, tensor in state.items():
        if theirs == "net.mask_token":
            continue
        ours = next((re.sub(a, b, theirs) for a, b in MAPPING if re.match(a, theirs)), None)
        if ours is None:
            raise ValueError(f"tensor {theirs!r} is not part of the authors' backbone")
        renamed[ours] = tensor.permute(0, 2, 3, 1).flatten(1) if ours == "embed.weight" else tensor
    return renamed
