"""Any number of processes, any engine, any micro-batches: one result, to the order of summation."""

import dataclasses
import json
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tests.latents import encode_noise

from jlt import files
from jlt.nn import Transformer, checkpoint
from jlt.processes import Processes
from jlt.training import TrainConfig, read_metrics, train
from jlt.training.parallel import recompute_blocks, share

Fork = Callable[..., subprocess.CompletedProcess[str]]
CONFIG = TrainConfig(
    size="4x16x2", steps=3, batch_size=10, learning_rate=1e-3, warmup_steps=0, ema_decays=(0.5,), save_every=3,
    held_out_every=3, dropout=0.2, in_context_tokens=2, in_context_start=1, clip=0.05,
)  # fmt: skip

RANKS = """
import json
from pathlib import Path
import torch._dynamo, torch.distributed.fsdp, torch.distributed.tensor  # once, not in every child
from jlt.nn import Transformer, checkpoint
from jlt.processes import joined
from jlt.training import TrainConfig, train
from jlt.training.loop import start
from jlt.training.parallel import PARALLEL

def copy(config, latents, run, parallel, micro):
    "Load a run's last checkpoint in every process, and save what they hold."
    with joined() as processes:
        state = start(config, latents, Path(run), None, torch.device("cpu"), processes, PARALLEL[parallel])
        checkpoint.save(Path(run) / "copy", state.model, state.ema, state.optimizer, {"step": 1}, processes=processes)

def work(rank, parallel, micro, latents, run, settings, stop):
    def progress(step, loss):
        if [step, rank] == stop:  # one of them alone hears of it
            os.kill(os.getpid(), 2)
            os.kill(os.getpid(), 15)  # torchrun says it again
    config = TrainConfig(**settings)
    if stop == "copy":
        from jlt.data import open_latents
        return copy(config, open_latents(Path(latents)), run, parallel, micro)
    train(config, Path(latents), Path(run), parallel=parallel, micro_batch_size=micro, progress=progress)

print(json.dumps([forked(count, lambda rank: work(rank, *job)) for count, *job in json.loads(sys.argv[1])]))
"""


