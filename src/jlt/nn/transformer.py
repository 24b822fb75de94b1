"""The backbone that all targets share, to the last weight (paper, "Backbone").

Called as `model(z, t, label)` with `z` (B, C, S, S), `t` (B,) in [0, 1], and `label` (B,) in [0, num_classes], where
`num_classes` itself means "no class"; the output has the shape of `z`. Sizes are in letters: B batch, U different
conditions (U = B unless images share them), N tokens, D hidden size, H heads, P = patch_size^2 * C numbers a token.
Tokens are in row-major order, a token's numbers in (row, column, channel) order. Runs on any device and dtype;
attention is PyTorch's scaled dot product.

Three options come from JiT (arXiv 2511.13720) and are off unless asked for: a bottleneck in the patch embedding,
class tokens in context, and dropout. Off, they leave no weight, no number and no cost.
"""

import importlib
import math
import warnings
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from jlt.flow import random
from jlt.flow.targets import short_name

EPS = 1e-6  # of every RMSNorm
BOUNDS = {  # far above any model, and low enough that a file cannot ask for the impossible
    "latent_size": (1, 2**12),
    "latent_channels": (1, 2**16),
    "patch_size": (1, 2**12),
    "hidden_size": (1, 2**16),
    "depth": (1, 2**10),
    "num_heads": (1, 2**10),
    "num_classes": (0, 2**24),
    "bottleneck": (0, 2**16),
    "in_context_tokens": (0, 2**12),
    "in_context_start": (0, 2**10),
}
SIZES = {  # depth, hidden size, heads; the paper's B, L, H (from JiT), and two for one GPU or a CPU
    "Ti": (12, 192, 3),
    "S": (12, 384, 6),
    "B": (12, 768, 12),
    "L": (24, 1024, 16),
    "H": (32, 1280, 16),
}


