"""The training loop: `train(config, latents, run)` trains a run folder to its last step, or goes on where it stopped.

    RUN/config.json               the settings as first given, and the model's name
    RUN/metrics.jsonl             a line a step: step, loss, gradient_norm (null where not finite), learning_rate; and
                                  a line a held-out measurement: step, held_out {space: mean loss in ten bins of t}
    RUN/checkpoints/step-*/       see jlt.nn.checkpoint
    RUN/lock                      held while a process trains here

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
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from jlt import files
from jlt.data import Latents, load_representation, open_latents
from jlt.nn import EMA, Transformer, checkpoint, model_name
from jlt.sampling.generator import open_device
from jlt.training.config import MAY_CHANGE, TrainConfig
from jlt.training.held_out import held_out_losses
from jlt.training.step import draw_batch, make_optimizer, training_step

MAX_NON_FINITE = 10


class Stopped(KeyboardInterrupt):
    """Raised by `train` after a signal asked it to stop and the state was saved."""


@dataclasses.dataclass
class State:
    """What a run is between two steps: everything that a checkpoint holds."""

    model: Transformer
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
    progress: Callable[[int, float], None] | None = None,
) -> Path:
    """Train to `config.steps` and return the last checkpoint's folder.

    Args:
        config: the recipe.
        latents: folder made by `jlt encode`.
        run: folder of the run; one that exists is resumed, provided that its settings are these.
        device: where the network runs.
        progress: called after each step with (finished steps, loss).

    Raises:
        ValueError: settings, latents or checkpoint do not fit together.
        Stopped: a signal asked for it; the state is saved.
        FloatingPointError: the gradient was not finite in ten steps in a row.
    """
    where = open_device(device)
    data = open_latents(latents)
    held_out = open_latents(latents, split="held-out") if (latents / "held-out").is_dir() else None
    if config.flip and not data.manifest.mirrored:
        raise ValueError(f"flip is on, but {latents} holds no mirrored latents; encode with --mirrored")
    header = describe(config, data)
    claim(run)
    with files.locked(run / "lock"), stop_signals() as stop:
        state = start(config, data, run, header, where)
        metrics = Metrics(run / "metrics.jsonl", state.step)

        def save() -> None:
            metrics.flush()
            folder = checkpoint.folder_of(run, state.step)
            representation = load_representation(latents / "representation")
            progressed = {"step": state.step, "seconds": state.seconds}
            checkpoint.save(
                folder, state.model, state.ema, state.optimizer, header | progressed,
                extra=lambda inner: representation.save(inner / "representation"),
            )  # fmt: skip
            prune(run, config)

        bar = tqdm(
            total=config.steps, initial=state.step, desc=f"training {header['name']}", unit="step", disable=None,
        )  # fmt: skip
        non_finite: list[int] = []
        position = torch.arange(config.batch_size)
        began = time.perf_counter() - state.seconds
        while state.step < config.steps:
            batch = draw_batch(data, config, state.step, position).to(where)
            rate = config.learning_rate_at(state.step)
            loss, norm = training_step(state.model, state.ema, state.optimizer, batch, config, state.step)
            state.step += 1
            state.seconds = time.perf_counter() - began
            metrics.add({"step": state.step, "loss": loss, "gradient_norm": norm, "learning_rate": rate})
            if not torch.isfinite(norm):
                non_finite.append(state.step - 1)
                tqdm.write(f"step {state.step}: gradient norm {norm.item()}, step skipped", file=sys.stderr)
                if len(non_finite) == MAX_NON_FINITE:
                    metrics.flush()
                    raise FloatingPointError(
                        f"the gradient was not finite in {MAX_NON_FINITE} steps in a row, "
                        f"{non_finite[0]} to {non_finite[-1]} of seed {config.seed}"
                    )
            else:
                non_finite.clear()
            last = state.step == config.steps
            if held_out and config.held_out_every and (last or state.step % config.held_out_every == 0):
                metrics.add({"step": state.step, "held_out": measure(state, held_out, config)})
            stopping = stop.is_set and not last  # read once: a signal after the save is for the next step
            if last or stopping or state.step % config.save_every == 0:
                save()
            bar.update()
            if progress:
                progress(state.step, float(loss))
            if stopping:
                raise Stopped(f"stopped after step {state.step} and saved; the same command goes on from there")
        bar.close()
    return checkpoint.folder_of(run, config.steps)


def claim(run: Path) -> None:
    """Make the run's folder; one that holds something else is a ValueError."""
    names = set(files.names(run)) - {"lock"}
    if names and "config.json" not in names:
        raise ValueError(f"{run} is not empty and holds no config.json of a run; a run has a folder of its own")
    run.mkdir(parents=True, exist_ok=True)


