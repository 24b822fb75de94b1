"""The plan: what a recipe costs before anything is spent, from its settings and the shape of its latents alone.

Counts are exact: parameters, tokens, steps, and floating-point operations, a multiplication with its addition being two
(matrix products and attention, as PyTorch's counter does; norms and the like are left out). Bytes of latents and
checkpoints are exact but for headers. Memory and hours are estimates: nothing was run on the machines named.
"""

import json
from dataclasses import asdict, dataclass

import torch

from jlt.experiments.presets import Expected
from jlt.nn import Transformer, TransformerConfig, model_name
from jlt.nn.flops import forward_flop, training_flop
from jlt.training import TrainConfig

ACCELERATORS = {  # dense bfloat16 peak in TFLOP/s, without sparsity
    "H100 SXM": 989.0,  # NVIDIA H100 datasheet: 1,979 with sparsity
    "A100": 312.0,  # NVIDIA A100 datasheet
    "L40S": 362.0,  # NVIDIA L40S datasheet
    "RTX 4090": 165.0,  # NVIDIA Ada architecture whitepaper, appendix A, accumulating in float32
    "MI300X": 1307.0,  # AMD Instinct MI300X datasheet
}


@dataclass(frozen=True)
class Plan:
    """What a run is and costs.

    `*_gflop` are 10^9 operations an image, `training_gflop` forward and backward; `training_flop` are the whole run's.
    `latent_bytes` is the data set on disk in 16 bits, with mirrored images if the recipe flips; `checkpoint_bytes` one
    checkpoint. Estimates: `memory_bytes` on a device at `micro_batch_size` images, by part in `memory_parts`, and
    `hours` of one device of each kind at `utilisation` of its peak.
    """

    name: str
    parameters: int
    tokens: int
    forward_gflop: float
    training_gflop: float
    latent_shape: tuple[int, int, int]
    num_classes: int
    num_images: int
    batch_size: int
    steps: int
    epochs: float
    training_flop: float
    latent_bytes: int
    checkpoint_bytes: int
    micro_batch_size: int
    memory_bytes: int
    memory_parts: dict[str, int]
    utilisation: float
    hours: dict[str, float]
    estimates: tuple[str, ...] = ("memory_bytes", "memory_parts", "hours")


def plan(
    config: TrainConfig,
    expected: Expected,
    *,
    micro_batch_size: int = 32,
    utilisation: float = 0.4,
    recompute: bool = False,
) -> Plan:
    """Work out what training `config` on such latents takes; nothing is allocated.

    Args:
        config: the recipe.
        expected: shape, classes and number of the latents.
        micro_batch_size: images on a device at once.
        utilisation: share of the peak that a device reaches, in (0, 1].
        recompute: the blocks are worked out again for the backward pass: less memory, a third more operations.
    """
    if micro_batch_size < 1:
        raise ValueError(f"micro_batch_size must be at least 1, got {micro_batch_size}")
    if expected.num_images < 1:
        raise ValueError(f"num_images must be at least 1, got {expected.num_images}")
    if not 0 < utilisation <= 1:
        raise ValueError(f"utilisation must be in (0, 1], got {utilisation}")
    model = config.model(expected.shape, expected.num_classes)
    with torch.device("meta"):
        parameters = sum(p.numel() for p in Transformer(model).parameters())
    channels, height, width = expected.shape
    averages = len(config.ema_decays) + len(config.ema_lengths)
    memory = memory_parts(config, model, parameters, micro_batch_size, recompute)
    total = training_flop(model) * config.batch_size * config.steps
    made = total + (forward_flop(model) * config.batch_size * config.steps if recompute else 0)
    return Plan(
        name=model_name(config.target, model),
        parameters=parameters,
        tokens=model.tokens,
        forward_gflop=forward_flop(model) / 1e9,
        training_gflop=training_flop(model) / 1e9,
        latent_shape=expected.shape,
        num_classes=expected.num_classes,
        num_images=expected.num_images,
        batch_size=config.batch_size,
        steps=config.steps,
        epochs=config.steps * config.batch_size / expected.num_images,
        training_flop=float(total),
        latent_bytes=2 * expected.num_images * channels * height * width * (2 if config.flip else 1),
        checkpoint_bytes=4 * parameters * (3 + averages),  # weights, two moments, averages
        micro_batch_size=micro_batch_size,
        memory_bytes=sum(memory.values()),
        memory_parts=memory,
        utilisation=utilisation,
        hours={name: made / (peak * 1e12 * utilisation * 3600) for name, peak in ACCELERATORS.items()},
    )


def memory_parts(
    config: TrainConfig, model: TransformerConfig, parameters: int, images: int, recompute: bool = False
) -> dict[str, int]:
    """Estimate the bytes on a device by part, with nothing sharded.

    Activations are what the blocks keep for the backward pass, in bytes a token: 48 D + 8 W in bfloat16, 72 D + 16 W
    in float32, D being the hidden size and W the MLP's width. Blocks that are worked out again keep their inputs, 2 D
    or 4 D a token, and one of them the rest. Not counted: what is held for a moment only.
    """
    d, w, half = model.hidden_size, model.mlp_width, config.dtype == "bfloat16"
    token_blocks = model.tokens * model.depth
    if model.in_context_tokens:
        token_blocks += model.in_context_tokens * (model.depth - model.in_context_start)
    a_block = model.tokens + model.in_context_tokens if recompute else token_blocks  # tokens with all they need
    inputs = (2 if half else 4) * d * token_blocks if recompute else 0
    return {
        "parameters": 4 * parameters,
        "gradients": 4 * parameters,
        "moments": 8 * parameters,
        "averages": 4 * parameters * (len(config.ema_decays) + len(config.ema_lengths)),
        "bfloat16 weights": 2 * parameters if half else 0,
        "activations": images * (inputs + a_block * (48 * d + 8 * w if half else 72 * d + 16 * w)),
    }


def as_json(planned: Plan) -> str:
    """Return the plan as one JSON object."""
    return json.dumps(asdict(planned), allow_nan=False)


def as_table(planned: Plan) -> str:
    """Return the plan as lines to read, estimates under a heading of their own."""
    p = planned
    shape = " x ".join(map(str, p.latent_shape))
    exact = {
        "parameters": f"{p.parameters:,}",
        "latents": f"{p.num_images:,} of {shape}, {p.num_classes} classes, {size(p.latent_bytes)} on disk",
        "tokens an image": f"{p.tokens}",
        "GFLOP an image": f"{p.forward_gflop:.4g} forward, {p.training_gflop:.4g} training",
        "steps": f"{p.steps:,} of {p.batch_size} images = {p.epochs:.4g} epochs, {p.training_flop:.2g} FLOP",
        "a checkpoint": size(p.checkpoint_bytes),
    }
    parts = ", ".join(f"{name} {size(part)}" for name, part in p.memory_parts.items() if part)
    estimates = {f"memory at {p.micro_batch_size} a device": f"{size(p.memory_bytes)} ({parts})"}
    estimates |= {f"hours of one {name}": f"{hours:,.3g}" for name, hours in p.hours.items()}
    lines = [p.name, *(f"  {name:<26}{text}" for name, text in exact.items())]
    lines += [f"estimates, at {p.utilisation:.0%} of each device's dense bfloat16 peak; none was measured"]
    return "\n".join([*lines, *(f"  {name:<26}{text}" for name, text in estimates.items())])


def size(num_bytes: int) -> str:
    """Return bytes in GB or MB (powers of ten)."""
    return f"{num_bytes / 1e9:.4g} GB" if num_bytes >= 1e9 else f"{num_bytes / 1e6:.4g} MB"
