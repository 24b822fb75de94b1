"""`jlt compare PRESET LATENTS OUT --vary target=x,v`."""

import itertools
import typing
from collections.abc import Sequence
from typing import Annotated, Any

import tyro

from jlt import files
from jlt.cli.places import LatentsPath, OutPath
from jlt.evaluation import records
from jlt.experiments.asking import Sampling
from jlt.experiments.compare import LATENTS, compare
from jlt.experiments.presets import PAPER, Preset
from jlt.experiments.presets import PRESETS as PRESETS
from jlt.experiments.report import text_table
from jlt.training import TrainConfig


def defaults(preset: Preset) -> dict[str, Any]:
    """Return the arguments of `run` that a preset sets."""
    return {"config": preset.config, "sampling": Sampling(**preset.sampling)}


def run(
    latents: LatentsPath,
    out: OutPath,
    config: Annotated[TrainConfig, tyro.conf.arg(name="base")] = PAPER,
    sampling: Annotated[Sampling, tyro.conf.arg(name="sampling")] = Sampling(),  # noqa: B008
    *,
    vary: tuple[str, ...] = ("target=x,v",),
    extractor: str = "efficientnet-lite0",
    tune: tuple[float, ...] = (),
    tune_images: int = 1000,
    devices: tuple[str, ...] = ("cpu",),
    share: str = "1/1",
) -> None:
    """Train, sample and measure runs that differ in declared settings and in nothing else; stopped, it goes on again.

    The first argument names a preset, the base of every run. `jlt report OUT` makes a page of the outcome.

    Args:
        latents: folder made by `jlt encode`, with a held-out split.
        out: folder for runs, pictures and the record.
        config: settings that the runs share.
        sampling: how every run is sampled.
        vary: settings in which runs differ, each as name=value,value; all combinations are run. Names joined by + go
            together: target+loss_space=x+v,x+x,v+v. latents=FOLDER,FOLDER compares representations of the same images.
        extractor: features that distances are taken on: efficientnet-lite0, or pixels.
        tune: guidance scales; each run's best, found on other noise, makes a table of its own.
        tune_images: images a scale.
        devices: where the runs are made, one at a time on each: cpu, or cuda:0 cuda:1 ...
        share: K/N makes every N-th run only, from the K-th, as in a Slurm array; the last share to end writes the
            record.
    """
    record = compare(
        latents, out, config, variants(vary), sampling, extractor=extractor, tune=tune, tune_images=tune_images,
        devices=devices, share=share,
    )  # fmt: skip
    if not record.is_file():
        done = len(list(out.glob("run-*.json")))
        runs = files.read_json(out / "runs" / "comparison.json")["runs"]  # those that are left once auto is settled
        print(f"{done} of {len(runs)} runs are done; the record is written when all are")
        return
    print(f"{text_table(records.read(record))}\n\n{record}")


def variants(vary: Sequence[str]) -> list[dict[str, Any]]:
    """Turn name=value,value texts into the settings of each run: all combinations, names joined by + in step."""
    factors = []
    for text in vary:
        names, equals, values = text.partition("=")
        if not equals or not values:
            raise ValueError(f"--vary takes name=value,value, got {text!r}")
        factors.append([together(names.split("+"), value, text) for value in values.split(",")])
    return [{name: value for part in each for name, value in part.items()} for each in itertools.product(*factors)]


def together(names: Sequence[str], values: str, text: str) -> dict[str, Any]:
    """Return the settings that one value of --vary stands for: several where it is joined by +, as their names are."""
    hints = typing.get_type_hints(TrainConfig) | {LATENTS: str}
    parts = values.split("+") if len(names) > 1 else [values]
    if len(parts) != len(names):
        raise ValueError(f"--vary {text}: {len(names)} settings take {len(names)} values joined by +, got {values!r}")
    settings = {}
    for name, value in zip(names, parts, strict=True):
        kind = files.choose("setting", name, hints)
        if kind not in (str, int, float):
            raise ValueError(f"setting {name!r} is a {kind}, only text and numbers can be varied")
        try:
            settings[name] = kind(value)
        except ValueError:
            raise ValueError(f"--vary {text}: {name} takes {kind.__name__} values") from None
    return settings
