"""The checkpoint: a folder a step, safetensors and JSON, no pickle, readable without PyTorch.

    step-00001000/
      checkpoint.json          format_version, step, `model` (TransformerConfig), whatever else the trainer states,
                               and `files`: the SHA-256 of every tensor file
      model.safetensors        the weights
      ema-0.9999.safetensors   one file an average, float32, by its decay
      power-0.05.safetensors   likewise, a power average by its relative length (jlt.nn.ema)
      optimizer.safetensors    AdamW's state, `exp_avg/<weight>`, `exp_avg_sq/<weight>`, `step/<weight>`
      representation/          what decodes the latents (jlt.data), so that a checkpoint alone can make images

A folder appears under its name only when it is whole. Reading verifies every hash of what it reads.

RUN/ema/step-*/ are folders of the same kind that hold power averages alone; from them and a checkpoint's own the
weights "power=LENGTH" of any length are worked out.
"""

import collections
import dataclasses
import hashlib
import itertools
import json
import struct
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from jlt import files
from jlt.nn.ema import EMA, reconstruction
from jlt.nn.transformer import Transformer, TransformerConfig
from jlt.processes import Processes

FORMAT_VERSION = 1
HEADER = "checkpoint.json"
TOLERANCE = 0.1  # what a reconstructed average may lack of the profile asked for, relative to it
DTYPES = {torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.int64: "I64"}


@dataclass(frozen=True)
class Checkpoint:
    """An opened checkpoint: its folder and header; tensors are read when asked for."""

    folder: Path
    header: Mapping[str, Any]

    @property
    def step(self) -> int:
        return int(self.header["step"])

    @property
    def config(self) -> TransformerConfig:
        return TransformerConfig(**self.header["model"])

    @property
    def decays(self) -> list[float]:
        """Decays of the averages it holds, in the order in which they were named for training."""
        return [
            float(name.removeprefix("ema-").removesuffix(".safetensors"))
            for name in self.header["files"]
            if name.startswith("ema-")
        ]

    def tensors(self, name: str) -> dict[str, Tensor]:
        """Read one tensor file, "model", "optimizer" or "ema-<decay>", after verifying its hash."""
        path = self.folder / f"{name}.safetensors"
        if path.name not in self.header["files"]:
            raise ValueError(f"{self.folder} holds no {name!r}; it holds {', '.join(self.header['files'])}")
        if not path.is_file():
            raise ValueError(f"{path} is missing; {HEADER} names it")
        found, promised = files.sha256(path), self.header["files"][path.name]
        if found != promised:
            raise ValueError(f"{path} has SHA-256 {found[:16]}..., {HEADER} promises {promised[:16]}...")
        try:
            return load_file(path)
        except SafetensorError as error:
            raise ValueError(f"{path} is not a safetensors file: {error}") from None

    @property
    def lengths(self) -> list[float]:
        """Relative lengths of the power averages it holds."""
        names = (name.removesuffix(".safetensors") for name in self.header["files"] if name.startswith("power-"))
        return [float(name.removeprefix("power-")) for name in names]

    def resolve(self, weights: str = "ema") -> str:
        """Return the tensor file that `weights` means: "ema" (the first average), "model", or a decay ("0.9999").

        Besides, "power=LENGTH" of a kept power average; of another length, where some are kept, it is no file and
        returned as it is.
        """
        options = {"model": "model"} if "model.safetensors" in self.header["files"] else {}
        options |= {f"{decay:g}": f"ema-{decay:g}" for decay in self.decays}
        options |= {f"power={length:g}": f"power-{length:g}" for length in self.lengths}
        if self.decays:
            options = {"ema": f"ema-{self.decays[0]:g}"} | options
        if self.lengths and (length := power(weights)) is not None:
            return options.get(f"power={length:g}", f"power={length:g}")
        return files.choose("weights", weights, options)

    def weights(self, name: str) -> dict[str, Tensor]:
        """Return the weights that `resolve` named, read or worked out."""
        length = power(name)
        return self.tensors(name) if length is None else self.reconstruct(length)

    def fingerprint(self, name: str) -> str:
        """Return what identifies the weights that `resolve` named: the file's SHA-256, or one of all they come from."""
        if (length := power(name)) is None:
            return str(self.header["files"][f"{name}.safetensors"])
        return files.fingerprint([length, [opened.header["files"] for opened in self.snapshots()]])

    def snapshots(self) -> "list[Checkpoint]":
        """Return the run's snapshots of power averages up to this step, this checkpoint being the last."""
        run = self.folder.resolve().parent.parent
        found = [read(path) for step, path in list_steps(run, "ema").items() if step < self.step]
        return [*(opened for opened in found if opened.lengths), self]

    def reconstruct(self, length: float) -> dict[str, Tensor]:
        """Work out the power average of that relative length at this step, from the run's snapshots.

        Raises a ValueError where they do not give it to within TOLERANCE.
        """
        sources = [(opened, own) for opened in self.snapshots() for own in opened.lengths]
        factors, left = reconstruction([(own, opened.step) for opened, own in sources], length, self.step)
        if left > TOLERANCE:
            raise ValueError(
                f"{len(sources)} kept averages give power={length:g} at step {self.step} to within {left:.0%}, "
                f"{TOLERANCE:.0%} is wanted; the kept lengths are {', '.join(f'{own:g}' for own in self.lengths)}"
            )
        total: dict[str, Tensor] = {}
        for (opened, own), factor in zip(sources, factors, strict=True):
            for name, tensor in opened.tensors(f"power-{own:g}").items():
                part = factor * tensor.double()  # terms of both signs cancel
                total[name] = total[name] + part if name in total else part
        return {name: tensor.float() for name, tensor in total.items()}

    def load_model(self, weights: str = "ema") -> Transformer:
        """Build the network with the weights asked for; the first tensor that does not fit is named."""
        state = self.weights(self.resolve(weights))
        with torch.device("meta"):  # nothing is allocated for a network that the tensors do not fit
            check_weights(Transformer(self.config), state, self.folder)
        model = Transformer(self.config)
        load_weights(model, state, self.folder)
        return model


