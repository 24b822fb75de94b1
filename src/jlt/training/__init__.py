"""Training: the recipe, one readable step, the loop that resumes, and the held-out loss by time."""

from jlt.training.config import TrainConfig
from jlt.training.held_out import held_out_losses
from jlt.training.loop import Stopped, train
from jlt.training.metrics import SINKS, read_metrics
from jlt.training.step import Batch, draw_batch, make_optimizer, training_step
from jlt.training.watching import View, Watcher

__all__ = [
    "SINKS",
    "Batch",
    "Stopped",
    "TrainConfig",
    "View",
    "Watcher",
    "draw_batch",
    "held_out_losses",
    "make_optimizer",
    "read_metrics",
    "train",
    "training_step",
]
