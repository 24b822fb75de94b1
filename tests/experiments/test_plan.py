"""The plan: counts against PyTorch's own, bytes against files, memory against what autograd keeps."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.flop_counter import FlopCounterMode

from jlt.experiments.plan import ACCELERATORS, as_table, memory_parts, plan
from jlt.experiments.presets import PAPER, PRESETS, Expected
from jlt.nn import EMA, Transformer, TransformerConfig, checkpoint
from jlt.training import TrainConfig, make_optimizer

UNCONDITIONAL = Expected((4, 8, 8), num_classes=0, num_images=100)


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        *(
            (PRESETS[name].config, PRESETS[name].expected)
            for name in ("jlt-b-1", "jlt-b-2", "jlt-b-1-jit", "jlt-b-2-512", "jlt-s-2", "digits")
        ),
        (replace(PRESETS["jlt-h-1-jit"].config, size="8x1280x16", in_context_start=3), Expected()),
        (replace(PAPER, size="5x64x2", bottleneck=6), UNCONDITIONAL),
        (replace(PAPER, size="5x64x2", in_context_tokens=9), Expected((4, 8, 8), 3, 100)),
    ],
)
def test_operations_agree_with_pytorchs_counter(config: TrainConfig, expected: Expected) -> None:
    with torch.device("meta"):
        model = Transformer(config.model(expected.shape, expected.num_classes))
        z, t, label = torch.empty(1, *expected.shape), torch.empty(1), torch.zeros(1, dtype=torch.int64)
    with FlopCounterMode(display=False) as forward:
        y = model(z, t, label)
    with FlopCounterMode(display=False) as training:
        y.sum().backward()
    planned = plan(config, expected)
    # exact, but how an attention kernel's backward pass is counted is PyTorch's affair
    assert planned.forward_gflop * 1e9 == pytest.approx(forward.get_total_flops(), rel=0.01)
    both = forward.get_total_flops() + training.get_total_flops()
    assert planned.training_gflop * 1e9 == pytest.approx(both, rel=0.01)


@pytest.mark.parametrize(
    ("preset", "parameters"), [("jlt-b-1", 130_508_672), ("jlt-l-1", 458_090_592), ("jlt-h-1", 951_293_120)]
)
def test_the_papers_models_are_planned_with_the_papers_counts(preset: str, parameters: int) -> None:
    planned = plan(PRESETS[preset].config, PRESETS[preset].expected)
    assert (planned.parameters, planned.tokens) == (parameters, 256)
    assert planned.latent_bytes == pytest.approx(168e9, rel=0.001)


def test_the_papers_base_model_takes_25_hours_of_an_h100() -> None:
    planned = plan(PAPER, Expected())
    assert planned.forward_gflop == pytest.approx(46.1, abs=0.05)
    assert planned.training_gflop == pytest.approx(138, abs=0.5)
    assert planned.training_flop == pytest.approx(3.5e19, rel=0.02)
    assert planned.hours["H100 SXM"] == pytest.approx(25, abs=0.5)
    assert planned.hours.keys() == ACCELERATORS.keys()
    faster = plan(PAPER, Expected(), utilisation=0.8)
    assert faster.hours["A100"] == pytest.approx(planned.hours["A100"] / 2)


def test_a_checkpoint_has_the_planned_size(tmp_path: Path) -> None:
    config, expected = replace(PRESETS["digits"].config, ema_lengths=(0.1, 0.05)), PRESETS["digits"].expected
    model = Transformer(config.model(expected.shape, expected.num_classes))
    optimizer = make_optimizer(model, config)
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    checkpoint.save(
        tmp_path / "saved", model, EMA(model, config.ema_decays, config.ema_lengths), optimizer, {"step": 1}
    )
    found = sum(path.stat().st_size for path in (tmp_path / "saved").iterdir())
    assert found == pytest.approx(plan(config, expected).checkpoint_bytes, rel=0.01)  # headers


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("options", [{}, {"in_context_tokens": 16, "in_context_start": 2}])
def test_activations_are_what_autograd_keeps(dtype: str, options: dict[str, int]) -> None:
    config = replace(PAPER, size="6x128x2", dtype=dtype, **options)
    shape = config.model((8, 8, 8), 5)
    model = Transformer(shape)
    kept = kept_bytes(model, shape, dtype, 4) - kept_bytes(model, shape, dtype, 2)
    planned = memory_parts(config, shape, 0, 2)["activations"]
    assert planned == pytest.approx(kept, rel=0.1)  # what surrounds the blocks, and a few numbers a head, are left out


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_recomputed_blocks_keep_their_inputs_and_one_of_them_the_rest(dtype: str) -> None:
    config = replace(PAPER, size="6x128x2", dtype=dtype)
    shape = config.model((8, 8, 8), 5)
    model, inputs = Transformer(shape), []
    for block in model.blocks:
        block.register_forward_pre_hook(lambda _, given: inputs.append(given[0].untyped_storage().nbytes()))
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bfloat16"):
        model(torch.randn(2, *shape.shape), torch.rand(2), torch.zeros(2, dtype=torch.int64))
    whole, saved = (memory_parts(config, shape, 0, 2, recompute)["activations"] for recompute in (False, True))
    assert saved == sum(inputs) + whole / shape.depth
    again = plan(config, Expected((8, 8, 8), 5, 10), recompute=True)
    once = plan(config, Expected((8, 8, 8), 5, 10))
    assert again.training_flop == once.training_flop  # what the model takes; the hours are those of the device
    assert again.hours["A100"] / once.hours["A100"] == pytest.approx(4 / 3, rel=0.01)


def kept_bytes(model: Transformer, config: TransformerConfig, dtype: str, images: int) -> int:
    """Count the bytes that a forward pass leaves for the backward pass, besides the weights."""
    storages: dict[int, Tensor] = {}
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}

    def pack(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage().data_ptr() not in weights:
            storages[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    unpack: Callable[[Tensor], Tensor] = lambda tensor: tensor  # noqa: E731
    with saved_tensors_hooks(pack, unpack), torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bfloat16"):
        y = model(torch.randn(images, *config.shape), torch.rand(images), torch.zeros(images, dtype=torch.int64))
    assert y.requires_grad
    return sum(tensor.untyped_storage().nbytes() for tensor in storages.values())


def test_the_table_says_what_is_an_estimate() -> None:
    exact, _, estimates = as_table(plan(PAPER, Expected())).partition("estimates")
    assert "130,508,672" in exact
    assert "hours" not in exact
    assert "memory" not in exact
    assert all(name in estimates for name in ACCELERATORS)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"micro_batch_size": 0}, "micro_batch_size must be at least 1, got 0"),
        ({"utilisation": 0.0}, r"utilisation must be in \(0, 1\], got 0.0"),
    ],
)
def test_an_impossible_plan_is_refused(change: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        plan(PAPER, Expected(), **change)  # type: ignore[arg-type]
