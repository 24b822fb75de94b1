"""Any number of processes, any engine, any micro-batches: one result, to the order of summation."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from jlt.data import encode
from jlt.data.idx import Arrays
from jlt.nn import checkpoint
from jlt.training import TrainConfig, read_metrics

# without AdamW's division by the root of tiny second moments, which would magnify the order of summation
CONFIG = TrainConfig(
    size="4x16x2", steps=3, batch_size=10, learning_rate=1e-3, warmup_steps=0, ema_decays=(0.5,), save_every=3,
    held_out_every=3, dropout=0.2, in_context_tokens=2, in_context_start=1, clip=0.05,
)  # fmt: skip

RANKS = """
import json, os, socket, sys
from pathlib import Path
from jlt.training import Stopped, TrainConfig, train

count, parallel, micro, latents, run, settings, stop = json.loads(sys.argv[1])
config = TrainConfig(**settings)
with socket.socket() as free:
    free.bind(("127.0.0.1", 0))
    port = free.getsockname()[1]
children = []
for rank in range(count):  # what torchrun does, without its seconds of imports
    if (child := os.fork()) == 0:
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(count),
                       "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        code = 1
        def progress(step, loss):
            if stop and [step, rank] == stop:  # one of them alone hears of it
                os.kill(os.getpid(), 15)
        try:
            train(config, Path(latents), Path(run), parallel=parallel, micro_batch_size=micro, progress=progress)
            code = 0
        except ValueError as error:
            print(rank, error)
            code = 2
        except Stopped as stopped:
            print(rank, stopped)
            code = 130
        except SystemExit as end:
            code = end.code
        except BaseException:
            import traceback
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            os._exit(code)
    children.append(child)
sys.exit(max(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children))
"""


@pytest.fixture(scope="module")
def latents(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("latents") / "latents"
    images = torch.randint(0, 256, (40, 1, 8, 8), generator=torch.Generator().manual_seed(0), dtype=torch.uint8).numpy()
    source = Arrays("mnist", images, torch.arange(40).numpy() % 4, ("a", "b", "c", "d"), "test")
    encode(source, folder, stride=2, num_held_out=10)
    return folder


def with_ranks(
    count: int, parallel: str, micro: int | None, latents: Path, run: Path, config: TrainConfig = CONFIG,
    stop: tuple[int, int] | None = None,
) -> subprocess.CompletedProcess[str]:  # fmt: skip
    settings = {k: v for k, v in dataclasses.asdict(config).items() if k != "times"}
    arguments = json.dumps([count, parallel, micro, str(latents), str(run), settings, stop])
    command = [sys.executable, "-W", "ignore", "-c", RANKS, arguments]
    return subprocess.run(command, capture_output=True, text=True)


def tensors(folder: Path, file: str) -> torch.Tensor:
    return torch.cat([tensor.flatten() for _, tensor in sorted(load_file(folder / f"{file}.safetensors").items())])


def assert_same_to_reduction_order(ours: Path, theirs: Path) -> None:
    """Compare the last checkpoints and the metrics of two runs."""
    a, b = checkpoint.read(ours).folder, checkpoint.read(theirs).folder
    # AdamW's first steps move a weight by lr g / (|g| + 1e-8): where g is rounding error alone, as in a key's bias,
    # which no softmax sees, the step is of any size up to lr; the moments have no such division
    moments = [name for name in load_file(a / "optimizer.safetensors") if not name.startswith("step/")]
    first, second = (load_file(folder / "optimizer.safetensors") for folder in (a, b))
    for name in moments:
        assert torch.allclose(first[name], second[name], rtol=1e-3, atol=1e-6), name
    for x, y in zip(read_metrics(ours), read_metrics(theirs), strict=True):
        assert x["step"] == y["step"]
        if "loss" in x:
            assert x["loss"] == pytest.approx(y["loss"], rel=1e-5)
            assert x["gradient_norm"] == pytest.approx(y["gradient_norm"], rel=1e-4)