def power(weights: str) -> float | None:
    """Return LENGTH of "power=LENGTH", None of other weights."""
    if not weights.startswith("power="):
        return None
    try:
        return float(weights.removeprefix("power="))
    except ValueError:
        raise ValueError(f"weights {weights!r}: the relative length after power= must be a number") from None


def check_weights(model: nn.Module, state: Mapping[str, Tensor], origin: Path) -> None:
    """Raise a ValueError for the first tensor that is missing, surplus, or of another shape than the model's."""
    own = dict(model.named_parameters())
    for name in [*own, *state]:
        ours, theirs = (list(side[name].shape) if name in side else "absent" for side in (own, state))
        if ours != theirs:
            raise ValueError(f"tensor {name!r} is {theirs} in {origin}, the model expects {ours}")


def load_weights(model: nn.Module, state: Mapping[str, Tensor], origin: Path) -> None:
    """Copy `state` into the model after `check_weights`."""
    check_weights(model, state, origin)
    for name, parameter in model.named_parameters():
        fill(parameter, state[name])


@torch.no_grad()
def fill(tensor: Tensor, whole: Tensor) -> None:
    """Copy `whole` into `tensor`, or into the part of it that this process holds."""
    if hasattr(tensor, "placements"):  # a DTensor, whose module takes a second to import
        from torch.distributed.tensor import distribute_tensor

        assert hasattr(tensor, "device_mesh")
        whole = distribute_tensor(whole, tensor.device_mesh, tensor.placements, src_data_rank=None)
    tensor.copy_(whole)


def save(
    folder: Path,
    model: Transformer,
    ema: EMA,
    optimizer: torch.optim.Optimizer | None,
    header: Mapping[str, Any],
    extra: Callable[[Path], None] = lambda folder: None,
    processes: Processes = Processes(),  # noqa: B008
) -> None:
    """Write a checkpoint, whole or not at all; `extra(folder)` may add files of its own, such as the representation.

    All processes call it and the first writes. Tensors that they share are put together one at a time.
    """
    full = {**header, "model": dataclasses.asdict(model.config)}
    save_tensors(folder, state_tensors(model, ema, optimizer), full, extra, processes)


def save_tensors(
    folder: Path,
    tensors: Mapping[str, Mapping[str, Tensor]],
    header: Mapping[str, Any],
    extra: Callable[[Path], None],
    processes: Processes,
) -> None:
    """Write a folder of tensors by file and name, as `save` does; `header` states the model's configuration, too."""
    whole = (gathered(tensor) for state in tensors.values() for tensor in state.values())  # in step on all of them

    def write_and_go_on() -> None:
        try:
            write(folder, tensors, whole, header, extra)
        finally:  # the others are not left waiting for the rest
            collections.deque(whole, maxlen=0)

    if processes.rank:
        collections.deque(whole, maxlen=0)
    processes.first(write_and_go_on)


def state_tensors(
    model: Transformer, ema: EMA, optimizer: torch.optim.Optimizer | None
) -> dict[str, dict[str, Tensor]]:
    """Return the tensors of a checkpoint by file and name; they are the training's own."""
    tensors = {"model": dict[str, Tensor](model.named_parameters()), **ema.named}
    return tensors if optimizer is None else tensors | {"optimizer": optimizer_tensors(model, optimizer)}


def copied(tensors: Mapping[str, Mapping[str, Tensor]]) -> dict[str, dict[str, Tensor]]:
    """Return copies on the CPU, which training leaves alone."""
    return {
        file: {name: tensor.detach().to("cpu", copy=True) for name, tensor in state.items()}
        for file, state in tensors.items()
    }


