"""The tables of docs/ablation.md: forecasts from the latents, and what was measured, from records of `jlt compare`.

    python benchmarks/ablation.py forecast fm     # docs/records/ablation-forecast.json, from the latents in fm
    python benchmarks/ablation.py tables          # docs/ablation.md, docs/ablation/fd.png, from docs/records

The page's commands make the records; docs/records/ablation-STUDY.json is a comparison's record.json. A study without
one has its cells marked. A forecast is the Frechet distance of samples, and what it is at most for data of any shape,
in units of the data's variance, of a denoiser that keeps half of a token's directions (jlt.flow.capacity), with the
velocity loss and the paper's times; beside it, of how many ranks below the full one x is forecast before v by the
first. Where latents differ, a column has the distance of held-out images decoded from them. A difference is that of
paired seeds with its 95 % interval, from the first row of the same latents, size and patch size.
"""

import argparse
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from jlt import files
from jlt.data import open_latents
from jlt.data.covariance import spectrum, token_moments
from jlt.evaluation import records
from jlt.evaluation.records import Figure, Record, Value
from jlt.experiments import plots
from jlt.experiments.capacity import measure_capacity
from jlt.experiments.compare import over_seeds, paired_differences

DOCS = Path(__file__).parents[1] / "docs"
NOT_RUN = "*not run yet*"
DECODED = "FD of real images decoded"  # a column where latents differ
WHAT = ("target", "loss_space")  # rows that differ in these alone are compared with each other
HEAD = ("FD (EfficientNet-Lite0)", "class agreement", "FD minus the first's", "forecast", "ranks")
PAPERS = "paper, FID"  # a column where the paper has a figure


@dataclass(frozen=True)
class Row:
    """A line of a table: the settings of a comparison's runs, the latents and patch size, the paper's figure."""

    settings: Mapping[str, Any]
    latents: str = "kept-32"
    patch_size: int = 1
    paper: str = ""


LOSSES = (("x", "v"), ("x", "x"), ("v", "v"), ("eps", "v"))
PAPER = {1: ("2.84", "2.38", "6.56", ""), 2: ("14.81", "12.78", "28.71", "")}
STUDIES = {
    f"patch-{size}": tuple(
        Row({"target": target, "loss_space": space}, patch_size=size, paper=paper)
        for (target, space), paper in zip(LOSSES, PAPER[size], strict=True)
    )
    for size in PAPER
} | {
    "representations": tuple(
        Row({"latents": name, "patch_size": size, "target": target}, name, size)
        for name, size in (("white", 1), ("pixels", 8))
        for target in "xv"
    ),
    "widths": tuple(
        Row({"size": size, "target": target}) for size in ("4x64x2", "4x128x4", "4x256x8") for target in "xv"
    ),
    "kept": tuple(
        Row({"latents": f"kept-{k}", "target": target}, f"kept-{k}") for k in (8, 16, 32, 64) for target in "xv"
    ),
}
ALONG: dict[str, tuple[tuple[str, ...], Callable[[Row], int]]] = {  # what the panels of a picture go along
    "patch size": (("patch-1", "patch-2"), lambda row: row.patch_size),
    "width": (("widths",), lambda row: int(row.settings["size"].split("x")[1])),
    "channels kept": (("kept",), lambda row: int(row.latents.removeprefix("kept-"))),
}


