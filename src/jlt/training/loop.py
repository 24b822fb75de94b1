"""The training loop: `train(config, latents, run)` trains a run folder to its last step, or goes on where it stopped.

    RUN/config.json               the settings as first given, and the model's name
    RUN/metrics.jsonl             a line a step: step, loss, gradient_norm (null where not finite), learning_rate, and
                                  if asked for gradient_norm/PART; a line a held-out measurement: step, held_out {space:
                                  mean loss in ten bins of t}; and a line for what each watcher returned
    RUN/checkpoints/step-*/       see jlt.nn.checkpoint
    RUN/ema/step-*/               snapshots of the power averages, if any are kept; see there
    RUN/lock                      held while a process, or the first of several, trains here

`step` in these files counts finished steps. `steps` may change as long as the rates so far would be the same. To
resume, run the same command again: the weights, averages, optimizer and metrics come out as in a run that was never
stopped. Ctrl-C, SIGTERM and SIGUSR1 save first; after anything harder the last checkpoint is the state, and metrics
written after it are dropped.
"""

import contextlib
import dataclasses
import json
import signal
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from jlt import files
from jlt.data import Latents, load_representation, open_latents
from jlt.data.hub import find_checkpoint
from jlt.nn import EMA, Transformer, checkpoint, model_name
from jlt.nn.checkpoint import Checkpoint
from jlt.nn.ema import standing_in
from jlt.nn.flops import training_flop
from jlt.processes import Processes, joined, open_device
from jlt.training.config import MAY_CHANGE, TrainConfig
from jlt.training.held_out import held_out_losses
from jlt.training.measured import settle
from jlt.training.metrics import Metrics, OpenSink, fed, tell
from jlt.training.parallel import PARALLEL, Engine, recompute_blocks, share, tf32_products
from jlt.training.saving import Saver
from jlt.training.step import Batch, draw_batch, make_optimizer, training_step
from jlt.training.watching import Pace, View, Watcher, gradient_norms, is_due


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
    watchers: Sequence[Watcher] = (),
    sinks: Mapping[str, OpenSink] = {},
    gradient_norms_every: int = 0,
    peak_flops: float | None = None,
) -> Path:
    """Train to `config.steps` and return the last checkpoint's folder.

    The processes that torchrun started share each batch. Their number and the options from `micro_batch_size` to `tf32`
    change results by rounding only, and a run may go on with others.

    Args:
        config: the recipe.
        latents: folder made by `jlt encode`.
        run: folder of the run; one that exists is resumed, provided that its settings are these.
        device: where the network runs; under torchrun each process has its own "cuda".
        init: a run or checkpoint folder, or ORG/NAME of the Hub, whose first average is where a new run starts
            (fine-tuning); the number of classes may differ.
        micro_batch_size: most images on a device at once, by default its whole share of the batch.
        parallel: with several processes, ddp (each has the whole model) or fsdp (each has a part of it).
        compile: compile the blocks of the network.
        recompute: save memory by working out the blocks again for the backward pass (activation checkpointing).
        tf32: let GPUs multiply float32 matrices in TF32 (10 bits of fraction).
        progress: called after each step with (finished steps, loss), for which it waits for the device.
        watchers: what looks at the training, see jlt.training.watching.
        sinks: what takes the lines of metrics.jsonl besides, by name, see jlt.training.metrics.
        gradient_norms_every: steps between measurements of the gradient's norm by block; 0 never.
        peak_flops: FLOP/s of a device, of which the progress bar then gives the share that is used.

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
            base = checkpoint.read(find_checkpoint(init)) if init else None
            if base is not None:
                check_base(base, data)
            return data, held_out, base, describe(config, data, base, *settle(config, data, run))

        position, micro_batches = share(config.batch_size, micro_batch_size, processes)
        where = open_device(device)
        data, held_out, base, header = processes.first(open_inputs) or open_inputs()  # one tells what is wrong

        def open_run() -> None:
            claim(run)
            stack.enter_context(files.locked(run / "lock"))
            prepare(config, run, header)

        processes.first(open_run)
        if "target_reason" in header and not processes.rank:
            tell(header["target_reason"])
        config = settled(config, header["target"])
        stack.enter_context(tf32_products(tf32))
        wishes = ((recompute_blocks, recompute), (Transformer.compile_blocks, compile))
        changes = [change for change, wanted in wishes if wanted]
        stop = stack.enter_context(stop_signals(processes))
        state = start(config, data, run, base, where, processes, engine, changes)
        sink = processes.first(lambda: stack.enter_context(fed(sinks, run, header, state.step)))
        metrics = Metrics(run / "metrics.jsonl", state.step, config.seed, processes, sink)
        saver = stack.enter_context(Saver(processes))
        # a run that was stopped between saving and pruning has one too many
        processes.first(lambda: prune(run, config, metrics.best[1]))
        representation = load_representation(latents / "representation")

        def save(checkpointed: bool, snapped: bool) -> None:
            metrics.flush()
            folders: list[tuple[Path, Mapping[str, Mapping[str, Tensor]]]] = []
            if snapped:
                powers = {name: state.ema.named[name] for name in state.ema.named if name.startswith("power-")}
                folders.append((checkpoint.folder_of(run, state.step, "ema"), powers))
            if checkpointed:
                tensors = checkpoint.state_tensors(state.model, state.ema, state.optimizer)
                folders.append((checkpoint.folder_of(run, state.step), tensors))
            model = dataclasses.asdict(state.model.config)
            stated = {**header, "step": state.step, "seconds": state.seconds, "model": model}
            best = metrics.best[1]
            saver.save(
                folders, stated, lambda inner: representation.save(inner / "representation"),
                lambda: prune(run, config, best),
            )  # fmt: skip

        bar = tqdm(
            total=config.steps, initial=state.step, desc=f"training {header['name']}", unit="step",
            disable=True if processes.rank else None,
        )  # fmt: skip
        peak = peak_flops and peak_flops * processes.count
        pace = Pace(config.batch_size, training_flop(state.model.config), peak, where)
        norms = dict[str, Tensor]()
        began = time.perf_counter() - state.seconds
        shape = (len(position), *data.shape)
        batches = ahead(
            lambda step, x: draw_batch(data, config, step, position, x), shape, state.step, config.steps, where
        )
        for batch in stack.enter_context(contextlib.closing(batches)):
            rate = config.learning_rate_at(state.step)
            norms.clear()
            looking = is_due(gradient_norms_every, state.step + 1, config.steps)
            loss, norm = training_step(
                state.network, state.ema, state.optimizer, batch, config, state.step, micro_batches, processes,
                (lambda: norms.update(gradient_norms(state.model, processes))) if looking else lambda: None,
            )  # fmt: skip
            state.step += 1
            state.seconds = time.perf_counter() - began
            step, last = state.step, state.step == config.steps
            metrics.add({"step": step, "loss": loss, "gradient_norm": norm, "learning_rate": rate, **norms})
            if held_out and is_due(config.held_out_every, step, config.steps):
                with standing_in(state.model, next(iter(state.ema.averages.values()), None)):
                    losses = held_out_losses(state.model, held_out, config, processes=processes)
                metrics.add({"step": step, "held_out": losses})
            better = False
            for watcher in watchers:
                if is_due(watcher.every, step, config.steps):
                    view = View(
                        run, step, state.model, state.ema, latents, data, held_out, config, header, processes
                    )  # fmt: skip
                    line = {"step": step, **watcher(view)}
                    better |= metrics.compare(line)
                    metrics.add(line)
            better = bool(watchers) and processes.any(better)
            stopping = (
                processes.any(stop.is_set) and not last
            )  # read once: a signal after the save is for the next step
            checkpointed = last or stopping or better or step % config.save_every == 0
            snapped = is_due(
                (config.snapshot_every or config.save_every) * bool(config.ema_lengths), step, config.steps
            )
            if checkpointed or snapped:
                save(checkpointed, snapped)
            bar.update()
            if not bar.disable:
                bar.set_postfix_str(pace(bar.format_dict["rate"]), refresh=False)
            if progress:
                progress(step, float(loss))
            if stopping:
                saver.wait()
                raise Stopped(f"stopped after step {step} and saved; the same command goes on from there")
        bar.close()
        saver.wait()
    return checkpoint.folder_of(run, config.steps)


def ahead(
    draw: Callable[[int, Tensor], Batch], shape: Sequence[int], start: int, stop: int, device: torch.device
) -> Generator[Batch]:
    """Yield the batch of each step on the device, the next one being drawn in a thread meanwhile.

    `draw(step, x)` fills x, of that shape, with the latents. On a CPU each batch is drawn when it is its turn, into the
    memory of the last: two threads that both compute there would slow each other, and fresh memory costs several times
    what filling it does. Pinned memory, from which a GPU copies by itself, PyTorch hands out anew once it is copied.
    """
    if device.type == "cpu":
        x = torch.empty(*shape)
        yield from (draw(step, x) for step in range(start, stop))
        return
    pin = device.type == "cuda"

    def pinned(step: int) -> Batch:
        batch = draw(step, torch.empty(*shape, pin_memory=pin))
        return batch.pin_memory() if pin else batch  # what is pinned stays where it is

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


def settled(config: TrainConfig, target: str) -> TrainConfig:
    """Return the recipe with its target named; a loss in the target's own space stays there."""
    own = config.loss_space == config.target
    return dataclasses.replace(config, target=target, loss_space=target if own else config.loss_space)