def write(
    folder: Path,
    tensors: Mapping[str, Mapping[str, Tensor]],
    whole: Iterator[Tensor],
    header: Mapping[str, Any],
    extra: Callable[[Path], None] = lambda folder: None,
) -> None:
    """Write a checkpoint's folder; `tensors` give names, dtypes and shapes, `whole` the tensors in that order."""
    with files.replaced(folder) as temporary:
        temporary.mkdir()
        hashes = {}
        for name, state in tensors.items():
            file = f"{name}.safetensors"
            try:
                hashes[file] = write_tensors(temporary / file, state, whole)
            except OSError as error:  # a full disk does not say which file it has no room for
                raise OSError(error.errno, error.strerror, str(folder / file)) from None
        extra(temporary)
        full = {"format_version": FORMAT_VERSION, **header, "files": hashes}
        (temporary / HEADER).write_text(json.dumps(full, indent=1, allow_nan=False))


def gathered(tensor: Tensor) -> Tensor:
    """Return a tensor whole, on the CPU, wherever its parts are."""
    whole = tensor.detach()
    return (whole.full_tensor() if hasattr(whole, "full_tensor") else whole).cpu()


def write_tensors(path: Path, state: Mapping[str, Tensor], whole: Iterator[Tensor]) -> str:
    """Write a safetensors file, taking its tensors one by one from `whole`; return its SHA-256.

    `state` gives their names, dtypes and shapes, in the same order.
    """
    entries, offset = {}, 0
    for name, tensor in state.items():
        end = offset + tensor.numel() * tensor.element_size()
        entries[name] = {"dtype": DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [offset, end]}
        offset = end
    header = json.dumps(entries, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)
    digest = hashlib.sha256()
    with path.open("wb") as file:
        start: list[bytes | memoryview] = [struct.pack("<Q", len(header)), header]
        for part in itertools.chain(start, map(raw, itertools.islice(whole, len(state)))):
            file.write(part)
            digest.update(part)
    return digest.hexdigest()


def raw(tensor: Tensor) -> memoryview:
    """Return the bytes of a tensor on the CPU, in row-major order, without a copy where it is contiguous."""
    return tensor.reshape(-1).view(torch.uint8).numpy().data


def read(folder: Path) -> Checkpoint:
    """Open a checkpoint folder, or the last one of a run folder."""
    if not folder.exists():
        raise ValueError(f"{folder} does not exist; a run folder or a checkpoint folder is wanted")
    if not folder.is_dir():
        raise ValueError(f"{folder} is a file; a run folder or a checkpoint folder is wanted")
    if not (folder / HEADER).is_file():
        steps = list_steps(folder)
        if not steps:
            raise ValueError(f"{folder} holds no {HEADER} and no checkpoints/step-*; it is no run and no checkpoint")
        folder = steps[max(steps)]
    header = files.read_json(folder / HEADER)
    version = header.get("format_version") if isinstance(header, dict) else None
    if version != FORMAT_VERSION:
        raise ValueError(f"{folder} is a checkpoint of format version {version}, this jlt reads {FORMAT_VERSION}")
    missing = {"step", "model", "files"} - header.keys()
    if missing:
        raise ValueError(f"{folder / HEADER} lacks {', '.join(sorted(missing))}")
    opened = Checkpoint(folder, header)
    try:
        if not all(isinstance(text, str) for pair in header["files"].items() for text in pair):
            raise TypeError("files must map names to hashes")
        opened.step, opened.config, opened.decays, opened.lengths  # noqa: B018
    except (TypeError, AttributeError, OverflowError, ValueError) as error:
        raise ValueError(f"{folder / HEADER} has a malformed entry: {error}") from None
    return opened


def list_steps(run: Path, kind: str = "checkpoints") -> dict[int, Path]:
    """Return a run's checkpoint folders by step, or those of another `kind`: "ema", its snapshots.

    What is not named as `folder_of` names it, such as a copy that someone keeps beside them, is left alone.
    """
    found = ((path.name.removeprefix("step-"), path) for path in sorted((run / kind).glob("step-*")))
    return {int(step): path for step, path in found if step.isdecimal() and path.is_dir()}


def folder_of(run: Path, step: int, kind: str = "checkpoints") -> Path:
    return run / kind / f"step-{step:08d}"


def optimizer_tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Flatten an optimizer's state to tensors named `<entry>/<weight>`."""
    return {
        f"{entry}/{name}": value
        for name, parameter in model.named_parameters()
        for entry, value in optimizer.state[parameter].items()
    }


def load_optimizer(model: nn.Module, optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor]) -> None:
    """Restore what `optimizer_tensors` returned; a weight without state is a ValueError."""
    for name, parameter in model.named_parameters():
        found = {entry for entry in ("step", "exp_avg", "exp_avg_sq") if f"{entry}/{name}" in tensors}
        if len(found) != 3:
            raise ValueError(f"the optimizer's state of {name!r} has {len(found)} tensors, AdamW keeps 3")
        state = {entry: torch.zeros_like(parameter.detach()) for entry in ("exp_avg", "exp_avg_sq")}
        for entry, tensor in state.items():
            fill(tensor, tensors[f"{entry}/{name}"])
        # fused AdamW counts its steps on the weight's device
        optimizer.state[parameter] = {"step": tensors[f"step/{name}"].to(parameter.device), **state}
