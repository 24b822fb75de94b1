"""The network: the Transformer that every target shares, its averages over training, and the checkpoint format."""

from jlt.nn.ema import EMA
from jlt.nn.transformer import SIZES, Dropout, Transformer, TransformerConfig, model_name

__all__ = ["EMA", "SIZES", "Dropout", "Transformer", "TransformerConfig", "model_name"]