@dataclass(frozen=True)
class TransformerConfig:
    """Everything that determines the network's architecture.

    Attributes:
        latent_size: height and width of the latent.
        latent_channels: channels of the latent.
        patch_size: latent positions along the side of a token.
        hidden_size: width of the residual stream.
        depth: number of blocks.
        num_heads: attention heads; hidden_size / num_heads must be a multiple of 4 (two axes of rotated pairs).
        num_classes: classes; 0 makes the network unconditional.
        mlp_ratio: the SwiGLU's width is int(mlp_ratio * hidden_size * 2/3).
        version: version of this configuration; later options default to off.
        bottleneck: numbers that a patch passes through on its way to a token: a linear map to them without bias, and
            one to hidden_size with bias (JiT: 128 for B and L, 256 for H); 0 maps the patch directly.
        in_context_tokens: class tokens before the image's: each is the class embedding plus a learned position, turned
            by no rotation (JiT: 32); they leave before the output. 0 is none.
        in_context_start: the block before which they enter, counted from 0 (JiT: 4, 8, 10 for B, L, H).
        dropout: in training, share of numbers set to 0, the others being divided by 1 - dropout, in two places of each
            block in the middle half (depth // 4 <= i < 3 (depth // 4)), as in JiT (0.2 for H): after the attention's
            output layer, and before the MLP's, on its hidden units. Attention weights are never dropped.
    """

    latent_size: int
    latent_channels: int
    patch_size: int
    hidden_size: int
    depth: int
    num_heads: int
    num_classes: int
    mlp_ratio: float = 4.0
    version: int = 1
    bottleneck: int = 0
    in_context_tokens: int = 0
    in_context_start: int = 0
    dropout: float = 0.0

    def __post_init__(self) -> None:
        if self.version != 1:
            raise ValueError(f"the model's configuration is of version {self.version}, this jlt knows version 1")
        for name, (least, most) in BOUNDS.items():
            value = getattr(self, name)
            if not isinstance(value, int) or not least <= value <= most:
                raise ValueError(f"{name} must be a whole number in [{least}, {most}], got {value!r}")
        if not isinstance(self.mlp_ratio, int | float) or not 0 < self.mlp_ratio <= 64:
            raise ValueError(f"mlp_ratio must be in (0, 64], got {self.mlp_ratio!r}")
        if not isinstance(self.dropout, int | float) or not 0 <= self.dropout < 1:
            raise ValueError(f"dropout must be in [0, 1), got {self.dropout!r}")
        if self.latent_size % self.patch_size:
            raise ValueError(f"latent_size {self.latent_size} is not a multiple of patch_size {self.patch_size}")
        if self.hidden_size % (4 * self.num_heads):
            raise ValueError(f"hidden_size {self.hidden_size} is not a multiple of 4 x num_heads {self.num_heads}")
        if self.in_context_tokens and not self.num_classes:
            raise ValueError(
                f"in_context_tokens is {self.in_context_tokens}, an unconditional model has no class tokens"
            )
        if self.dropout and self.depth < 4:
            raise ValueError(f"dropout {self.dropout} has no block to act in: depth {self.depth} is not at least 4")
        if self.in_context_tokens and self.in_context_start >= self.depth:
            raise ValueError(f"in_context_start {self.in_context_start} is not below depth {self.depth}")

    @property
    def tokens(self) -> int:
        """Number of tokens an image, class tokens not counted."""
        return (self.latent_size // self.patch_size) ** 2

    @property
    def patch_numbers(self) -> int:
        """Numbers a token stands for: P."""
        return self.patch_size**2 * self.latent_channels

    @property
    def mlp_width(self) -> int:
        """Hidden units of the SwiGLU."""
        return int(self.mlp_ratio * self.hidden_size * 2 / 3)

    @property
    def shape(self) -> tuple[int, int, int]:
        """Shape of one latent: (channels, height, width)."""
        return (self.latent_channels, self.latent_size, self.latent_size)


def model_name(target: str, config: TransformerConfig) -> str:
    """Return the model's one name, for instance `JLT-B/1` (x), `DiT-B/1` (v), `eps-B/1`, or `JLT-4x128/2`."""
    target = short_name(target)
    family = {"x": "JLT", "v": "DiT"}.get(target, target)
    shape = (config.depth, config.hidden_size, config.num_heads)
    size = next((name for name, row in SIZES.items() if row == shape), f"{config.depth}x{config.hidden_size}")
    return f"{family}-{size}/{config.patch_size}"


@dataclass(frozen=True)
class Dropout:
    """What dropout draws from: a mask is a function of seed, step and each image's position in the global batch.

    The step is a tensor, or a compiled network would be compiled again at every step.
    """

    seed: int
    step: Int[Tensor, ""]
    position: Int[Tensor, " b"]

    def __call__(self, x: Tensor, rate: float, site: int) -> Tensor:
        """Drop numbers of `x` (B, ...); `site` numbers the place in the network."""
        kept = random.kept(self.seed, self.step, self.position, site, x.shape[1:], rate)
        return torch.where(kept, x / (1 - rate), 0)


class Transformer(nn.Module):
    """The network; `seed` determines its initial weights, and no global random state is read or written."""

    def __init__(self, config: TransformerConfig, seed: int = 0) -> None:
        super().__init__()
        self.config = config
        d, p = config.hidden_size, config.patch_numbers
        with torch.random.fork_rng(devices=[]):  # nn.Linear draws weights that `initialise` draws again
            self.bottleneck = nn.Linear(p, config.bottleneck, bias=False) if config.bottleneck else None
            self.embed = nn.Linear(config.bottleneck or p, d)
            self.time = TimeEmbedding(d)
            self.label = nn.Embedding(config.num_classes + 1, d) if config.num_classes else None
            self.class_position = nn.Parameter(torch.empty(k, d)) if (k := config.in_context_tokens) else None
            self.blocks = nn.ModuleList(Block(config, i) for i in range(config.depth))
            self.norm = nn.RMSNorm(d, eps=EPS)
            self.modulation = nn.Linear(d, 2 * d)
            self.output = nn.Linear(d, p)
        self.register_buffer("rotation", rotary_table(config), persistent=False)
        self.rotation: Tensor
        self.initialise(seed)

    def initialise(self, seed: int) -> None:
        """Draw the initial weights: Xavier-uniform linears, N(0, 0.02) embeddings, zeros where the paper says."""
        generator = torch.Generator().manual_seed(seed)
        zero = {self.modulation, self.output} | {block.modulation for block in self.blocks if isinstance(block, Block)}
        small = {self.time.hidden, self.time.out}
        for module in self.modules():
            if isinstance(module, nn.Linear):
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
                if module in zero:
                    nn.init.zeros_(module.weight)
                elif module in small:
                    nn.init.normal_(module.weight, std=0.02, generator=generator)
                else:
                    nn.init.xavier_uniform_(module.weight, generator=generator)
            elif isinstance(module, nn.Embedding):
                nn.init.normal_(module.weight, std=0.02, generator=generator)
        if self.class_position is not None:
            nn.init.normal_(self.class_position, std=0.02, generator=generator)

    def compile_blocks(self) -> None:
        """Compile the blocks, which are alike, so that one compilation serves all."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # the compiler's own, at its import
            importlib.import_module("torch._inductor.compile_fx")
        for block in self.blocks:
            block.compile()

    def forward(
        self,
        z: Float[Tensor, "b c s s"],
        t: Float[Tensor, " t"],
        label: Int[Tensor, " u"] | None = None,
        dropout: Dropout | None = None,
        rows: Int[Tensor, " b"] | None = None,
    ) -> Float[Tensor, "b c s s"]:
        """Return the prediction `y`; `label` is needed unless the network is unconditional, and then is ignored.

        A `t` or a `label` of length 1 is that of all images. With `rows`, `t` and `label` are the different conditions,
        image i has the one numbered rows[i], and what depends on conditions alone is worked out once for each.
        Training passes what `dropout` draws from; without it nothing is dropped, whatever the configuration.
        """
        config = self.config
        condition = self.time(t)  # (U, D)
        if self.label is not None:
            assert label is not None, "a class-conditional network needs labels; num_classes means no class"
            embedding = self.label(label)  # (U, D)
            condition = condition + embedding
        condition = F.silu(condition)
        x = patchify(z, config.patch_size)  # (B, N, P)
        x = self.embed(x if self.bottleneck is None else self.bottleneck(x))  # (B, N, D)
        rotation = self.rotation[:, config.in_context_tokens :]
        for i, block in enumerate(self.blocks):
            if self.class_position is not None and i == config.in_context_start:
                images = x.shape[0]  # len() would bind an exported network to one batch size
                tokens = pick(embedding, rows).expand(images, -1, -1) + self.class_position  # (B, K, D)
                x, rotation = torch.cat([tokens.to(x.dtype), x], dim=1), self.rotation  # (B, K + N, D)
            x = block(x, condition, rotation, dropout, rows)
        x = x[:, config.in_context_tokens :]
        shift, scale = pick(self.modulation(condition), rows).chunk(2, dim=-1)
        x = self.output(modulated_norm(x, self.norm.weight, shift, scale))  # (B, N, P)
        return unpatchify(x, self.config)


class Block(nn.Module):
    """A Transformer block: attention and SwiGLU, each scaled, shifted and gated by the condition (adaLN-Zero)."""

    def __init__(self, config: TransformerConfig, index: int) -> None:
        super().__init__()
        d, width, quarter = config.hidden_size, config.mlp_width, config.depth // 4
        self.index = index
        self.drop_rate = config.dropout if quarter <= index < 3 * quarter else 0.0
        self.head_size = d // config.num_heads
        self.modulation = nn.Linear(d, 6 * d)
        self.norm_attention = nn.RMSNorm(d, eps=EPS)
        self.qkv = nn.Linear(d, 3 * d)
        self.norm_q = nn.RMSNorm(self.head_size, eps=EPS)
        self.norm_k = nn.RMSNorm(self.head_size, eps=EPS)
        self.project = nn.Linear(d, d)
        self.norm_mlp = nn.RMSNorm(d, eps=EPS)
        self.mlp_in = nn.Linear(d, 2 * width)
        self.mlp_out = nn.Linear(width, d)

    def forward(
        self,
        x: Tensor,
        condition: Tensor,
        rotation: Tensor,
        dropout: Dropout | None = None,
        rows: Tensor | None = None,
    ) -> Tensor:
        """Map tokens (B, N, D) under SiLU(condition) (U, D)."""
        dropout = dropout if self.drop_rate else None
        modulations = pick(self.modulation(condition), rows)  # (B, 1, 6 D)
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = modulations.chunk(6, dim=-1)
        tokens = modulated_norm(x, self.norm_attention.weight, shift_a, scale_a)
        x = torch.addcmul(x, gate_a, self.attention(tokens, rotation, dropout))
        tokens = modulated_norm(x, self.norm_mlp.weight, shift_m, scale_m)
        return torch.addcmul(x, gate_m, self.mlp(tokens, dropout))

    def attention(self, x: Tensor, rotation: Tensor, dropout: Dropout | None = None) -> Tensor:
        qkv = self.qkv(x).unflatten(-1, (3, -1, self.head_size))  # (B, N, 3, H, D/H)
        weight = torch.stack([self.norm_q.weight, self.norm_k.weight])
        q, k = rotated_norm(qkv[:, :, :2], weight, rotation).permute(2, 0, 3, 1, 4)  # each (B, H, N, D/H)
        v = qkv[:, :, 2].transpose(1, 2)
        x = self.project(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return dropout(x, self.drop_rate, 2 * self.index) if dropout else x

    def mlp(self, x: Tensor, dropout: Dropout | None = None) -> Tensor:
        gate, value = self.mlp_in(x).chunk(2, dim=-1)
        x = F.silu(gate) * value
        return self.mlp_out(dropout(x, self.drop_rate, 2 * self.index + 1) if dropout else x)


class TimeEmbedding(nn.Module):
    """Sinusoids of t itself (256 numbers, cosines first, period 10,000), then a two-layer SiLU MLP."""

    def __init__(self, hidden_size: int, frequencies: int = 256) -> None:
        super().__init__()
        self.hidden = nn.Linear(frequencies, hidden_size)
        self.out = nn.Linear(hidden_size, hidden_size)
        half = frequencies // 2
        self.register_buffer("frequency", torch.exp(-math.log(10000) * torch.arange(half) / half), persistent=False)
        self.frequency: Tensor

    def forward(self, t: Tensor) -> Tensor:
        """Embed times (B,) as (B, D); the sinusoids are worked out in float32 whatever the weights' dtype."""
        angle = t.float()[:, None] * self.frequency.float()
        embedding = torch.cat([angle.cos(), angle.sin()], dim=-1).to(self.hidden.weight.dtype)
        return self.out(F.silu(self.hidden(embedding)))


def pick(conditions: Tensor, rows: Tensor | None) -> Tensor:
    """Return each image's row of (U, D) with an axis for its tokens (B, 1, D); without `rows` they are in order."""
    return (conditions if rows is None else conditions[rows]).unsqueeze(1)


def modulated_norm(x: Tensor, weight: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """Return `RMSNorm(x) (1 + scale) + shift`; the norm's weight joins the scale, which has no token axis."""
    return torch.addcmul(shift, F.rms_norm(x, x.shape[-1:], eps=EPS), weight * (1 + scale))


def rotary_table(config: TransformerConfig) -> Float[Tensor, "2 n d"]:
    """Return cosines and sines of the 2-D rotary embedding: half of a head's dimensions for rows, half for columns.

    A pair (a, b) turns to (a cos - b sin, b cos + a sin), so the sine of each pair's first dimension is negated. Class
    tokens, if there are any, come first and are not turned.
    """
    axis = config.hidden_size // config.num_heads // 2
    frequency = 10000.0 ** -(torch.arange(0, axis, 2) / axis)
    side = torch.arange(config.latent_size // config.patch_size)
    rows, columns = torch.meshgrid(side, side, indexing="ij")
    angle = torch.cat([rows.reshape(-1, 1) * frequency, columns.reshape(-1, 1) * frequency], dim=-1)
    angle = F.pad(angle, (0, 0, config.in_context_tokens, 0))
    return torch.stack([torch.stack([angle.cos()] * 2, -1), torch.stack([-angle.sin(), angle.sin()], -1)]).flatten(2)


def rotated_norm(x: Tensor, weight: Tensor, rotation: Tensor) -> Tensor:
    """Return queries and keys (B, N, 2, H, D/H) after RMSNorm with their weights (2, D/H), turned by their place."""
    x = F.rms_norm(x, x.shape[-1:], eps=EPS)
    cos, sin = rotation.to(x.dtype)[:, :, None, None]  # (N, 1, 1, D/H)
    weight = weight[:, None]  # (2, 1, D/H)
    return torch.addcmul(x * (weight * cos), swap_pairs(x), swap_pairs(weight) * sin)


def swap_pairs(x: Tensor) -> Tensor:
    """Exchange the members of each adjacent pair of the last axis."""
    return x.unflatten(-1, (-1, 2)).flip(-1).flatten(-2)


def patchify(z: Tensor, patch_size: int) -> Tensor:
    """Cut (B, C, S, S) into tokens (B, N, P), each in (row, column, channel) order."""
    tokens = z.unflatten(3, (-1, patch_size)).unflatten(2, (-1, patch_size))  # (B, C, rows, p, columns, p)
    return tokens.permute(0, 2, 4, 3, 5, 1).flatten(3).flatten(1, 2)


def unpatchify(tokens: Tensor, config: TransformerConfig) -> Tensor:
    """Put tokens (B, N, P) together again as (B, C, S, S)."""
    side, p = config.latent_size // config.patch_size, config.patch_size
    grid = tokens.unflatten(2, (p, p, -1)).unflatten(1, (side, side))  # (B, rows, columns, p, p, C)
    return grid.permute(0, 5, 1, 3, 2, 4).reshape(-1, *config.shape)
