"""One model on several devices, by torch.distributed: every process has a copy (ddp), or a part of it (fsdp).

The processes split the positions of the global batch, and each splits its own into micro-batches. Every random number
is a function of its position, so only the order of summation depends on how many there are.
"""

import contextlib
import functools
from collections.abc import Callable, Iterator

import torch
from jaxtyping import Int
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from jlt.nn import Transformer
from jlt.processes import Processes

Engine = Callable[[Transformer, torch.device, Processes], nn.Module]


def share(batch_size: int, micro_batch_size: int | None, processes: Processes) -> tuple[Int[Tensor, " n"], int]:
    """Return this process's positions in the global batch, and in how many micro-batches all processes take theirs."""
    if batch_size < processes.count:
        raise ValueError(f"batch_size {batch_size} is less than the number of processes, {processes.count}")
    if micro_batch_size is not None and micro_batch_size < 1:
        raise ValueError(f"micro_batch_size must be at least 1, got {micro_batch_size}")
    shares = torch.arange(batch_size).tensor_split(processes.count)
    largest = len(shares[0])
    # the same number everywhere, or processes would wait in vain for each other's parts of the model
    return shares[processes.rank], -(-largest // (micro_batch_size or largest))


def recompute_blocks(model: Transformer) -> None:
    """Keep only the input of each block for the backward pass, which works out the rest again."""
    for block in model.blocks:
        # dropout draws from no state, so there is none to restore
        block.forward = functools.partial(checkpoint, block.forward, use_reentrant=False, preserve_rng_state=False)


@contextlib.contextmanager
def tf32_products(wanted: bool) -> Iterator[None]:
    """Within the block, let GPUs multiply float32 matrices in TF32, or not; outside all is as it was."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high" if wanted else "highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def ddp(model: Transformer, device: torch.device, processes: Processes) -> nn.Module:
    """Return a module that computes like `model` and averages its gradients over the processes."""
    return DistributedDataParallel(model.to(device), broadcast_buffers=False)


def fsdp(model: Transformer, device: torch.device, processes: Processes) -> nn.Module:
    """Shard `model` in place over the processes, a block at a time; its gradients are averages over them, too."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(device.type, (processes.count,))
    for block in model.blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model.to(device)


PARALLEL: dict[str, Engine] = {"ddp": ddp, "fsdp": fsdp}
