"""Training: the recipe, one readable step, the loop that resumes, and the held-out loss by time."""

from jlt.training.config import TrainConfig
from jlt.training.held_out import held_out_losses
from jlt.training.loop import Stopped, read_metrics, train
from jlt.training.step import Batch, draw_batch, make_optimizer, training_step

__all__ = [
    "Batch",
    "Stopped",
    "TrainConfig",
    "draw_batch",
    "held_out_losses",
    "make_optimizer",
    "read_metrics",
    "train",
    "training_step",
]
