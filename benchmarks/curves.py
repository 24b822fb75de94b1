"""Write src/jlt/experiments/curves.json from the records of the quickstart, three seeds of either target.

    python benchmarks/curves.py docs/records/quickstart-seed-*.json

The band is five times the standard deviation between seeds, pooled over the stretches.
"""

import sys
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np

from jlt import files
from jlt.evaluation import records
from jlt.experiments.curves import PATH, Curve, recipe
from jlt.experiments.presets import PRESETS


def curve(paths: list[Path], name: str, target: str, line: str) -> Curve:
    """Return the curve of one target."""
    read = [records.read(path) for path in paths]
    expected = PRESETS["digits"].expected
    lines = np.array([record.figures["training loss"].lines[line][1] for record in read])
    mean = lines.mean(0)
    spread = np.sqrt(((lines.std(0, ddof=1) / mean) ** 2).mean())
    return Curve(
        name=name,
        recipe=recipe(replace(PRESETS["digits"].config, target=target)),
        source=read[0].fingerprints["source"],
        num_images=expected.num_images,
        shape=expected.shape,
        stretch=int(read[0].figures["training loss"].lines[line][0][0]),
        mean=tuple(round(value, 5) for value in mean.tolist()),
        width=round(float(5 * spread), 4),
        provenance={"records": [p.name for p in paths], "commit": read[0].commit, "hardware": read[0].hardware},
    )


if __name__ == "__main__":
    paths = [Path(name) for name in sys.argv[1:]]
    found = [curve(paths, "digits", "x", "JLT-4x128/1"), curve(paths, "digits with target v", "v", "DiT-4x128/1")]
    files.write_json(PATH, [asdict(each) for each in found])
