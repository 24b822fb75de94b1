"""`jlt geometry`: the spectrum of stored latents and what each prediction target makes of it."""

import dataclasses
import json as json_format
from pathlib import Path

import tyro

from jlt import files
from jlt.cli.places import LatentsPath


def run(
    latents: LatentsPath,
    patch_size: int = 1,
    whole: bool = False,
    split: str = "train",
    target: tyro.conf.UseAppendAction[tuple[str, ...]] = (),
    rank: int | None = None,
    loss_space: str | None = None,
    loss_weight: str | None = None,
    floor: float | None = None,
    time_mean: float | None = None,
    time_std: float | None = None,
    run: tyro.conf.UseAppendAction[tuple[Path, ...]] = (),
    local: bool = True,
    out: Path | None = None,
    json: bool = False,
) -> None:
    """Measure the covariance of latents and the targets' spectra that follow from it.

    Args:
        latents: Folder of encoded latents.
        patch_size: Side of the square of latent positions that makes one token.
        whole: Take the whole image as one token.
        split: Which of the folder's splits to measure.
        target: A target to show beside x, eps and v, such as k=0.25; repeat it for more.
        rank: Forecast what each target does with a denoiser that outputs only so many directions, such as the width
            of a Transformer's last layer where it is below the numbers of a token.
        loss_space: Space of the loss that the forecast's denoiser is trained with, by default v.
        loss_weight: Weight of that loss over t, by default constant.
        floor: Least abs(det) of its readout, by default 0.05.
        time_mean: Mean of logit(t) in its training, by default -0.8.
        time_std: Standard deviation of logit(t) in its training, by default 0.8.
        run: A trained run, or ORG/NAME of the Hub, whose errors on held-out latents to measure by direction; repeat it
            to compare runs with the first. Runs that differ in the seed alone are one, with mean and standard
            deviation.
        local: Measure within classes and neighbourhoods too.
        out: Folder to write record.json to (`jlt report` makes a page of it); none is written without it.
        json: Print the record as JSON instead of tables.
    """
    from jlt.data import open_latents
    from jlt.data.covariance import spectrum, token_moments
    from jlt.evaluation import records
    from jlt.experiments.geometry import TARGETS, constants, measure_geometry
    from jlt.experiments.report import text_table

    targets = tuple(dict.fromkeys([*TARGETS, *target]))
    for name in targets:
        constants(name)  # which an unknown one has not
    opened, size = open_latents(latents, split=split), None if whole else patch_size
    if whole and (rank is not None or run):
        raise ValueError("--whole measures a spectrum alone; --rank and --run are for tokens of --patch-size")
    of_forecast = {
        "--loss-space": loss_space,
        "--loss-weight": loss_weight,
        "--floor": floor,
        "--time-mean": time_mean,
        "--time-std": time_std,
    }
    for option, given in of_forecast.items():
        if given is not None and rank is None:
            raise ValueError(f"{option} {given} is of the forecast that --rank asks for, which was not given")
    if rank is not None:
        from jlt import flow
        from jlt.experiments.capacity import measure_capacity
        from jlt.flow.targets import check_floor

        space, weight, least = loss_space or "v", loss_weight or "constant", 0.05 if floor is None else floor
        usual = flow.TimeDensity()
        times = flow.TimeDensity(
            mean=usual.mean if time_mean is None else time_mean, std=usual.std if time_std is None else time_std
        )
        flow.target(space)
        files.choose("loss weight", weight, flow.WEIGHTS)
        check_floor(least)
    if local:
        from jlt.experiments.local_geometry import check_tokens, measure_local_geometry

        check_tokens(opened, size)
    if run:
        from jlt.experiments.mechanism import by_seed, measure_mechanism, run_names
        from jlt.sampling import load

        runs = by_seed(dict(zip(run_names(run), map(load, run), strict=True)))
        held_out = open_latents(latents, split="held-out")
    sections = []
    moments = None if whole else token_moments(opened, patch_size)
    record = measure_geometry(opened, size, name=f"Geometry of {latents.name}", moments=moments, targets=targets)
    if moments is not None and rank is not None:
        sections.append(measure_capacity(spectrum(moments[1]), rank, space, times, least, weight))
    if moments is not None and run:
        sections.append(measure_mechanism(runs, held_out, moments[1], patch_size))
    if local:
        sections.append(measure_local_geometry(opened, size))
    record = dataclasses.replace(record, parts=(*record.parts, *sections))
    if out is not None:
        records.write(record, out / "record.json")
    if json:
        print(json_format.dumps(dataclasses.asdict(record), allow_nan=False))
        return
    for section in (record, *sections):
        settings = ", ".join(f"{name} {value}" for name, value in section.settings.items())
        print(f"{section.name} ({settings})")
        for name, value in section.values.items():
            print(f"{name}: {value}")
        print(f"{text_table(section)}\n")
    if out is not None:
        print(out / "record.json")
