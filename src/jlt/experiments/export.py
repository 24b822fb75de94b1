"""A run for other programs: its denoiser, or all that makes images, in a folder of their format.

    diffusers   a pipeline that `DiffusionPipeline.from_pretrained` loads (jlt.experiments.pipeline)
    onnx        denoiser.onnx, for onnxruntime and others; the weights of a large network lie beside it
    torch       denoiser.pt2, for torch.export.load

A denoiser maps z (batch, channels, size, size) float32, t (batch,) float32 in [0, 1], 0 being noise, and, if it knows
classes, label (batch,) int64 to y, the prediction; the batch is of any size. What y predicts, the classes, and what
normalises z stand in export.json, which is the header of the checkpoint.
"""

import logging
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from jlt import files
from jlt.extras import needed
from jlt.sampling import Generator, load

PROTOBUF = 2**31 - 2**27  # bytes that one ONNX file may hold, with room for the graph
STUB = "from jlt.experiments.pipeline import {}  # pip install 'jlt[export]'\n"


def export(source: Path, out: Path, to: str, weights: str = "ema") -> Path:
    """Write a run, or a checkpoint, into the new folder `out` in a format of FORMATS, whole or not at all."""
    write = files.choose("format", to, FORMATS)
    if out.is_file() or files.names(out):
        raise ValueError(f"{out} is not an empty folder; an export has a folder of its own")
    generator = load(source, weights)
    with files.replaced(out) as temporary:
        temporary.mkdir()
        write(generator, temporary)
    return out


def to_diffusers(generator: Generator, out: Path) -> None:
    """Write a pipeline folder; the only code in it is one import a class."""
    with needed("the format diffusers", "export"):
        from jlt.experiments.pipeline import assemble
    with tempfile.TemporaryDirectory() as folder:
        generator.representation.save(Path(folder))
        header, path = files.read_json(Path(folder, "representation.json")), Path(folder, "tensors.safetensors")
        pipeline = assemble(generator, header, load_file(path) if path.is_file() else {})
    pipeline.save_pretrained(out)
    index = files.read_json(out / "model_index.json")
    index["_class_name"] = ["pipeline", type(pipeline).__name__]
    files.write_bytes(out / "pipeline.py", STUB.format(type(pipeline).__name__).encode())
    for part in ("transformer", "representation"):  # a component's code is looked for in its own folder
        index[part] = ["jlt_stub", index[part][1]]
        files.write_bytes(out / part / "jlt_stub.py", STUB.format(index[part][1]).encode())
    files.write_json(out / "model_index.json", index)


def to_onnx(generator: Generator, out: Path) -> None:
    """Write denoiser.onnx."""
    with needed("the format onnx", "export"):
        import onnxscript  # noqa: F401
    program = traced(generator)
    size = sum(parameter.nbytes for parameter in generator.model.parameters())
    quiet = logging.getLogger("torch.onnx")
    level = quiet.level
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the exporter's own deprecated parts
        try:
            quiet.setLevel(logging.ERROR)
            torch.onnx.export(
                program, f=out / "denoiser.onnx", dynamo=True, verbose=False, external_data=size > PROTOBUF,
                output_names=["y"],
            )  # fmt: skip
        finally:
            quiet.setLevel(level)
    describe(generator, out)


def to_torch(generator: Generator, out: Path) -> None:
    """Write denoiser.pt2."""
    torch.export.save(traced(generator), out / "denoiser.pt2")
    describe(generator, out)


def traced(generator: Generator) -> torch.export.ExportedProgram:
    """Return the denoiser as a graph over batches of any size."""
    config = generator.model.config
    inputs: list[Tensor] = [torch.zeros(2, *config.shape), torch.zeros(2)]
    if config.num_classes:
        inputs.append(torch.zeros(2, dtype=torch.int64))
    batch = torch.export.Dim("batch")
    return torch.export.export(generator.model, tuple(inputs), dynamic_shapes=tuple({0: batch} for _ in inputs))


def describe(generator: Generator, out: Path) -> None:
    """Write export.json."""
    header = {key: value for key, value in generator.header.items() if key != "files"}
    files.write_json(
        out / "export.json", {**header, "weights": generator.weights, "fingerprint": generator.fingerprint}
    )


FORMATS: dict[str, Callable[[Generator, Path], Any]] = {
    "diffusers": to_diffusers,
    "onnx": to_onnx,
    "torch": to_torch,
}
