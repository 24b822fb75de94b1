"""Sampling: time grids, ODE solvers, guidance, the field they solve, and images from seeds."""

from jlt.sampling.field import GUIDANCE, SCHEDULES, Field, Guide, classifier_free, default_scale, guided
from jlt.sampling.generator import Generator, Making, Samples, load
from jlt.sampling.grids import GRIDS, time_grid
from jlt.sampling.inversion import invert, slerp
from jlt.sampling.memory import fitting_batch_size
from jlt.sampling.output import FORMATS, Stored
from jlt.sampling.solvers import SOLVERS, euler, heun
from jlt.sampling.storage import batches, generate

__all__ = [
    "FORMATS",
    "GRIDS",
    "GUIDANCE",
    "SCHEDULES",
    "SOLVERS",
    "Field",
    "Generator",
    "Guide",
    "Making",
    "Samples",
    "Stored",
    "batches",
    "classifier_free",
    "default_scale",
    "euler",
    "fitting_batch_size",
    "generate",
    "guided",
    "heun",
    "invert",
    "load",
    "slerp",
    "time_grid",
]
