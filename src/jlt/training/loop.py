"""The training loop: `train(config, latents, run)` trains a run folder to its last step, or goes on where it stopped.

    RUN/config.json               the settings as first given, and the model's name
    RUN/metrics.jsonl             a line a step: step, loss, gradient_norm (null where not finite), learning_rate; and
                                  a line a held-out measurement: step, held_out {space: mean loss in ten bins of t}
    RUN/checkpoints/step-*/       see jlt.nn.checkpoint
    RUN/lock                      held while a process, or the first of several, trains here

`step` in these files counts finished steps. To resume, run the same command again: the weights, averages, optimizer
and metrics come out as in a run that was never stopped. Ctrl-C, SIGTERM and SIGUSR1 save first; after anything harder
the last checkpoint is the state, and metrics written after it are dropped.
"""

import contextlib
import dataclasses
import json
import math
import signal
import sys
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from jlt import files
from jlt.data import Latents, load_representation, open_latents
from jlt.nn import EMA, Transformer, checkpoint, model_name
from jlt.nn.checkpoint import Checkpoint
from jlt.nn.ema import local
from jlt.processes import Processes, joined, open_device
from jlt.training.config import MAY_CHANGE, TrainConfig
from jlt.training.held_out import held_out_losses
from jlt.training.parallel import PARALLEL, Engine, compile_blocks, recompute_blocks, share, tf32_products
from jlt.training.step import Batch, draw_batch, make_optimizer, training_step

MAX_NON_FINITE = 10


class Stopped(KeyboardInterrupt):
    """Raised by `train` after a signal asked it to stop and the state was saved."""


@dataclasses.dataclass
class State:
    """What a run is between two steps: everything that a checkpoint holds, and `network`, the model as it is called."""

    model: Transformer
    network: nn.Module
    ema: EMA
    optimizer: torch.optim.AdamW
    step: int = 0
    seconds: float = 0.0


def train(
    config: TrainConfig,
    latents: Path,
    run: Path,
    *,
    device: str = "cpu",
    init: Path | None = None,
    micro_batch_size: int | None = None,
    parallel: str = "ddp",
    compile: bool = False,
    recompute: bool = False,
    tf32: bool = False,
    progress: Callable[[int, float], None] | None = None,
) -> Path:
    """Train to `config.steps` and return the last checkpoint's folder.

    The processes that torchrun started share each batch. Their number and the options from `micro_batch_size` to `tf32`
    change results by rounding only, and a run may go on with others.

    Args:
        config: the recipe.
        latents: folder made by `jlt encode`.
        run: folder of the run; one that exists is resumed, provided that its settings are these.
        device: where the network runs; under torchrun each process has its own "cuda".
        init: a run or checkpoint folder whose first average is where a new run starts (fine-tuning); the number of
            classes may differ.
        micro_batch_size: most images on a device at once, by default its whole share of the batch.
        parallel: with several processes, ddp (each has the whole model) or fsdp (each has a part of it).
        compile: compile the blocks of the network.
        recompute: save memory by working out the blocks again for the backward pass (activation checkpointing).
        tf32: let GPUs multiply float32 matrices in TF32 (10 bits of fraction).
        progress: called after each step with (finished steps, loss), for which it waits for the device.

    Raises:
        ValueError: settings, latents or checkpoint do not fit together.
        Stopped: a signal asked for it; the state is saved.
        FloatingPointError: the gradient was not finite in ten steps in a row.
    """
    with joined() as processes, contextlib.ExitStack() as stack:
        engine = files.choose("parallel", parallel, PARALLEL)

        def open_inputs() -> tuple[Latents, Latents | None, Checkpoint | None, dict[str, Any]]:
            data = open_latents(latents)
            held_out = open_latents(latents, split="held-out") if (latents / "held-out").is_dir() else None
            if config.flip and not data.manifest.mirrored:
                raise ValueError(f"flip is on, but {latents} holds no mirrored latents; encode with --mirrored")
            base = checkpoint.read(init) if init else None
            if base is not None:
                check_base(base, data)
            return data, held_out, base, describe(config, data, base)

        position, micro_batches = share(config.batch_size, micro_batch_size, processes)
        where = open_device(device)
        data, held_out, base, header = processes.first(open_inputs) or open_inputs()  # one tells what is wrong

        def open_run() -> None:
            claim(run)
            stack.enter_context(files.locked(run / "lock"))
            prepare(config, run, header)

        processes.first(open_run)
        stack.enter_context(tf32_products(tf32))
        changes = [change for change, wanted in ((recompute_blocks, recompute), (compile_blocks, compile)) if wanted]
        stop = stack.enter_context(stop_signals(processes))
        state = start(config, data, run, base, where, processes, engine, changes)
        metrics = Metrics(run / "metrics.jsonl", state.step, config.seed, processes)

        def save() -> None:
            metrics.flush()
            folder = checkpoint.folder_of(run, state.step)
            representation = load_representation(latents / "representation")
            progressed = {"step": state.step, "seconds": state.seconds}
            checkpoint.save(
                folder, state.model, state.ema, state.optimizer, header | progressed,
                extra=lambda inner: representation.save(inner / "representation"), processes=processes,
            )  # fmt: skip
            processes.first(lambda: prune(run, config))

        bar = tqdm(
            total=config.steps, initial=state.step, desc=f"training {header['name']}", unit="step",
            disable=True if processes.rank else None,
        )  # fmt: skip
        began = time.perf_counter() - state.seconds
        batches = ahead(lambda step: draw_batch(data, config, step, position), state.step, config.steps, where)
        for batch in stack.enter_context(contextlib.closing(batches)):
            rate = config.learning_rate_at(state.step)
            loss, norm = training_step(
                state.network, state.ema, state.optimizer, batch, config, state.step, micro_batches, processes
            )
            state.step += 1
            state.seconds = time.perf_counter() - began
            metrics.add({"step": state.step, "loss": loss, "gradient_norm": norm, "learning_rate": rate})
            last = state.step == config.steps
            if held_out and config.held_out_every and (last or state.step % config.held_out_every == 0):
                metrics.add({"step": state.step, "held_out": measure(state, held_out, config)})
            stopping = (
                processes.any(stop.is_set) and not last
            )  # read once: a signal after the save is for the next step
            if last or stopping or state.step % config.save_every == 0:
                save()
            bar.update()
            if progress:
                progress(state.step, float(loss))
            if stopping:
                raise Stopped(f"stopped after step {state.step} and saved; the same command goes on from there")
        bar.close()
    return checkpoint.folder_of(run, config.steps)