def describe(
    config: TrainConfig, data: Latents, base: Checkpoint | None, target: str, reason: str = ""
) -> dict[str, Any]:
    """Return what every checkpoint of the run states about it; `target` is what the network predicts."""
    model = config.model(data.shape, data.num_classes)
    return {
        "name": model_name(target, model),
        "target": target,
        **({"target_reason": reason} if reason else {}),
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
    for kind in ("checkpoints", "ema"):
        files.remove_temporaries(run / kind)
    if not checkpoint.list_steps(run):
        files.write_json(run / "config.json", header)
        return
    saved = checkpoint.read(run)
    defaults = json.loads(json.dumps(dataclasses.asdict(TrainConfig())))  # of settings that are newer than the run
    refuse_changes(defaults | saved.header["training"], header["training"], run)
    refuse_changes({"init": saved.header.get("init")}, {"init": header["init"]}, run)
    refuse_changes(saved.header["latents"], json.loads(json.dumps(header["latents"])), run)
    if saved.step > config.steps:
        raise ValueError(f"{run} has finished step {saved.step}, but steps is {config.steps}")
    planned = saved.header["training"]["steps"]
    fallen = config.decay_steps and saved.step - 1 > min(planned, config.steps) - config.decay_steps
    if fallen and config.steps != planned:
        raise ValueError(
            f"{run} has finished step {saved.step} of {planned}, and with {config.steps} steps its learning rate, "
            f"which falls over the last {config.decay_steps}, would have been another; a new run may --init from it"
        )


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
    ema = EMA(model, config.ema_decays, config.ema_lengths)
    state = State(model, network, ema, make_optimizer(model, config))
    if saved is not None:
        checkpoint.load_weights(model, saved.tensors("model"), saved.folder)
        for file, average in ema.named.items():
            for name, tensor in saved.tensors(file).items():
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
    there, here = ({k: value for k, value in side.items() if k not in MAY_CHANGE} for side in (saved, asked))
    if listed := list(files.differences(there, here)):
        raise ValueError(f"{run} was started with other settings: {'; '.join(listed)}")


def prune(run: Path, config: TrainConfig, best: int) -> None:
    """Remove all but the last checkpoints, those that `keep_every` keeps, and that of the step `best`."""
    steps = checkpoint.list_steps(run)
    for step in sorted(steps)[: -config.keep_last]:
        if step != best and not (config.keep_every and step % config.keep_every == 0):
            files.remove(steps[step])


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
