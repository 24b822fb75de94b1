"""The step on other devices, without them: what it must not ask of one is found on a CPU."""

from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from jlt.nn import EMA, Transformer
from jlt.training import Batch, TrainConfig, make_optimizer, training_step

CONFIG = TrainConfig(size="4x16x2", batch_size=5, dropout=0.2, loss_space="x", loss_weight="min-snr-5")


def made() -> tuple[Transformer, Batch]:
    model = Transformer(CONFIG.model((2, 4, 4), 3))
    x, eps, t = torch.randn(5, 2, 4, 4), torch.randn(5, 2, 4, 4), torch.rand(5)
    return model, Batch(x, eps, t, torch.arange(5) % 4, torch.arange(5))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_host_reads_no_number_in_a_step(dtype: str) -> None:
    config = TrainConfig(**{**CONFIG.__dict__, "dtype": dtype})
    with FakeTensorMode():  # whose tensors have no numbers to read
        model, batch = made()
        ema, optimizer = EMA(model, [0.9, 0.5]), make_optimizer(model, config)
        for step in range(2):
            loss, norm = training_step(model, ema, optimizer, batch, config, step, micro_batches=2)
        assert loss.shape == norm.shape == ()
        with pytest.raises(DataDependentOutputException):
            norm.item()


def test_everything_in_a_step_is_on_one_device() -> None:
    """Meta tensors refuse to meet others; fused AdamW does not know them, so RMSprop takes its place."""
    model, batch = made()
    model, batch = model.to("meta"), batch.to(torch.device("meta"))
    ema, optimizer = EMA(model, [0.9]), torch.optim.RMSprop(model.parameters(), lr=0.1)
    loss, norm = training_step(model, ema, optimizer, batch, CONFIG, 0, micro_batches=2)
    assert loss.device.type == norm.device.type == "meta"
    model.rotation = torch.zeros(model.rotation.shape)
    with pytest.raises(RuntimeError, match="device meta"):
        training_step(model, ema, optimizer, batch, CONFIG, 1)


def test_a_step_copies_no_number_of_the_host_to_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """Which would wait for all that the device has been given: torch.tensor does, torch.full does not."""
    model, batch = made()
    ema, optimizer = EMA(model, [0.9]), make_optimizer(model, CONFIG)
    monkeypatch.setattr(torch, "tensor", lambda *_, **__: pytest.fail("a number was copied"))
    training_step(model, ema, optimizer, batch, CONFIG, 0, micro_batches=2)


class Dtypes(TorchDispatchMode):
    """Notes the dtypes of all that is worked out."""

    def __init__(self) -> None:
        super().__init__()
        self.seen = set[torch.dtype]()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = function(*args, **(kwargs or {}))
        self.seen |= {value.dtype for value in torch.utils._pytree.tree_leaves(out) if isinstance(value, torch.Tensor)}
        return out


def test_a_step_has_no_float64_which_mps_does_not_know() -> None:
    model, batch = made()
    ema, optimizer = EMA(model, [0.9]), make_optimizer(model, CONFIG)
    with Dtypes() as dtypes:
        for step in range(2):
            training_step(model, ema, optimizer, batch, CONFIG, step, micro_batches=2)
    assert torch.float32 in dtypes.seen
    assert torch.float64 not in dtypes.seen