def ahead(draw: Callable[[int], Batch], start: int, stop: int, device: torch.device) -> Generator[Batch]:
    """Yield the batch of each step on the device, the next one being drawn in a thread meanwhile.

    On a CPU each is drawn when it is its turn: two threads that both compute there would slow each other.
    """
    if device.type == "cpu":
        yield from map(draw, range(start, stop))
        return

    def pinned(step: int) -> Batch:
        batch = draw(step)
        return batch.pin_memory() if device.type == "cuda" else batch  # so that its copy waits for nothing

    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(pinned, start) if start < stop else None
        for step in range(start, stop):
            assert waiting is not None
            batch, waiting = waiting.result(), pool.submit(pinned, step + 1) if step + 1 < stop else None
            yield batch.to(device)


def claim(run: Path) -> None:
    """Make the run's folder; one that holds something else is a ValueError."""
    names = set(files.names(run)) - {"lock"}
    if names and "config.json" not in names:
        raise ValueError(f"{run} is not empty and holds no config.json of a run; a run has a folder of its own")
    run.mkdir(parents=True, exist_ok=True)


def measure(state: State, held_out: Latents, config: TrainConfig) -> dict[str, list[float]]:
    """Return the held-out losses of the first average, or of the weights if none is kept; every process works them out.

    The average takes the weights' place meanwhile, since a sharded model can be called with no other weights.
    """
    own = [local(p.detach()) for p in state.model.parameters()]
    kept = [p.clone() for p in own]
    average = next(iter(state.ema.averages.values()), None)
    try:
        if average is not None:
            torch._foreach_copy_(own, [local(a) for a in average.values()])
        return held_out_losses(state.model, held_out, config)
    finally:
        if callable(reshard := getattr(state.model, "reshard", None)):
            reshard()  # FSDP keeps the outermost weights gathered until a backward pass
        torch._foreach_copy_(own, kept)