def measure(state: State, held_out: Latents, config: TrainConfig) -> dict[str, list[float]]:
    """Return the held-out losses of the first average, or of the weights if none is kept."""
    weights: dict[str, Tensor] = dict(state.model.named_parameters())
    weights = next(iter(state.ema.averages.values()), weights)
    return held_out_losses(state.model, weights, held_out, config)


def describe(config: TrainConfig, data: Latents) -> dict[str, Any]:
    """Return what every checkpoint of the run states about it."""
    model = config.model(data.shape, data.num_classes)
    return {
        "name": model_name(config.target, model),
        "target": config.target,
        "floor": config.floor,
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


def start(config: TrainConfig, data: Latents, run: Path, header: dict[str, Any], device: torch.device) -> State:
    """Return the state of the run's last checkpoint, or a new one; a run with other settings is refused."""
    files.remove_temporaries(run)
    files.remove_temporaries(run / "checkpoints")
    model = Transformer(config.model(data.shape, data.num_classes), config.seed).to(device)
    state = State(model, EMA(model, config.ema_decays), make_optimizer(model, config))
    if not checkpoint.list_steps(run):
        files.write_json(run / "config.json", header)
        return state
    prune(run, config)  # a run that was stopped between saving and pruning has one too many
    saved = checkpoint.read(run)
    defaults = json.loads(json.dumps(dataclasses.asdict(TrainConfig())))  # of settings that are newer than the run
    refuse_changes(defaults | saved.header["training"], header["training"], run)
    refuse_changes(saved.header["latents"], json.loads(json.dumps(header["latents"])), run)
    if saved.step > config.steps:
        raise ValueError(f"{run} has finished step {saved.step}, but steps is {config.steps}")
    checkpoint.load_weights(model, saved.tensors("model"), saved.folder)
    for decay, average in state.ema.averages.items():
        for name, tensor in saved.tensors(f"ema-{decay:g}").items():
            average[name].copy_(tensor)
    checkpoint.load_optimizer(model, state.optimizer, saved.tensors("optimizer"))
    state.step, state.seconds = saved.step, float(saved.header["seconds"])
    return state


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
    """Appends lines to metrics.jsonl; tensors are read only when lines are written, so that no step waits for them."""

    def __init__(self, path: Path, step: int, every: int = 50) -> None:
        self.path, self.every, self.waiting = path, every, list[dict[str, Any]]()
        lines = path.read_text().splitlines(keepends=True) if path.exists() else []
        kept = [line for line in lines if line.endswith("\n") and json.loads(line)["step"] <= step]
        if kept != lines:  # what an interrupted run wrote after its last checkpoint will be written again
            files.write_bytes(path, "".join(kept).encode())

    def add(self, line: dict[str, Any]) -> None:
        self.waiting.append(line)
        if len(self.waiting) >= self.every:
            self.flush()

    def flush(self) -> None:
        lines = [{key: plain(value) for key, value in line.items()} for line in self.waiting]
        with self.path.open("a") as file:
            file.writelines(json.dumps(line) + "\n" for line in lines)
        self.waiting.clear()


def plain(value: Any) -> Any:
    """Return a tensor's number, or None if it is not finite, which JSON has no word for; other values as they are."""
    if not isinstance(value, Tensor):
        return value
    number = value.item()
    return number if math.isfinite(number) else None


def read_metrics(run: Path) -> list[dict[str, Any]]:
    """Return the lines of a run's metrics.jsonl."""
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


@dataclasses.dataclass
class Flag:
    is_set: bool = False


@contextlib.contextmanager
def stop_signals() -> Iterator[Flag]:
    """Within the block, Ctrl-C, SIGTERM and SIGUSR1 set a flag; a second one has its usual effect."""
    flag = Flag()
    old: dict[int, Any] = {}

    def handle(number: int, frame: object) -> None:
        flag.is_set = True
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