@pytest.fixture(scope="module")
def latents(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return encode_noise(tmp_path_factory.mktemp("latents") / "latents")


def job(
    count: int, parallel: str, micro: int | None, latents: Path, run: Path, config: TrainConfig = CONFIG,
    stop: tuple[int, int] | str | None = None,
) -> list[Any]:  # fmt: skip
    settings = {name: value for name, value in dataclasses.asdict(config).items() if name != "times"}
    return [count, parallel, micro, str(latents), str(run), settings, stop]


def do(fork: Fork, *jobs: list[Any]) -> tuple[list[list[int]], list[str]]:
    """Do each job with its number of processes; return their exit codes and what they said."""
    done = fork(RANKS, json.dumps(jobs))
    *said, codes = done.stdout.splitlines() or [""]
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr, done.stderr
    return json.loads(codes), said


def numbers(run: Path, file: str) -> torch.Tensor:
    """Return what a run's last checkpoint holds in one file, but for AdamW's counts, as one long float64 vector."""
    state = load_file(checkpoint.read(run).folder / f"{file}.safetensors")
    return torch.cat([v.flatten() for name, v in sorted(state.items()) if not name.startswith("step/")]).double()


def assert_same_to_reduction_order(run: Path, reference: Path) -> None:
    """Compare two runs' tensors in norm, to ten times the rounding of float32, and their metrics."""
    for file in ("model", "ema-0.5", "optimizer"):
        ours, theirs = numbers(run, file), numbers(reference, file)
        assert (ours - theirs).norm() < 1e-6 * theirs.norm(), (run.name, file)
    for ours, theirs in zip(read_metrics(run), read_metrics(reference), strict=True):
        assert ours.keys() == theirs.keys()
        for name in ("step", "loss", "gradient_norm", "learning_rate"):
            assert ours.get(name) == (pytest.approx(theirs[name], rel=1e-6) if name in theirs else None)
        for space, losses in theirs.get("held_out", {}).items():
            assert ours["held_out"][space] == pytest.approx(losses, rel=1e-5)


GRID = [(count, parallel, micro) for count in (1, 2, 3) for parallel in ("ddp", "fsdp") for micro in (None, 3, 2, 1)]
FEW = [(2, "ddp", 2), (3, "fsdp", 3)]  # ragged: 5 and 5 images in parts of 2 and 1; 4, 3 and 3 likewise


@pytest.mark.parametrize("cases", [FEW, pytest.param(GRID, marks=pytest.mark.slow)], ids=["few", "all"])
def test_neither_processes_nor_micro_batches_nor_engine_change_what_is_learnt(
    latents: Path, tmp_path: Path, cases: list[tuple[int, str, int | None]], fork: Fork
) -> None:
    train(CONFIG, latents, tmp_path / "reference")
    runs = [tmp_path / f"{count}-{parallel}-{micro}" for count, parallel, micro in cases]
    codes, _ = do(fork, *(job(*case, latents, run) for case, run in zip(cases, runs, strict=True)))
    assert not any(map(any, codes))
    train(CONFIG, latents, tmp_path / "alone", micro_batch_size=4)
    for run in [*runs, tmp_path / "alone"]:
        assert_same_to_reduction_order(run, tmp_path / "reference")


def test_a_run_goes_on_with_another_number_of_processes_and_engine_and_saves_the_bytes_it_loads(
    latents: Path, tmp_path: Path, fork: Fork
) -> None:
    def until(steps: int) -> TrainConfig:
        return dataclasses.replace(CONFIG, steps=steps, held_out_every=0)

    train(until(6), latents, tmp_path / "whole")
    codes, said = do(
        fork,
        job(3, "fsdp", 2, latents, tmp_path / "run", until(2)),
        job(2, "ddp", None, latents, tmp_path / "run", dataclasses.replace(until(9)), stop=(3, 1)),
        job(2, "fsdp", None, latents, tmp_path / "run", until(4), stop="copy"),
    )
    assert codes == [[0, 0, 0], [130, 130], [0, 0]]
    # the second process alone had the signal, and both stop after the same step
    assert sorted(line[:23] for line in said) == ["0 stopped after step 4 ", "1 stopped after step 4 "]
    loaded, copied = checkpoint.read(tmp_path / "run"), checkpoint.read(tmp_path / "run" / "copy")
    assert loaded.step == 4
    assert copied.header["files"] == loaded.header["files"]
    files.remove(tmp_path / "run" / "copy")
    train(until(6), latents, tmp_path / "run", micro_batch_size=4)
    assert_same_to_reduction_order(tmp_path / "run", tmp_path / "whole")


def test_of_several_processes_one_tells_what_is_wrong(latents: Path, tmp_path: Path, fork: Fork) -> None:
    codes, said = do(fork, job(2, "ddp", None, latents, tmp_path / "run", dataclasses.replace(CONFIG, flip=True)))
    assert codes == [[2, 2]]
    assert [line for line in said if "flip is on" in line] == said
    assert len(said) == 1


@pytest.mark.parametrize("batch_size", [1, 7, 10, 64])
@pytest.mark.parametrize("count", [1, 2, 3, 7])
@pytest.mark.parametrize("micro_batch_size", [None, 1, 3, 100])
def test_shares_are_the_global_batch_and_fit_the_micro_batch(
    batch_size: int, count: int, micro_batch_size: int | None
) -> None:
    if batch_size < count:
        with pytest.raises(ValueError, match=f"batch_size {batch_size} is less than the number of processes, {count}"):
            share(batch_size, micro_batch_size, Processes(0, count))
        return
    shares = [share(batch_size, micro_batch_size, Processes(rank, count)) for rank in range(count)]
    assert torch.equal(torch.cat([position for position, _ in shares]), torch.arange(batch_size))
    assert len({parts for _, parts in shares}) == 1  # or processes would wait for each other
    if micro_batch_size:
        assert all(len(part) <= micro_batch_size for own, parts in shares for part in own.tensor_split(parts))


@pytest.mark.parametrize(
    "options",
    [{"recompute": True}, {"tf32": True}, pytest.param({"compile": True, "recompute": True}, marks=pytest.mark.slow)],
    ids=lambda options: "-".join(options),
)
def test_how_a_step_is_worked_out_does_not_change_what_is_learnt(
    latents: Path, tmp_path: Path, options: dict[str, bool]
) -> None:
    train(CONFIG, latents, tmp_path / "plain")
    before = torch.get_float32_matmul_precision()
    train(dataclasses.replace(CONFIG, steps=2), latents, tmp_path / "run", **options)  # type: ignore[arg-type]
    assert torch.get_float32_matmul_precision() == before
    folder = train(CONFIG, latents, tmp_path / "run")  # a run may go on without
    files.remove(folder.with_name("step-00000002"))
    for file in ("model", "ema-0.5", "optimizer"):
        ours, theirs = numbers(tmp_path / "run", file), numbers(tmp_path / "plain", file)
        assert (ours - theirs).norm() < 1e-6 * theirs.norm()


def test_blocks_that_are_worked_out_again_keep_less(latents: Path) -> None:
    kept = {}
    for recompute in (False, True):
        model = Transformer(CONFIG.model((4, 4, 4), 4))
        if recompute:
            recompute_blocks(model)
        sizes = list[int]()

        def note(tensor: torch.Tensor, sizes: list[int] = sizes) -> torch.Tensor:
            sizes.append(tensor.numel())
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            model(torch.randn(8, 4, 4, 4), torch.rand(8), torch.zeros(8, dtype=torch.int64))
        kept[recompute] = sum(sizes)
    assert kept[True] < 0.5 * kept[False]


def test_an_impossible_division_is_refused(latents: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="micro_batch_size must be at least 1, got 0"):
        train(CONFIG, latents, tmp_path / "run", micro_batch_size=0)
    with pytest.raises(ValueError, match="unknown parallel 'fdsp', did you mean 'fsdp'"):
        train(CONFIG, latents, tmp_path / "run", parallel="fdsp")