def describe(config: TrainConfig, data: Latents, base: Checkpoint | None) -> dict[str, Any]:
    """Return what every checkpoint of the run states about it."""
    model = config.model(data.shape, data.num_classes)
    return {
        "name": model_name(config.target, model),
        "target": config.target,
        "floor": config.floor,
        "init": None if base is None else base.header["files"][f"{starting_weights(base)}.safetensors"],
        "noise_scale": config.noise_scale,
        "training": json.loads(json.dumps(dataclasses.asdict(config))),
        "latents": {
            "affine": dataclasses.asdict(data.manifest.affine),
            "class_names": data.manifest.class_names,
            "num_images": len(data),
            "source": data.manifest.source,
            "representation_fingerprint": data.manifest.representation_fingerprint,
        },
    }


def prepare(config: TrainConfig, run: Path, header: dict[str, Any]) -> None:
    """Clean the run's folder up and write config.json if it is new; a run with other settings is refused."""
    files.remove_temporaries(run)
    files.remove_temporaries(run / "checkpoints")
    if not checkpoint.list_steps(run):
        files.write_json(run / "config.json", header)
        return
    prune(run, config)  # a run that was stopped between saving and pruning has one too many
    saved = checkpoint.read(run)
    defaults = json.loads(json.dumps(dataclasses.asdict(TrainConfig())))  # of settings that are newer than the run
    refuse_changes(defaults | saved.header["training"], header["training"], run)
    refuse_changes({"init": saved.header.get("init")}, {"init": header["init"]}, run)
    refuse_changes(saved.header["latents"], json.loads(json.dumps(header["latents"])), run)
    if saved.step > config.steps:
        raise ValueError(f"{run} has finished step {saved.step}, but steps is {config.steps}")


def start(
    config: TrainConfig,
    data: Latents,
    run: Path,
    base: Checkpoint | None,
    device: torch.device,
    processes: Processes,
    engine: Engine,
    changes: Sequence[Callable[[Transformer], None]] = (),
) -> State:
    """Return the state of the run's last checkpoint, or a new one; `changes` are made to how its model is called."""
    saved = checkpoint.read(run) if checkpoint.list_steps(run) else None
    model = Transformer(config.model(data.shape, data.num_classes), config.seed)
    if base is not None and saved is None:
        adopt(model, base)
    for change in changes:
        change(model)
    network = engine(model, device, processes) if processes.count > 1 else model.to(device)
    state = State(model, network, EMA(model, config.ema_decays), make_optimizer(model, config))
    if saved is not None:
        checkpoint.load_weights(model, saved.tensors("model"), saved.folder)
        for decay, average in state.ema.averages.items():
            for name, tensor in saved.tensors(f"ema-{decay:g}").items():
                checkpoint.fill(average[name], tensor)
        checkpoint.load_optimizer(model, state.optimizer, saved.tensors("optimizer"))
        state.step, state.seconds = saved.step, float(saved.header["seconds"])
    return state


def check_base(base: Checkpoint, data: Latents) -> None:
    """Raise a ValueError if weights to start from were trained on latents of another representation or scale."""
    theirs = base.header.get("latents", {})
    own = {"representation_fingerprint": data.manifest.representation_fingerprint}
    own["affine"] = json.loads(json.dumps(dataclasses.asdict(data.manifest.affine)))
    for name, value in own.items():
        if name in theirs and theirs[name] != value:
            what = name.removesuffix("_fingerprint").replace("affine", "normalisation")
            raise ValueError(
                f"{base.folder} was trained on latents of {what} {theirs[name]!s:.40}, "
                f"{data.folder} has {value!s:.40}; encode with --representation of:{base.folder}"
            )


def starting_weights(base: Checkpoint) -> str:
    return base.resolve("ema" if base.decays else "model")


def adopt(model: Transformer, base: Checkpoint) -> None:
    """Start from a checkpoint's first average.

    Of another set of classes it gives the row that means no class, which an unconditional network has in the bias of
    its time embedding, and which is none at all where the base had no classes: without a class the base's prediction
    stays what it was.
    """
    state = base.tensors(starting_weights(base))
    theirs = state.pop("label.weight", None)
    if model.label is not None:
        own = model.label.weight.detach()
        if theirs is None:
            state["label.weight"] = torch.cat([own[:-1], torch.zeros_like(own[-1:])])
        else:
            fresh = len(own) != len(theirs) and own.shape[1:] == theirs.shape[1:]
            state["label.weight"] = torch.cat([own[:-1], theirs[-1:]]) if fresh else theirs
    elif theirs is not None:
        state["time.out.bias"] = state["time.out.bias"] + theirs[-1]
    checkpoint.load_weights(model, state, base.folder)


