"""The tables of docs/ablation.md: forecasts from the latents, and what was measured, from records of `jlt compare`.

    python benchmarks/ablation.py forecast fm     # docs/records/ablation-forecast.json, from the latents in fm
    python benchmarks/ablation.py tables          # docs/ablation.md, docs/ablation/fd.png, from docs/records

The page's commands make the records; docs/records/ablation-OUT.json is the record.json of the comparison fm/OUT. A
row is looked for in all of them, so the runs of one comparison can stand in several tables; rows that are in none
have their cells marked. A forecast is the Frechet distance of samples, and what it is at most for data of any shape,
in units of the data's variance, of a denoiser that keeps as many of a token's directions as the network is wide, or
half of them if it is no narrower (jlt.flow.capacity.rank_of), with the velocity loss and the paper's times; beside
it, of how many ranks below the full one x is forecast before v by the first. Where latents differ, a column has the
distance of held-out images decoded from them. A difference is that of paired seeds with its 95 % interval, from the
first row of the same latents, size and patch size.
"""

import argparse
import re
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from jlt import files
from jlt.data import open_latents
from jlt.data.covariance import spectrum, token_moments
from jlt.evaluation import records
from jlt.evaluation.records import Figure, Record, Value
from jlt.experiments import plots
from jlt.experiments.capacity import measure_capacity
from jlt.experiments.compare import over_seeds, paired_differences
from jlt.flow.capacity import rank_of

DOCS = Path(__file__).parents[1] / "docs"
BASE = "kept-32"  # the latents that every comparison of the page is given, which its record does not name
NOT_RUN = "*not run yet*"
DECODED = "FD of real images decoded"  # a column where latents differ
HEAD = ("FD (EfficientNet-Lite0)", "class agreement", "FD minus the first's", "forecast", "ranks")
PAPERS = "paper, FID"  # a column where the paper has a figure


@dataclass(frozen=True)
class Row:
    """A line of a table: the settings of its runs, which differ in the seed alone."""

    target: str
    loss_space: str = "v"
    size: str = "4x128x4"
    latents: str = BASE
    patch_size: int = 1

    def pair(self) -> tuple[str, str, int]:
        """What rows have in common that are compared with each other."""
        return self.size, self.latents, self.patch_size

    def tokens(self) -> tuple[str, int, int]:
        """What its forecast is made of: the tokens, and the width of the network that puts them out."""
        return self.latents, self.patch_size, int(self.size.split("x")[1])


@dataclass(frozen=True)
class Study:
    """A table: the settings that it shows, its rows, and the paper's figures for them, if it has any."""

    shown: tuple[str, ...]
    rows: tuple[Row, ...]
    paper: tuple[str, ...] = ()


def targets_and_losses(patch_size: int, *paper: str) -> Study:
    pairs = (("x", "v"), ("x", "x"), ("v", "v"), ("eps", "v"))
    rows = (Row(target, loss_space, patch_size=patch_size) for target, loss_space in pairs)
    return Study(("target", "loss_space"), tuple(rows), paper)


STUDIES = {
    "patch-1": targets_and_losses(1, "2.84", "2.38", "6.56", ""),
    "patch-2": targets_and_losses(2, "14.81", "12.78", "28.71", ""),
    "representations": Study(
        ("latents", "patch_size", "target"),
        tuple(Row(target, latents=name, patch_size=p) for name, p in (("white", 1), ("pixels", 8)) for target in "xv"),
    ),
    "widths": Study(
        ("size", "target"),
        tuple(Row(target, size=size) for size in ("4x64x2", "4x128x4", "4x256x8") for target in "xv"),
    ),
    "narrow": Study(
        ("size", "target"),
        tuple(Row(target, size=size, patch_size=2) for size in ("4x32x1", "4x64x2", "4x128x4") for target in "xv"),
    ),
    "kept": Study(
        ("latents", "target"),
        tuple(Row(target, latents=f"kept-{k}") for k in (8, 16, 32, 64) for target in "xv"),
    ),
}
ALONG: dict[str, tuple[tuple[str, ...], Callable[[Row], int]]] = {  # what the panels of a picture go along
    "patch size": (("patch-1", "patch-2"), lambda row: row.patch_size),
    "width": (("widths",), lambda row: row.tokens()[2]),
    "width, patch size 2": (("narrow",), lambda row: row.tokens()[2]),
    "channels kept": (("kept",), lambda row: int(row.latents.removeprefix("kept-"))),
}


