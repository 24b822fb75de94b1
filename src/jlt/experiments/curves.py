"""Loss curves of recorded runs, so that a run is seen early to be off.

`curves.json` beside this file holds an entry a recipe that ran here, written by benchmarks/curves.py from the records
in docs/records: the mean training loss over stretches of steps, and the band around it as a share of it.
"""

import contextlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from jlt import files
from jlt.data import Latents
from jlt.training import TrainConfig
from jlt.training.config import MAY_CHANGE
from jlt.training.metrics import Line, Sink, tell

PATH = Path(__file__).with_name("curves.json")
PATIENCE = 3  # stretches in a row outside the band before a line says so
# What has no say in the training loss, or may vary between runs of one recipe
FREE = {*MAY_CHANGE, "seed", "ema_decays", "ema_lengths", "held_out_every"} - {"steps"}


@dataclass(frozen=True)
class Curve:
    """Mean losses over stretches of `stretch` steps, from recorded runs; the band is `width` of them, either side."""

    name: str
    recipe: Mapping[str, Any]
    source: str
    num_images: int
    shape: tuple[int, ...]
    stretch: int
    mean: tuple[float, ...]
    width: float
    provenance: Mapping[str, Any]

    @contextlib.contextmanager
    def sink(self, run: Path, header: Mapping[str, Any], step: int) -> Iterator[Sink]:
        """Compare a run's lines with the band; `PATIENCE` stretches in a row outside it are told in one line, once."""
        total, count, outside, told = 0.0, 0, 0, False

        def compare(line: Line) -> None:
            nonlocal total, count, outside, told
            if "loss" not in line or told:
                return
            total, count = total + (line["loss"] or float("inf")), count + 1
            stretch, rest = divmod(line["step"], self.stretch)
            if rest or stretch > len(self.mean):
                return
            mean, expected = total / count, self.mean[stretch - 1]
            whole = count == self.stretch  # a run that goes on may have begun within a stretch
            total, count = 0.0, 0
            if not whole:
                return
            outside = 0 if abs(mean - expected) <= self.width * expected else outside + 1
            if outside == PATIENCE:
                told = True
                low, high = expected * (1 - self.width), expected * (1 + self.width)
                tell(
                    f"step {line['step']}: the loss is {mean:.3g}, in the recorded runs of {self.name} it was "
                    f"{low:.3g} to {high:.3g}; see docs/training.md"
                )

        yield compare


def recipe(config: TrainConfig) -> dict[str, Any]:
    """Return the settings that the training loss depends on."""
    return {k: v for k, v in json.loads(json.dumps(asdict(config))).items() if k not in FREE}


def known_curve(config: TrainConfig, data: Latents) -> Curve | None:
    """Return the recorded curve of this recipe on these images, if there is one."""
    defaults = recipe(TrainConfig())  # of settings that are newer than the record
    for entry in files.read_json(PATH):
        curve = Curve(**entry)
        same = (curve.source, curve.num_images, list(curve.shape)) == (
            data.manifest.source.get("source_fingerprint"), len(data), list(data.shape),
        )  # fmt: skip
        if same and defaults | dict(curve.recipe) == recipe(config):
            return curve
    return None
