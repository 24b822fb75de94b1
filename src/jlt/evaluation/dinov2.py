"""DINOv2: features of a network trained without labels, on which a distance follows people's judgement more closely
than FID does (Stein et al. 2023, arXiv 2306.04675).

The network is a folder in the format of transformers: config.json and model.safetensors, such as those of
`facebook/dinov2-large` (ViT-L/14, which that paper uses). Images are resized to 224 x 224 as Pillow does (bicubic,
antialiased, width before height, each rounded to 8 bits; the aspect is not kept) and normalised by ImageNet's mean and
deviation; features are the class token after the last norm. So it is in the paper's own code, dgm-eval, but for two
details: a pixel may be rounded the other way, and transformers interpolates the position embeddings to the exact size,
where the network's first code adds 0.1 to it. The features are therefore close to dgm-eval's and not equal.

The hash of the published weights is not known here, so the name always tells the hash of the file that was used.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, UInt8
from torch import Tensor

from jlt import files
from jlt.extras import needed

WEIGHTS = "model.safetensors"
INPUT_SIZE = 224
MEAN, DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
# what the weights do not tell, and the features depend on
STATED = ("num_attention_heads", "patch_size", "layer_norm_eps", "hidden_act", "use_swiglu_ffn")


@dataclass(frozen=True)
class DINOv2:
    """The class token of a network; `network` maps (b, 3, 224, 224) floats to (b, d)."""

    network: Callable[[Tensor], Tensor]
    name: str
    fingerprint: str
    dimension: int

    def __call__(self, images: UInt8[Tensor, "b c h w"]) -> Float[Tensor, "b d"]:
        pixels = prepare(images) / 255
        mean, deviation = (torch.tensor(side, device=images.device)[:, None, None] for side in (MEAN, DEVIATION))
        return self.network((pixels - mean) / deviation)


def prepare(images: UInt8[Tensor, "b c h w"]) -> Float[Tensor, "b 3 224 224"]:
    """Resize to 224 x 224, still 0 to 255; images of that size stay as they are."""
    pixels = images.float()
    for size in ((images.shape[2], INPUT_SIZE), (INPUT_SIZE, INPUT_SIZE)):
        pixels = F.interpolate(pixels, size, mode="bicubic", antialias=True).round().clamp(0, 255)
    return pixels.expand(-1, 3, -1, -1)


def dinov2(folder: str = "") -> DINOv2:
    """Return the network in a folder; nothing is downloaded, and nothing but safetensors is read.

    Raises a ValueError that says what to fetch if the folder or its weights are not there, or what to install.
    """
    path = Path(folder) / WEIGHTS
    if not folder or not path.is_file():
        raise ValueError(
            f"{path if folder else 'extractor dinov2'} names no weights; fetch config.json and {WEIGHTS} of "
            "facebook/dinov2-large and name their folder as extractor dinov2:FOLDER"
        )
    with needed("DINOv2", "dinov2"):
        from transformers import Dinov2Model
        from transformers.utils import logging
    stated = files.read_json(path.with_name("config.json"))
    if not isinstance(stated, dict) or stated.get("model_type") != "dinov2":
        other = stated.get("model_type") if isinstance(stated, dict) else stated
        raise ValueError(f"{path.with_name('config.json')} describes {other!r:.40}, a dinov2 is wanted")
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    kind: Any = Dinov2Model
    try:
        model, told = kind.from_pretrained(
            folder, local_files_only=True, use_safetensors=True, dtype=torch.float32, output_loading_info=True
        )
    except Exception as error:  # a damaged file or a wrong shape raises half a dozen kinds
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(f"{path} does not hold the weights of its config.json: {reason}") from None
    finally:
        if shown:
            logging.enable_progress_bar()
    if missing := sorted(told["missing_keys"]):  # which transformers would fill with random numbers
        raise ValueError(f"{path} lacks {len(missing)} tensors of its config.json, such as {missing[0]}")
    model = model.eval().requires_grad_(False)

    def network(inputs: Tensor) -> Tensor:
        with torch.no_grad(), torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
            tokens: Tensor = model.to(inputs.device)(inputs).last_hidden_state
        return tokens[:, 0]

    sha = files.sha256(path)
    settings = {name: getattr(model.config, name) for name in STATED}
    identity = {"weights": sha, "settings": settings, "input": "bicubic antialias 224, 8 bits", "output": "class token"}
    return DINOv2(network, f"DINOv2 {sha[:8]}", files.fingerprint(identity), int(model.config.hidden_size))
