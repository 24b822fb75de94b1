"""Operations of the network by its configuration: a multiplication with its addition is two.

Matrix products and attention are counted, as PyTorch's counter does; norms and the like are left out.
"""

from jlt.nn.transformer import TransformerConfig

TIME_FREQUENCIES = 256


def forward_flop(config: TransformerConfig) -> int:
    """Return the operations of one image's forward pass; conditions are worked out once an image, not a token."""
    d, w, n, p = config.hidden_size, config.mlp_width, config.tokens, config.patch_numbers
    longer = config.depth - config.in_context_start if config.in_context_tokens else 0  # blocks that see class tokens
    lengths = {n: config.depth - longer, n + config.in_context_tokens: longer} if longer else {n: config.depth}
    blocks = sum(count * 2 * m * (4 * d * d + 3 * d * w + 2 * m * d) for m, count in lengths.items())
    embed = p * config.bottleneck + config.bottleneck * d if config.bottleneck else p * d
    condition = TIME_FREQUENCIES * d + d * d + 6 * d * d * config.depth + 2 * d * d
    return blocks + 2 * n * (embed + d * p) + 2 * condition


def training_flop(config: TransformerConfig) -> int:
    """Return the operations of one image's forward and backward pass: three forward ones.

    But for the first layers: nobody asks for the gradient of the latent or of the time.
    """
    first = config.tokens * config.patch_numbers * (config.bottleneck or config.hidden_size)
    return 3 * forward_flop(config) - 2 * (first + TIME_FREQUENCIES * config.hidden_size)