def forecast(latents: Path, patch_size: int, width: int) -> Record:
    """Forecast each target's samples for tokens of these latents, by a network of this width."""
    eigenvalues = spectrum(token_moments(open_latents(latents), patch_size)[1])
    dimension = len(eigenvalues)
    found = measure_capacity(eigenvalues, rank_of(width, dimension))
    values = {part.name: part.values["Frechet distance / variance"] for part in found.parts}
    values |= {f"{part.name}, at most": part.values["distance at most / variance"] for part in found.parts}
    x, v = (found.figures["samples"].lines[name][1][1:] for name in "xv")
    values["ranks with x before v"] = Value(sum(a < b for a, b in zip(x, v, strict=True)))
    settings = {"latents": latents.name, "patch_size": patch_size, "width": width, "directions": dimension}
    return Record("forecast", f"{latents.name} in patches of {patch_size}, width {width}", values, settings)


def table(study: Study, found: Sequence[Record], forecasts: Record | None) -> str:
    """Return a study's table in Markdown."""
    decoded = [DECODED] if "latents" in study.shown else []
    papers, *paper = [[cell] for cell in (PAPERS, *study.paper)] if study.paper else [[]] * (1 + len(study.rows))
    head = [*study.shown, *decoded, *HEAD, *papers]
    lines = [head, ["---"] * len(head)]
    for row, figure in zip(study.rows, paper, strict=True):
        record = record_of(found, row)
        cells = [str(getattr(row, name)) for name in study.shown]
        cells += [NOT_RUN if record is None else str(ceiling(record, row)) for _ in decoded]
        cells += [NOT_RUN] * 3 if record is None else measured(record, study, row)
        lines.append([*cells, *forecast_of(forecasts, row), *figure])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def measured(record: Record, study: Study, row: Row) -> list[str]:
    """Return a row's distance, class agreement, and paired difference."""
    first = next(each for each in study.rows if each.pair() == row.pair())
    groups = [group_of(record, each) for each in (first, row)]
    column = column_of(record, row)
    name = distance_name(column)
    cells = [str(column.values.get(key, "")) for key in (name, "class agreement")]
    if row == first:
        return [*cells, ""]
    values = next((part.values for part in paired_differences(groups).parts), {})
    ends = [values.get(f"difference in {name}{end}") for end in ("", ", 95 % from", ", 95 % to")]
    if None in ends:  # one seed, or no difference in any pair
        return [*cells, "no spread"]
    mean, low, high = (end.value for end in ends if end)
    return [*cells, f"{mean:.3g} ({low:.3g} to {high:.3g})"]


def ceiling(record: Record, row: Row) -> Value:
    """Return the distance of held-out images that the row's latents were decoded to."""
    (part,) = [
        part
        for part in record.parts
        if part.name.split(", ")[1:2] == ["encoded and decoded"] and part.settings.get("latents", BASE) == row.latents
    ]
    return part.values[distance_name(part)]


def record_of(found: Sequence[Record], row: Row) -> Record | None:
    """Return the first comparison that has a row's runs."""
    return next((record for record in found if any(fits(record, part, row) for part in columns(record))), None)


def group_of(record: Record, row: Row) -> list[Record]:
    """Return the runs of a row, one a seed."""
    runs = [run for part in record.parts if part.kind == "runs" for run in part.parts if fits(record, run, row)]
    return over_seeds(runs)[0] if runs else [column_of(record, row)]


def column_of(record: Record, row: Row) -> Record:
    """Return the mean over the seeds of a row."""
    (column,) = [part for part in columns(record) if fits(record, part, row)]
    return column


def columns(record: Record) -> list[Record]:
    return [part for part in record.parts if part.kind == "evaluate"]


def distance_name(column: Record) -> str:
    return next(name for name in column.values if name.startswith("FD"))