def refuse_changes(saved: dict[str, Any], asked: dict[str, Any], run: Path) -> None:
    """Raise a ValueError that lists the settings that differ and may not."""
    names = [n for n in {**saved, **asked} if n not in MAY_CHANGE and saved.get(n) != asked.get(n)]
    if names:
        differences = "; ".join(f"{name} is {saved.get(name)} there and {asked.get(name)} here" for name in names)
        raise ValueError(f"{run} was started with other settings: {differences}")


def prune(run: Path, config: TrainConfig) -> None:
    """Remove all but the last checkpoints, and those that `keep_every` keeps."""
    steps = checkpoint.list_steps(run)
    for step in sorted(steps)[: -config.keep_last]:
        if not (config.keep_every and step % config.keep_every == 0):
            files.remove(steps[step])


class Metrics:
    """Appends lines to metrics.jsonl; tensors are read only when lines are written, so that no step waits for them.

    Every process reads them and the first writes. A flush after ten steps in a row whose gradient was not finite is a
    FloatingPointError; such steps have changed nothing.
    """

    def __init__(self, path: Path, step: int, seed: int, processes: Processes, every: int = 50) -> None:
        self.path, self.seed, self.processes, self.every = path, seed, processes, every
        self.waiting, self.non_finite = list[dict[str, Any]](), list[int]()
        processes.first(lambda: self.forget_after(step))

    def forget_after(self, step: int) -> None:
        """Drop what an interrupted run wrote after its last checkpoint: it will be written again."""
        lines = self.path.read_text().splitlines(keepends=True) if self.path.exists() else []
        kept = [line for line in lines if line.endswith("\n") and json.loads(line)["step"] <= step]
        if kept != lines:
            files.write_bytes(self.path, "".join(kept).encode())

    def add(self, line: dict[str, Any]) -> None:
        self.waiting.append(line)
        if len(self.waiting) >= self.every:
            self.flush()

    def flush(self) -> None:
        lines, self.waiting = read_numbers(self.waiting), []
        if self.processes.rank == 0:
            with self.path.open("a") as file:
                file.writelines(json.dumps(line) + "\n" for line in lines)
        for line in lines:
            if "gradient_norm" in line:
                self.watch(line["step"], line["gradient_norm"])

    def watch(self, step: int, norm: float | None) -> None:
        if norm is not None:
            self.non_finite.clear()
            return
        if self.processes.rank == 0:
            tqdm.write(f"step {step}: the gradient is not finite, step skipped", file=sys.stderr)
        self.non_finite.append(step - 1)
        if len(self.non_finite) == MAX_NON_FINITE:
            raise FloatingPointError(
                f"the gradient was not finite in {MAX_NON_FINITE} steps in a row, "
                f"{self.non_finite[0]} to {self.non_finite[-1]} of seed {self.seed}"
            )


def read_numbers(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the lines with numbers for tensors, read in one go; None where not finite, which JSON has no word for."""
    tensors = [value for line in lines for value in line.values() if isinstance(value, Tensor)]
    numbers = iter(torch.stack(tensors).tolist() if tensors else [])

    def plain(value: Any) -> Any:
        number = next(numbers) if isinstance(value, Tensor) else value
        return None if isinstance(number, float) and not math.isfinite(number) else number

    return [{key: plain(value) for key, value in line.items()} for line in lines]


def read_metrics(run: Path) -> list[dict[str, Any]]:
    """Return the lines of a run's metrics.jsonl."""
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


@dataclasses.dataclass
class Flag:
    is_set: bool = False


@contextlib.contextmanager
def stop_signals(processes: Processes) -> Iterator[Flag]:
    """Within the block, Ctrl-C, SIGTERM and SIGUSR1 set a flag; a second one to a single process has its usual effect.

    One of several hears of Ctrl-C twice, from the terminal and from torchrun, which itself ends what takes too long.
    """
    flag = Flag()
    old: dict[int, Any] = {}

    def handle(number: int, frame: object) -> None:
        flag.is_set = True
        if processes.count == 1:
            for signal_number, handler in old.items():
                signal.signal(signal_number, handler)

    for name in ("SIGINT", "SIGTERM", "SIGUSR1"):
        if hasattr(signal, name):
            with contextlib.suppress(ValueError):  # only the main thread may set handlers
                old[getattr(signal, name)] = signal.signal(getattr(signal, name), handle)
    try:
        yield flag
    finally:
        for signal_number, handler in old.items():
            signal.signal(signal_number, handler)
