"""The recipe: everything that determines a training run besides its latents."""

import math
from dataclasses import dataclass, field

from jlt import files
from jlt.flow import WEIGHTS, TimeDensity, target
from jlt.flow.targets import CHANNELS
from jlt.nn.ema import exponent
from jlt.nn.transformer import SIZES, TransformerConfig

DTYPES = ("float32", "bfloat16")
MEASURED = ("auto", CHANNELS)  # targets that the latents decide: jlt.training.measured
# A run may go on with other values of these; every other difference is refused.
MAY_CHANGE = ("steps", "save_every", "keep_last", "keep_every", "snapshot_every")


def at_least(least: float, settings: object, *names: str) -> None:
    """Raise a ValueError for the first of these fields of `settings` that is below `least`, or is no number."""
    for name in names:
        if not getattr(settings, name) >= least:
            raise ValueError(f"{name} must be at least {least:g}, got {getattr(settings, name)}")


@dataclass(frozen=True)
class TrainConfig:
    """Settings of a training run; the defaults are the paper's recipe (paper, "Recipe") where it has one.

    But for two: it trains in bfloat16 and on mirrored images too, which the presets of its runs switch on.

    Attributes:
        target: what the network predicts: x, eps, v, k=K for x - K eps, k=K0..K1 for a k that changes with t,
            residual=VARIANCE; measured when a training begins, residual=channels, and auto, which forecasts x and v.
        loss_space: the space in which the prediction is scored: any target but auto.
        loss_weight: weight of the loss over t, see docs/targets.md: constant, min-snr-5, soft-min-snr-5, sigmoid, edm,
            p2 or cosmap.
        times: density of the training time t; its shift above 1 moves it towards the noise.
        noise_scale: standard deviation of eps, in training, held-out loss and sampling alike; 1 in the paper, and 2 in
            JiT at 512 px.
        floor: bound on |det| in every velocity, training and sampling alike.
        size: the network, Ti, S, B, L or H, or DEPTHxWIDTHxHEADS such as 6x192x3.
        patch_size: latent positions along the side of a token.
        bottleneck: numbers that a patch is reduced to before it becomes a token (JiT); 0 is none.
        in_context_tokens: class tokens before the image's (JiT: 32); 0 is none.
        in_context_start: the block before which they enter, counted from 0 (JiT: a third of the depth).
        dropout: share of numbers dropped in the middle half of the blocks (JiT: 0.2 for H).
        steps: optimizer steps.
        batch_size: images a step, over all devices.
        learning_rate: after the warm-up.
        warmup_steps: steps over which the learning rate rises from 0.
        decay_steps: last steps over which it falls linearly to 0; 0 keeps it constant, as in the paper.
        betas: AdamW's.
        weight_decay: AdamW's.
        clip: largest norm of the gradient.
        ema_decays: decays of the averages kept; the first is the one that samples by default.
        ema_lengths: relative lengths of power averages kept besides (EDM2: 0.05 and 0.1); from their snapshots that of
            any length is worked out after training.
        snapshot_every: steps between snapshots of them; 0 is as often as `save_every`.
        label_drop: share of images whose label is replaced by "no class".
        flip: train on mirrored latents half of the time (they must have been encoded).
        dtype: float32, or bfloat16 for autocast.
        seed: of the weights, the data order, and every random number.
        held_out_every: steps between measurements of the held-out loss; 0 never.
        save_every: steps between checkpoints; the last step always has one.
        keep_last: checkpoints kept, counted from the last.
        keep_every: besides, checkpoints whose step is a multiple of this; 0 none.
    """

    target: str = "x"
    loss_space: str = "v"
    loss_weight: str = "constant"
    times: TimeDensity = field(default_factory=TimeDensity)
    noise_scale: float = 1.0
    floor: float = 0.05
    size: str = "B"
    patch_size: int = 1
    bottleneck: int = 0
    in_context_tokens: int = 0
    in_context_start: int = 0
    dropout: float = 0.0
    steps: int = 250_000
    batch_size: int = 1024
    learning_rate: float = 2e-4
    warmup_steps: int = 6250
    decay_steps: int = 0
    betas: tuple[float, float] = (0.9, 0.95)
    weight_decay: float = 0.0
    clip: float = 1.0
    ema_decays: tuple[float, ...] = (0.9999, 0.9996)
    ema_lengths: tuple[float, ...] = ()
    snapshot_every: int = 0
    label_drop: float = 0.1
    flip: bool = False
    dtype: str = "float32"
    seed: int = 0
    held_out_every: int = 5000
    save_every: int = 5000
    keep_last: int = 2
    keep_every: int = 0

    def __post_init__(self) -> None:
        if self.target not in MEASURED:
            target(self.target)
        if not self.loss_space == self.target == CHANNELS:
            target(self.loss_space)
        if self.target == "auto" and self.loss_space.startswith(CHANNELS):
            raise ValueError(f"target auto forecasts losses of one space for all channels, not {self.loss_space:.40}")
        files.choose("loss weight", self.loss_weight, WEIGHTS)
        files.choose("dtype", self.dtype, dict.fromkeys(DTYPES))
        at_least(1, self, "steps", "batch_size", "patch_size", "save_every", "keep_last")
        at_least(
            0, self, "warmup_steps", "decay_steps", "held_out_every", "keep_every", "snapshot_every", "seed",
            "bottleneck", "in_context_tokens", "in_context_start",
        )  # fmt: skip
        for name in ("learning_rate", "clip", "noise_scale"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be above 0 and finite, got {getattr(self, name)}")
        for name in ("weight_decay", "floor"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be at least 0 and finite, got {getattr(self, name)}")
        for name, shares in {"dropout": (self.dropout,), "betas": self.betas, "ema_decays": self.ema_decays}.items():
            if outside := [share for share in shares if not 0 <= share < 1]:
                raise ValueError(f"{name} must be in [0, 1), got {outside[0]}")
        if self.seed >= 2**64:
            raise ValueError(f"seed must be below 2^64, got {self.seed}")
        if not 0 <= self.label_drop <= 1:
            raise ValueError(f"label_drop must be in [0, 1], got {self.label_drop}")
        for length in self.ema_lengths:
            exponent(length)
        for name in ("ema_decays", "ema_lengths"):
            values = getattr(self, name)
            if len({f"{value:g}" for value in values}) < len(values):  # by which files are named
                raise ValueError(f"{name} must differ in six digits, got {', '.join(map(str, values))}")
        architecture(self.size)

    def model(self, shape: tuple[int, int, int], num_classes: int) -> TransformerConfig:
        """Return the network's configuration for latents of that shape (channels, height, width)."""
        channels, height, width = shape
        if height != width:
            raise ValueError(f"the backbone takes square latents, these are {height} x {width}")
        depth, hidden_size, num_heads = architecture(self.size)
        return TransformerConfig(
            height, channels, self.patch_size, hidden_size, depth, num_heads, num_classes,
            bottleneck=self.bottleneck, in_context_tokens=self.in_context_tokens,
            in_context_start=self.in_context_start, dropout=self.dropout,
        )  # fmt: skip

    def learning_rate_at(self, step: int) -> float:
        """Return the learning rate of the step numbered `step`, counted from 0: the first warm-up step has 0."""
        warmup = step / self.warmup_steps if self.warmup_steps else 1.0
        decay = (self.steps - step) / self.decay_steps if self.decay_steps else 1.0
        return self.learning_rate * min(1.0, warmup, decay)


def architecture(size: str) -> tuple[int, int, int]:
    """Return (depth, hidden size, heads) of a size's name or of DEPTHxWIDTHxHEADS."""
    parts = size.split("x")
    if len(parts) == 3 and all(part.isdecimal() for part in parts):
        return int(parts[0]), int(parts[1]), int(parts[2])
    return files.choose("size", size, {**SIZES, "DEPTHxWIDTHxHEADS": (0, 0, 0)})