def fits(record: Record, part: Record, row: Row) -> bool:
    """Whether the runs of a column are a row's: what they do not declare is what all runs of the record share."""
    whole = {"latents": BASE, **record.settings, **part.settings}
    return {name: whole.get(name) for name in asdict(row)} == asdict(row)


def curves(found: Sequence[Record]) -> dict[str, Figure]:
    """Return a figure of FD along each setting of which all rows are measured: a line a target, and the ceiling.

    A line is the mean over seeds, its spread their standard deviation.
    """
    figures = {}
    for label, (studies, place) in ALONG.items():
        lines: dict[str, tuple[list[float], list[float]]] = {}
        spreads: dict[str, list[float]] = {}
        rows = [row for study in studies for row in STUDIES[study].rows]
        measured_in = [(row, record) for row in rows if (record := record_of(found, row))]
        for row, record in measured_in if len(measured_in) == len(rows) else ():
            column = column_of(record, row)
            name = row.target + (f", {row.loss_space}-loss" if row.loss_space != "v" else "")
            distance = column.values[distance_name(column)]
            xs, ys = lines.setdefault(name, ([], []))
            xs.append(float(place(row)))
            ys.append(distance.value)
            spreads.setdefault(name, []).append(distance.spread or 0)
            if row.target == "v" and "latents" in STUDIES[studies[0]].shown:  # once for x and v, which share it
                xs, ys = lines.setdefault("real images decoded", ([], []))
                xs.append(float(place(row)))
                ys.append(ceiling(record, row).value)
        if lines:
            figures[label] = Figure("", label, "FD (EfficientNet-Lite0)", lines, "log", spreads=spreads)
    return figures


def forecast_of(forecasts: Record | None, row: Row) -> list[str]:
    """Return the forecast of a row's target, and of how many ranks x comes before v."""
    for part in forecasts.parts if forecasts else ():
        if tuple(part.settings[name] for name in ("latents", "patch_size", "width")) == row.tokens():
            least, most = (part.values[name].value for name in (row.target, f"{row.target}, at most"))
            ranks = f"{part.values['ranks with x before v'].value} of {part.settings['directions'] - 1}"
            return [f"{least:.3f} to {most:.3f}" if least < 1000 else "> 1000", ranks]
    return [NOT_RUN] * 2


def read(folder: Path) -> tuple[list[Record], Record | None]:
    """Return the records of the comparisons in a folder, and that of the forecasts, if it is there."""
    found = [records.read(path) for path in sorted(folder.glob("ablation-*.json"))]
    forecasts = next((record for record in found if record.kind == "forecasts"), None)
    return [record for record in found if record is not forecasts], forecasts


def filled(page: str, found: Sequence[Record], forecasts: Record | None) -> str:
    """Return the page with every table made anew from the records."""

    def block(match: re.Match[str]) -> str:
        study = files.choose("study", match[1], STUDIES)
        return f"<!-- table {match[1]} -->\n{table(study, found, forecasts)}\n<!-- end -->"

    return re.sub(r"<!-- table (\S+) -->\n.*?<!-- end -->", block, page, flags=re.DOTALL)


def main() -> None:
    """Write the forecasts' record, or the page with its picture."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("what", choices=["forecast", "tables"])
    parser.add_argument("latents", type=Path, nargs="?", default=Path("fm"))
    options = parser.parse_args()
    if options.what == "forecast":
        tokens = dict.fromkeys(row.tokens() for study in STUDIES.values() for row in study.rows)
        command = f"python benchmarks/ablation.py forecast {options.latents.name}"
        parts = tuple(replace(forecast(options.latents / name, *rest), command=command) for name, *rest in tokens)
        record = Record("forecasts", "Forecasts of the ablation", {}, {}, parts=parts, command=command)
        records.write(record, DOCS / "records" / "ablation-forecast.json")
    page, (found, forecasts) = DOCS / "ablation.md", read(DOCS / "records")
    files.write_bytes(page, filled(page.read_text(), found, forecasts).encode())
    plots.save(DOCS / "ablation" / "fd.png", plots.panels(list(curves(found).values()), columns=2))


if __name__ == "__main__":
    main()
