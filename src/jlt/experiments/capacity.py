"""A forecast for a spectrum and a rank, as a record: what a limited denoiser makes of each target (jlt.flow.capacity).

One part a target: its error of x, the Frechet distance of its samples and what that is at most for data of any shape,
in units of the data's variance, and how many of the directions of large, middling and small variance it keeps. Figures
show the judgements at every rank, since they need not agree, and the scores by which directions are kept.
"""

from jaxtyping import Float
from torch import Tensor

from jlt import flow
from jlt.evaluation.records import Figure, Record, Value
from jlt.flow import capacity

TARGETS = ("x", "k=0.25", "k=0.5", "v", "eps", "k=0..1")
THIRDS = ("largest", "middle", "smallest")


def measure_capacity(
    eigenvalues: Float[Tensor, " d"],
    rank: int,
    space: str = "v",
    times: flow.TimeDensity = flow.TimeDensity(),  # noqa: B008
    floor: float = 0.05,
    weight: str = "constant",
    name: str = "Forecast",
) -> Record:
    """Forecast every target's error and samples at a rank, for a spectrum in falling order.

    `space`, `times`, `floor` and `weight` (a key of jlt.flow.loss.WEIGHTS) are those of training; the error of x is
    averaged over uniform times for all.
    """
    t, dimension = capacity.quadrature(times), len(eigenvalues)
    trace = eigenvalues.double().sum().item()
    directions = {
        name: capacity.fates(eigenvalues, flow.target(name), flow.target(space), t, floor, weight) for name in TARGETS
    }
    best, reason = capacity.recommend(eigenvalues, rank, ("x", "v"), space, times, floor, weight)
    sweep = {name: [capacity.forecast(each, r) for r in range(dimension + 1)] for name, each in directions.items()}
    by_error = {name: [one.x_error * dimension / trace for one in each] for name, each in sweep.items()}
    by_samples = {name: [one.frechet / trace for one in each] for name, each in sweep.items()}
    at_most = {name: [one.at_most / trace for one in each] for name, each in sweep.items()}
    split = {
        f"of {' and '.join(names)}": [
            r
            for r in range(dimension)  # at full rank all are equal but for the floor
            if min(names, key=lambda name: by_error[name][r]) != min(names, key=lambda name: by_samples[name][r])
        ]
        for names in (("x", "v"), TARGETS)
    }
    parts = []
    for target, each in sweep.items():
        kept = thirds(each[rank].kept)
        parts.append(
            Record(
                kind="target",
                name=target,
                values={
                    "error of x / variance": Value(by_error[target][rank]),
                    "Frechet distance / variance": Value(by_samples[target][rank]),
                    "distance at most / variance": Value(at_most[target][rank]),
                }
                | {
                    f"kept of the {len(third)} {which} directions": Value(int(third.sum()))
                    for which, third in kept.items()
                },
                settings={"target": target},
            )
        )
    ranks, numbers = list(range(dimension)), list(range(1, dimension + 1))
    drawn = [name for name in TARGETS if name != "eps"]  # which is off the scale
    return Record(
        kind="forecast",
        name=f"{name} at rank {rank} of {dimension}",
        values={
            "Frechet distance of v / that of x": Value(by_samples["v"][rank] / max(by_samples["x"][rank], 1e-12)),
            "distance at most of v / that of x": Value(at_most["v"][rank] / max(at_most["x"][rank], 1e-12)),
            "error of v / that of x": Value(by_error["v"][rank] / by_error["x"][rank]),
        }
        | {f"ranks whose best {which} differs by error and by samples": Value(len(at)) for which, at in split.items()},
        settings={
            "rank": rank, "loss_space": space, "loss_weight": weight,
            "times": f"{times.name}({times.mean:g}, {times.std:g})", "floor": floor,
            "recommended": best, "reason": reason, "disagreement": {which: ranges(at) for which, at in split.items()},
        },
        figures={
            "samples": Figure(
                "Forecast Frechet distance between samples and data, for a denoiser that can output only so many "
                "directions. 1 is what samples without any variance would have.",
                "rank", "Frechet distance / variance",
                {name: (ranks, by_samples[name][:-1]) for name in drawn}, y_scale="log",
            ),
            "samples at most": Figure(
                "What that distance is at most, for data of any shape: the Frechet distance takes noise of the right "
                "variance for data, here it counts as noise.",
                "rank", "distance at most / variance",
                {name: (ranks, at_most[name][:-1]) for name in drawn}, y_scale="log",
            ),
            "error": Figure(
                "Forecast error of the clean latent, mean over uniform times: it judges every time alike, the samples "
                "only where the path ends.",
                "rank", "error of x / variance",
                {name: (ranks, by_error[name][:-1]) for name in drawn}, y_scale="log",
            ),
            "scores": Figure(
                "What keeping a direction takes off the training loss, relative to the largest: the highest are kept. "
                "x keeps what varies most; v spends rank on both ends; eps on what varies least.",
                "direction, from the largest variance", "relative score",
                {name: (numbers, (each.score / each.score.max()).tolist()) for name, each in directions.items()},
                y_scale="log",
            ),
        },
        parts=tuple(parts),
    )  # fmt: skip


def thirds(values: Tensor, dim: int = 0) -> dict[str, Tensor]:
    """Return the thirds of the directions, from the largest variance, by name, those that there are."""
    return {which: part for which, part in zip(THIRDS, values.tensor_split(3, dim), strict=True) if part.shape[dim] > 0}


def ranges(numbers: list[int]) -> str:
    """Write rising whole numbers as ranges: "0-3, 7"."""
    starts = [n for n in numbers if n - 1 not in numbers]
    ends = [n for n in numbers if n + 1 not in numbers]
    return ", ".join(f"{a}" if a == b else f"{a}-{b}" for a, b in zip(starts, ends, strict=True)) or "none"
