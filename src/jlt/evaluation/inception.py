"""The Inception network of FID: the 2015 TensorFlow weights, in torch-fidelity's port of that graph.

Images of any size are resized to 299 x 299 as TensorFlow 1 did (bilinear, not antialiased, corners not aligned) and
mapped to (x - 128)/128. A pass gives three views of an image, in float32:

    features  2,048   pool_3, after the last average pooling: FID, KID, precision and recall
    spatial   2,023   the first 7 channels of mixed_6/conv, 17 x 17 x 7 in (row, column, channel) order: sFID, as in ADM
    logits    1,008   without the bias, as in the first Inception Score

The weights are one file, which no package holds: `WEIGHTS`, 96 MB, from `URL`. Only the file with the right SHA-256
gives results that are called FID.
"""

import importlib
import importlib.util
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from jlt import files
from jlt.extras import needed

WEIGHTS = "weights-inception-2015-12-05-6726825d.pth"
URL = f"https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/{WEIGHTS}"
SHA256 = "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"
OUTPUTS = ("2048", "logits_unbiased")
SPATIAL_CHANNELS = 7


def identify(sha256: str) -> str:
    """Return the fingerprint of features by the weights of that hash."""
    return files.fingerprint({"weights": sha256, "input": "TensorFlow 1 bilinear 299, (x - 128)/128"})


FINGERPRINT = identify(SHA256)  # of what FID is measured with


@dataclass(frozen=True)
class Inception:
    """The network and what names it; an `Extractor` by its `features`."""

    network: Any
    name: str
    fingerprint: str
    dimension: int = 2048

    def __call__(self, images: UInt8[Tensor, "b c h w"]) -> Float[Tensor, "b d"]:
        return self.views(images)["features"]

    def views(self, images: UInt8[Tensor, "b c h w"]) -> dict[str, Float[Tensor, "b _"]]:
        """Return `features`, `spatial` and `logits`, a row an image."""
        spatial: list[Tensor] = []
        tap = self.network.Mixed_6d.branch1x1  # TensorFlow's mixed_6/conv
        handle = tap.register_forward_hook(lambda module, inputs, output: spatial.append(output))
        try:
            # convolutions on a GPU would else round their inputs to 10 bits
            with torch.no_grad(), torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
                features, logits = self.network.to(images.device)(images.expand(-1, 3, -1, -1))
        finally:
            handle.remove()
        return {
            "features": features,
            "spatial": spatial[0][:, :SPATIAL_CHANNELS].permute(0, 2, 3, 1).flatten(1),
            "logits": logits,
        }


def inception(path: str = "") -> Inception:
    """Return the network of FID, its weights from a file or from where torch-fidelity keeps them.

    Raises a ValueError that says what to fetch, from where and to where, if they are not there; if torch-fidelity is
    missing; or if the file is another.
    """
    weights = find(path)
    if (found := files.sha256(weights)) != SHA256:
        raise ValueError(
            f"{weights} has SHA-256 {found}, FID's Inception has {SHA256}; "
            "with extractor inception-unverified it is used all the same, and the result is not called FID"
        )
    return Inception(load_network(weights), "Inception", FINGERPRINT)


def unverified(path: str = "") -> Inception:
    """Return the network with whatever weights a file holds; its name tells their hash, and no metric is called FID."""
    weights = find(path)
    found = files.sha256(weights)
    return Inception(load_network(weights), f"Inception {found[:8]}", identify(found))


def find(path: str) -> Path:
    """Return where the weights are: at `path`, or else in PyTorch Hub's cache."""
    weights = Path(path) if path else Path(torch.hub.get_dir()) / "checkpoints" / WEIGHTS
    if not weights.is_file():
        raise ValueError(
            f"{weights} is not there; FID needs {WEIGHTS} from {URL}, in {weights.parent} "
            "or anywhere as extractor inception:PATH"
        )
    return weights


def load_network(weights: Path) -> Any:
    """Return the network in evaluation mode with the weights of a file, read without running code from it."""
    network = bare_network()
    try:
        network.load_state_dict(torch.load(weights, map_location="cpu", weights_only=True))
    except Exception as error:  # PyTorch raises half a dozen kinds for a file that is none of its own
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(f"{weights} does not hold weights of torch-fidelity's Inception: {reason}") from None
    return network


def bare_network() -> Any:
    """Return torch-fidelity's network without its weights.

    The package imports torchvision for its other networks, and the constructor downloads weights, or unpickles them. So
    the one module is imported alone, under the package's name for as long as that takes, and its loading left out.
    """
    name = "torch_fidelity"
    with needed("FID", "fid"):
        if (spec := importlib.util.find_spec(name)) is None:
            raise ImportError(f"No module named {name!r}")
    loaded = {key: sys.modules.pop(key) for key in list(sys.modules) if key.split(".")[0] == name}
    try:
        sys.modules[name] = importlib.util.module_from_spec(spec)  # not executed
        module: Any = importlib.import_module(f"{name}.feature_extractor_inceptionv3")
    finally:
        for key in [key for key in sys.modules if key.split(".")[0] == name]:
            del sys.modules[key]
        sys.modules.update(loaded)
    kind = module.FeatureExtractorInceptionV3  # ours alone, so that changing it changes nothing elsewhere
    module.load_state_dict_from_url = lambda url, progress: {}
    kind.load_state_dict = lambda self, state: None
    network = kind("inception", list(OUTPUTS))
    del kind.load_state_dict
    return network