def forecast(latents: Path, patch_size: int) -> Record:
    """Forecast each target's samples for tokens of these latents at half of their directions."""
    eigenvalues = spectrum(token_moments(open_latents(latents), patch_size)[1])
    dimension = len(eigenvalues)
    found = measure_capacity(eigenvalues, dimension // 2)
    values = {part.name: part.values["Frechet distance / variance"] for part in found.parts}
    values |= {f"{part.name}, at most": part.values["distance at most / variance"] for part in found.parts}
    x, v = (found.figures["samples"].lines[name][1][1:] for name in "xv")
    values["ranks with x before v"] = Value(sum(a < b for a, b in zip(x, v, strict=True)))
    settings = {"latents": latents.name, "patch_size": patch_size, "directions": dimension}
    return Record("forecast", f"{latents.name} in patches of {patch_size}", values, settings)


def table(rows: Sequence[Row], record: Record | None, forecasts: Record | None) -> str:
    """Return a study's table in Markdown."""
    decoded = [DECODED] if "latents" in rows[0].settings else []
    paper = [PAPERS] if any(row.paper for row in rows) else []
    head = [*rows[0].settings, *decoded, *HEAD, *paper]
    lines = [head, ["---"] * len(head)]
    for row in rows:
        cells = list(map(str, row.settings.values()))
        cells += [NOT_RUN if record is None else ceiling(record, row) for _ in decoded]
        cells += [NOT_RUN] * 3 if record is None else measured(record, rows, row)
        lines.append([*cells, *forecast_of(forecasts, row), *(row.paper for _ in paper)])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def measured(record: Record, rows: Sequence[Row], row: Row) -> list[str]:
    """Return a row's distance, class agreement, and paired difference."""
    first = next(each for each in rows if without(each) == without(row))
    groups = [group_of(record, each) for each in (first, row)]
    column = column_of(record, row)
    name = distance_name(column)
    cells = [str(column.values.get(key, "")) for key in (name, "class agreement")]
    if row == first:
        return [*cells, ""]
    values = next((part.values for part in paired_differences(groups).parts), {})
    ends = [values.get(f"difference in {name}{end}") for end in ("", ", 95 % from", ", 95 % to")]
    if None in ends:  # one seed, or the same difference in every pair
        return [*cells, "no spread"]
    mean, low, high = (end.value for end in ends if end)
    return [*cells, f"{mean:.3g} ({low:.3g} to {high:.3g})"]


def ceiling(record: Record, row: Row) -> str:
    """Return the distance of held-out images that the row's latents were decoded to."""
    references = (part for part in record.parts if part.kind == "reference")
    (part,) = [part for part in references if part.settings == {"latents": row.latents}]
    return str(part.values[distance_name(part)])


def group_of(record: Record, row: Row) -> list[Record]:
    """Return the runs of a row, one a seed."""
    runs = [run for part in record.parts if part.kind == "runs" for run in part.parts if fits(run, row)]
    return over_seeds(runs)[0] if runs else [part for part in record.parts if fits(part, row)]


def column_of(record: Record, row: Row) -> Record:
    """Return the mean over the seeds of a row."""
    (column,) = [part for part in record.parts if part.kind == "evaluate" and fits(part, row)]
    return column


def distance_name(column: Record) -> str:
    return next(name for name in column.values if name.startswith("FD"))


def fits(part: Record, row: Row) -> bool:
    return {name: part.settings.get(name) for name in row.settings} == dict(row.settings)


def without(row: Row) -> dict[str, Any]:
    return {name: value for name, value in row.settings.items() if name not in WHAT}


def curves(found: Mapping[str, Record | None]) -> dict[str, Figure]:
    """Return a figure of FD along each setting of which all records are there: a line a target."""
    figures = {}
    for label, (studies, place) in ALONG.items():
        lines: dict[str, tuple[list[float], list[float]]] = {}
        records_of = [(record, STUDIES[study]) for study in studies if (record := found[study])]
        for record, rows in records_of if len(records_of) == len(studies) else ():
            for row in rows:
                column = column_of(record, row)
                name = row.settings["target"]
                if (space := row.settings.get("loss_space", "v")) != "v":
                    name += f", {space}-loss"
                xs, ys = lines.setdefault(name, ([], []))
                xs.append(float(place(row)))
                ys.append(column.values[distance_name(column)].value)
        if lines:
            figures[label] = Figure("", label, "FD (EfficientNet-Lite0)", lines, "log", "log")
    return figures


def forecast_of(forecasts: Record | None, row: Row) -> list[str]:
    """Return the forecast of a row's target, and of how many ranks x comes before v."""
    wanted = (row.latents, row.patch_size)
    for part in forecasts.parts if forecasts else ():
        if (part.settings["latents"], part.settings["patch_size"]) == wanted:
            target = row.settings["target"]
            least, most = (part.values[name].value for name in (target, f"{target}, at most"))
            ranks = f"{part.values['ranks with x before v'].value} of {part.settings['directions'] - 1}"
            return [f"{least:.3f} to {most:.3f}" if least < 1000 else "> 1000", ranks]
    return [NOT_RUN] * 2


def read(folder: Path) -> dict[str, Record | None]:
    """Return the records of the studies and of the forecasts in a folder, those that are there."""
    paths = {name: folder / f"ablation-{name}.json" for name in (*STUDIES, "forecast")}
    return {name: records.read(path) if path.is_file() else None for name, path in paths.items()}


def filled(page: str, found: Mapping[str, Record | None]) -> str:
    """Return the page with every table made anew from the records."""

    def block(match: re.Match[str]) -> str:
        rows = files.choose("study", match[1], STUDIES)
        return f"<!-- table {match[1]} -->\n{table(rows, found[match[1]], found['forecast'])}\n<!-- end -->"

    return re.sub(r"<!-- table (\S+) -->\n.*?<!-- end -->", block, page, flags=re.DOTALL)


def main() -> None:
    """Write the forecasts' record, or the page with its picture."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("what", choices=["forecast", "tables"])
    parser.add_argument("latents", type=Path, nargs="?", default=Path("fm"))
    options = parser.parse_args()
    if options.what == "forecast":
        pairs = dict.fromkeys((row.latents, row.patch_size) for rows in STUDIES.values() for row in rows)
        command = f"python benchmarks/ablation.py forecast {options.latents.name}"
        parts = tuple(replace(forecast(options.latents / name, size), command=command) for name, size in pairs)
        record = Record("forecasts", "Forecasts of the ablation", {}, {}, parts=parts, command=command)
        records.write(record, DOCS / "records" / "ablation-forecast.json")
    page, found = DOCS / "ablation.md", read(DOCS / "records")
    files.write_bytes(page, filled(page.read_text(), found).encode())
    plots.save(DOCS / "ablation" / "fd.png", plots.panels(list(curves(found).values())))


if __name__ == "__main__":
    main()
