"""`jlt geometry`: the spectrum of stored latents and what each prediction target makes of it."""

import dataclasses
import json as json_format
from pathlib import Path
from typing import Annotated

import tyro


def run(
    latents: Annotated[Path, tyro.conf.Positional],
    patch_size: int = 1,
    split: str = "train",
    out: Path | None = None,
    json: bool = False,
) -> None:
    """Measure the covariance of latents and the targets' spectra that follow from it.

    Args:
        latents: Folder of encoded latents.
        patch_size: Side of the square of latent positions that makes one token.
        split: Which of the folder's splits to measure.
        out: Folder to write record.json to (`jlt report` makes a page of it); none is written without it.
        json: Print the record as JSON instead of a table.
    """
    from jlt.data import open_latents
    from jlt.evaluation import records
    from jlt.experiments.geometry import measure_geometry

    record = measure_geometry(open_latents(latents, split=split), patch_size, name=f"Geometry of {latents.name}")
    if out is not None:
        records.write(record, out / "record.json")
    if json:
        print(json_format.dumps(dataclasses.asdict(record), allow_nan=False))
        return
    settings = ", ".join(f"{name} {value}" for name, value in record.settings.items())
    print(f"{record.name} ({settings})")
    print(f"{'':36}" + "".join(f"{part.name:>12}" for part in record.parts))
    for name in {**record.parts[0].values, **record.parts[-1].values}:
        cells = (f"{part.values[name].value:.4g}" if name in part.values else "infinite" for part in record.parts)
        print(f"{name:36}" + "".join(f"{cell:>12}" for cell in cells))
    if out is not None:
        print(out / "record.json")
