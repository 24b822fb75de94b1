"""A page to look at, made from a record and the pictures beside it, and from nothing else.

`write_report` reads `record.json` and writes one self-contained HTML file: styles, figures (SVG) and pictures (the
files' own bytes) are inline, and a content policy forbids the browser every request. It reads well on a phone and in
the dark. A table with a row a part sorts by the head that is clicked: such a page has one script, SCRIPT, and the
policy allows its hash alone; others have none. (Rows that are values of different units are not for sorting.)

The values table has one column a part. A part of kind "reference" (real against real, say) is a column of the values
table only: it takes no share in who is ahead, nor in the tables of settings. A part that has parts of its own is no
column but a section of the page, made as the page is. Settings on which all columns agree, and those of the record
itself, are "shared"; the rest differ. Pictures must lie in the record's folder.
"""

import base64
import hashlib
import io
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from PIL import Image

from jlt import files
from jlt.evaluation import records
from jlt.evaluation.records import Record, Value
from jlt.experiments import plots

REFERENCE = "reference"
MANY = 3  # parts: of more the summary tells the extremes
WIDE = 8  # parts: of more the table has a row each
IN_A_ROW = 5  # pictures beside each other: of more there are several rows
# Which way is better, by a value's name without the features in brackets. Of other values no winner is named.
BETTER = {
    **dict.fromkeys(["FD", "KD", "sFD", "FID", "KID", "sFID"], "lower"),
    **dict.fromkeys(["IS", "class agreement", "precision", "recall", "density", "coverage", "PSNR", "SSIM"], "higher"),
}
IMAGE_TYPES = {b"\x89PNG\r\n\x1a\n": "image/png", b"\xff\xd8\xff": "image/jpeg"}
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
SORTABLE = '<table class="sortable">'
SCRIPT = """
for (const button of document.querySelectorAll(".sortable thead button")) button.onclick = () => {
  const head = button.closest("th"), body = head.closest("table").tBodies[0];
  const sign = head.ariaSort === "ascending" ? -1 : 1;
  const number = row => parseFloat(row.cells[head.cellIndex].title || row.cells[head.cellIndex].textContent);
  const text = row => row.cells[head.cellIndex].textContent;
  const order = (a, b) => {
    const [m, n] = [number(a), number(b)];
    if (isNaN(m) !== isNaN(n)) return isNaN(m) - isNaN(n);
    return sign * (isNaN(m) ? text(a).localeCompare(text(b)) : m - n);
  };
  for (const other of head.parentNode.cells) other.ariaSort = null;
  head.ariaSort = sign > 0 ? "ascending" : "descending";
  body.append(...[...body.rows].sort(order));
};
"""


def write_report(record_path_or_folder: Path, out: Path | None = None) -> Path:
    """Write the page of a record and return its path; without `out` it is `report.html` beside the record.

    A missing record or picture is an OSError; a picture that is no PNG or JPEG, or lies outside the record's folder,
    a ValueError.
    """
    path = record_path_or_folder / "record.json" if record_path_or_folder.is_dir() else record_path_or_folder
    out = out or path.parent / "report.html"
    if out.is_dir():
        raise ValueError(f"the report is a file, {out} is a folder")
    files.write_bytes(out, page(records.read(path), path.parent).encode())
    return out


def write_figures(record_path_or_folder: Path, folder: Path) -> list[Path]:
    """Write every figure of a record and of its parts as `<kind>-<figure>.png` in `folder`; return their paths.

    Where two parts have a figure of the same name, the later one's file is named by the part, too. Pictures of the
    parts and of the record, if there are several, are written as `<kind>-pictures.png`, in even rows of at most five.
    """
    path = record_path_or_folder / "record.json" if record_path_or_folder.is_dir() else record_path_or_folder
    record = records.read(path)
    written: list[Path] = []
    for holder in records.walk(record):
        for name, figure in holder.figures.items():
            names = [f"{holder.kind} {name}", f"{holder.kind} {holder.name} {name}"]
            paths = [folder / f"{re.sub(r'[^a-z0-9]+', '-', text.lower()).strip('-')}.png" for text in names]
            written.append(paths[paths[0] in written])
            files.write_bytes(written[-1], plots.png(figure))
    shown = dict.fromkeys(name for part in (*record.parts, record) for name in part.pictures.values())
    if len(shown) > 1:
        opened = [Image.open(io.BytesIO(_read_picture(path.parent, name)[0])) for name in shown]
        written.append(folder / f"{record.kind}-pictures.png")
        rows = -(-len(opened) // IN_A_ROW)
        plots.save(written[-1], plots.beside(opened, columns=-(-len(opened) // rows)))
    return written


def page(record: Record, folder: Path) -> str:
    """Return the HTML page of a record whose pictures lie in `folder`."""
    title, body, policy, script = escape(record.name), _body(record, folder), POLICY, ""
    if SORTABLE in body:
        allowed = base64.b64encode(hashlib.sha256(SCRIPT.encode()).digest()).decode()
        policy, script = f"{POLICY}; script-src 'sha256-{allowed}'", f"<script>{SCRIPT}</script>\n"
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{escape(policy)}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{title}</title>
<style>{STYLE}</style>
</head>
<body>
<header>
<p class="kind">{escape(record.kind)}</p>
<h1>{title}</h1>
<p class="summary">{escape(summary(record))}</p>
</header>
<main>
{body}
</main>
<footer>
{_provenance(record)}
</footer>
{script}</body>
</html>
"""


def summary(record: Record) -> str:
    """Say in sentences what the record holds: what was compared, the main values, who is ahead, how sure that is."""
    sentences = []
    contestants, columns = _contestants(record), _columns(record)
    differing, shared = split_settings(record)
    if len(contestants) > 1:
        many = len(contestants) > MANY
        names = f"{len(contestants)} parts" if many else _enumerate(part.name for part in contestants)
        if differing:
            settings = _enumerate(differing) if len(differing) <= 3 else f"{len(differing)} settings"
            sentences.append(f"{names} differ in {settings} and share {_count(len(shared), 'setting')}.")
        else:
            sentences.append(f"{names} share all of {_count(len(shared), 'setting')}.")
    headlines = [name for name in _value_names(contestants) if direction(name)] or _value_names(contestants)[:3]
    for name in headlines:
        sentences.append(_value_sentence(name, columns))
    leads = {
        part.name: [name for name in headlines if (best := leader(name, contestants)) is not None and best is part]
        for part in contestants
    }
    if ahead := [f"{name} is ahead in {_enumerate(values)}" for name, values in leads.items() if values]:
        sentences.append(f"{'; '.join(ahead)}.")
        if all(part.values[name].count == 1 for part in contestants for name in headlines if name in part.values):
            sentences.append("Each number is a single run, so the spread over seeds is not known.")
    return " ".join(sentences)


def text_table(record: Record) -> str:
    """Return the table of values as text for a terminal: a column a part, or a row where there are many."""
    columns = _columns(record)
    rows = [["", *(part.name for part in columns)]] + [
        [name, *(format_value(part.values[name]) if name in part.values else "—" for part in columns)]
        for name in _value_names(columns)
    ]
    if len(columns) > WIDE:
        rows = [list(row) for row in zip(*rows, strict=True)]
    widths = [max(len(row[k]) for row in rows) for k in range(len(rows[0]))]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows)


def _value_sentence(name: str, columns: Sequence[Record]) -> str:
    texts = {part.name: format_value(part.values[name]) for part in columns if name in part.values}
    references = [part.name for part in columns if part.kind == REFERENCE and part.name in texts]
    aside = [f"{direction(name)} is better"] if direction(name) else []
    aside += [f"{part}: {texts.pop(part)}" for part in references]
    if len(texts) > MANY:
        held = sorted((part.values[name].value, part.name) for part in columns if part.name in texts)
        (_, lowest), (_, highest) = held[0], held[-1]
        told = f"lies between {texts[lowest]} for {lowest} and {texts[highest]} for {highest}"
    else:
        named = [text if len(columns) == 1 else f"{text} for {part}" for part, text in texts.items()]
        told = f"is {_enumerate(named or ['not known'])}"
    brackets = f" ({'; '.join(aside)})" if aside else ""
    return f"{name[:1].upper()}{name[1:]} {told}{brackets}."


def direction(name: str) -> str:
    """Return "lower" or "higher", whichever is better for the value of that name, or nothing."""
    return BETTER.get(re.sub(r" \([^()]*\)$", "", name), "")


def leader(name: str, parts: Sequence[Record]) -> Record | None:
    """Return the part with the best value of that name.

    None for one part, if no way is better, and if the second best is as good or no further than the larger spread.
    """
    held = [part for part in parts if name in part.values]
    sign = {"lower": 1, "higher": -1}.get(direction(name))
    if sign is None or len(held) < 2:
        return None
    first, second = sorted(held, key=lambda part: sign * part.values[name].value)[:2]
    spread = max(part.values[name].spread or 0 for part in (first, second))
    return first if abs(first.values[name].value - second.values[name].value) > spread else None


def split_settings(record: Record) -> tuple[dict[str, list[str]], dict[str, str]]:
    """Return the settings that differ (one text a part, "—" where it has none) and those that are shared."""
    parts = [_flat(part.settings) for part in _contestants(record)]
    shared = _flat(record.settings) if record.parts else {}
    differing = {}
    for name in dict.fromkeys(name for part in parts for name in part):
        values = [part.get(name, shared.get(name, "—")) for part in parts]
        if len(set(values)) == 1 and shared.get(name, values[0]) == values[0]:
            shared[name] = values[0]
        else:
            differing[name] = values
    return differing, {name: value for name, value in shared.items() if name not in differing}


def format_value(value: Value) -> str:
    """Write a value to four significant digits, thousands apart, with its spread and unit."""
    number = _number(value.value)
    spread = "" if value.spread is None else f" ± {value.spread:.2g}"
    return f"{number}{spread}{' ' + value.unit if value.unit else ''}"


def _number(value: float) -> str:
    if value == int(value) and abs(value) < 1e15:
        return f"{int(value):,}"
    return f"{value:,.0f}" if 1e4 <= abs(value) < 1e15 else f"{value:.4g}"


def _contestants(record: Record) -> list[Record]:
    return [part for part in record.parts if not part.parts and part.kind != REFERENCE] or [record]


def _columns(record: Record) -> list[Record]:
    return [*_contestants(record), *(part for part in record.parts if not part.parts and part.kind == REFERENCE)]


def _value_names(parts: Iterable[Record]) -> list[str]:
    return list(dict.fromkeys(name for part in parts for name in part.values))


def _flat(settings: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    flat: dict[str, str] = {}
    for name, value in settings.items():
        if isinstance(value, Mapping) and value:
            flat |= _flat(value, f"{prefix}{name}.")
        else:
            flat[prefix + name] = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return flat


def _enumerate(words: Iterable[str]) -> str:
    *head, last = words
    return f"{', '.join(head)} and {last}" if head else last


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def _body(record: Record, folder: Path, level: int = 2) -> str:
    holders = [record, *(part for part in _columns(record) if part is not record)]
    differing, shared = split_settings(record)
    sections = [
        ("Values", _values_table(record) + _commands(holder for holder in holders if holder.values)),
        ("Pictures", _pictures(holders, folder) + _commands(holder for holder in holders if holder.pictures)),
        ("Figures", _figures(holders) + _commands(holder for holder in holders if holder.figures)),
        ("Settings that differ", _differing_table(record, differing)),
        ("Settings that are shared" if len(_contestants(record)) > 1 else "Settings", _pairs(shared)),
    ]
    heading = f"h{min(level, 6)}"
    text = "\n".join(
        f"<section>\n<{heading}>{title}</{heading}>\n{content}\n</section>" for title, content in sections if content
    )
    for part in record.parts:
        if part.parts:
            name = f'<p class="kind">{escape(part.kind)}</p>\n<{heading} class="name">{escape(part.name)}</{heading}>'
            told = f'<p class="summary">{escape(summary(part))}</p>'
            text += f"\n<article>\n{name}\n{told}\n{_body(part, folder, level + 1)}\n</article>"
    return text


def _commands(holders: Iterable[Record]) -> str:
    """Return the commands that made what stands above."""
    commands = dict.fromkeys(holder.command for holder in holders if holder.command)
    return "".join(f'<p class="made"><code>{escape(command)}</code></p>\n' for command in commands)


def _values_table(record: Record) -> str:
    columns = _columns(record)
    text = ""
    if names := _value_names(columns):
        rows = []
        for name in names:
            hint = f" <small>{direction(name)} is better</small>" if direction(name) else ""
            best = leader(name, _contestants(record))
            cells = [_value_cell(part.values.get(name), part is best) for part in columns]
            rows.append((escape(name) + hint, cells))
        names_of_parts = [
            f"<span class=reference>{escape(part.name)}</span>" if part.kind == REFERENCE else escape(part.name)
            for part in columns
        ]
        text = _table(names_of_parts, rows)
    if all(part is not record for part in columns):
        text += _pairs({name: format_value(value) for name, value in record.values.items()})
    return text


def _value_cell(value: Value | None, best: bool) -> str:
    if value is None:
        return "<td>—</td>"
    text = escape(format_value(value))
    count = f" <small>n = {value.count}</small>" if value.count > 1 else ""
    return f'<td title="{value.value!r}">{f"<strong>{text}</strong>" if best else text}{count}</td>'


def _differing_table(record: Record, differing: Mapping[str, Sequence[str]]) -> str:
    if not differing:
        return ""
    heads = [escape(part.name) for part in _contestants(record)]
    rows = [(escape(name), [f"<td>{escape(value)}</td>" for value in values]) for name, values in differing.items()]
    return _table(heads, rows)


def _table(heads: Sequence[str], rows: Sequence[tuple[str, Sequence[str]]]) -> str:
    """Return a table with a column for each head, or a row where there are many."""
    opening = "<table>"
    if len(heads) > WIDE:
        rows, names = [(head, [row[k] for _, row in rows]) for k, head in enumerate(heads)], [name for name, _ in rows]
        heads, opening = [f'<button type="button">{name}</button>' for name in names], SORTABLE
    head = "".join(f'<th scope="col">{text}</th>' for text in heads)
    body = "\n".join(f'<tr><th scope="row">{name}</th>{"".join(cells)}</tr>' for name, cells in rows)
    return (
        f'<div class="scroll">{opening}\n<thead><tr><td></td>{head}</tr></thead>\n'
        f"<tbody>\n{body}\n</tbody>\n</table></div>\n"
    )


def _pairs(pairs: Mapping[str, str]) -> str:
    if not pairs:
        return ""
    rows = "\n".join(f"<div><dt>{escape(name)}</dt><dd>{escape(value)}</dd></div>" for name, value in pairs.items())
    return f'<dl class="pairs">\n{rows}\n</dl>'


def _pictures(holders: Iterable[Record], folder: Path) -> str:
    pictures = [
        f'<figure><img src="{_picture(folder, name)}" alt="{escape(caption)}">'
        f"<figcaption>{escape(caption)}</figcaption></figure>"
        for caption, name in dict.fromkeys(item for holder in holders for item in holder.pictures.items())
    ]
    return _gallery("pictures", pictures)


def _picture(folder: Path, name: str) -> str:
    data, kind = _read_picture(folder, name)
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"


def _read_picture(folder: Path, name: str) -> tuple[bytes, str]:
    path = folder / name
    if not path.resolve().is_relative_to(folder.resolve()):
        raise ValueError(f"picture {name!r} lies outside the record's folder {folder}")
    data = path.read_bytes()
    kind = next((kind for magic, kind in IMAGE_TYPES.items() if data.startswith(magic)), None)
    if kind is None:
        raise ValueError(f"picture {path} is neither PNG nor JPEG, it starts with {data[:8]!r}")
    return data, kind


def _figures(holders: Iterable[Record]) -> str:
    figures = [
        f"<figure>{plots.svg(figure)}<figcaption>{escape(figure.caption)}</figcaption></figure>"
        for holder in holders
        for figure in holder.figures.values()
    ]
    return _gallery("figures", figures)


def _gallery(kind: str, items: Sequence[str]) -> str:
    lines = "\n".join(items)
    return f'<div class="{kind}">\n{lines}\n</div>' if items else ""


def _provenance(record: Record) -> str:
    parts = [part for part in record.parts if part.command != record.command]
    commands = "".join(
        f'<div class="scroll"><pre>{escape(command)}</pre></div>\n'
        for command in dict.fromkeys([record.command, *(part.command for part in parts)])
    )
    versions = ", ".join(f"{package} {version}" for package, version in record.versions.items())
    facts = {
        "commit": _enumerate(dict.fromkeys([record.commit, *(part.commit for part in record.parts)])),
        "hardware": _enumerate(dict.fromkeys([record.hardware, *(part.hardware for part in record.parts)])),
        "versions": versions,
        "created": record.created,
        **{f"fingerprint: {name}": value for name, value in record.fingerprints.items()},
        **{
            f"fingerprint: {name}, {part.name}": value
            for part in record.parts
            for name, value in part.fingerprints.items()
            if record.fingerprints.get(name) != value
        },
    }
    return f"<h2>Provenance</h2>\n{commands}{_pairs(facts)}"


STYLE = """
:root { color-scheme: light dark; --page: #fdfdfb; --ink: #1c1c1e; --soft: #5f6068; --line: #deded8; --accent: #1f6fab;
  --sans: system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif;
  --serif: Charter, "Bitstream Charter", "Iowan Old Style", Palatino, Georgia, "DejaVu Serif", serif;
  --mono: ui-monospace, Menlo, Consolas, "DejaVu Sans Mono", monospace; }
@media (prefers-color-scheme: dark) {
  :root { --page: #16171a; --ink: #e6e5e1; --soft: #a0a1a8; --line: #34363c; --accent: #7ab8ea; } }
* { box-sizing: border-box; }
html { -webkit-text-size-adjust: 100%; text-size-adjust: 100%; }
body { margin: 0 auto; max-width: 66rem; padding: 3.5rem clamp(1rem, 4vw, 2.5rem) 3rem; background: var(--page);
  color: var(--ink); font: 1rem/1.55 var(--serif); overflow-wrap: break-word; }
h1 { margin: 0; font-size: clamp(1.7rem, 1.2rem + 2.4vw, 2.5rem); font-weight: 600; line-height: 1.15;
  letter-spacing: -0.012em; text-wrap: balance; }
h2, h3, h4, h5, h6 { margin: 3rem 0 1rem; font-size: 1.2rem; font-weight: 600; line-height: 1.3; }
.kind { margin: 0 0 .4rem; color: var(--accent); font: 600 .75rem/1.4 var(--sans); letter-spacing: .09em;
  text-transform: uppercase; }
.summary { max-width: 42rem; margin: 1.1rem 0 0; font-size: 1.09rem; text-wrap: pretty; }
.scroll { overflow-x: auto; }
table { width: 100%; border-collapse: collapse; border-top: 1.5px solid var(--ink);
  border-bottom: 1.5px solid var(--ink); font: .92rem/1.4 var(--sans); font-variant-numeric: tabular-nums; }
th, td { padding: .5rem 0 .5rem 1.4rem; text-align: right; vertical-align: baseline; }
th:first-child, td:first-child { padding-left: 0; text-align: left; }
thead th { border-bottom: 1px solid var(--ink); font-weight: 600; }
thead td { border-bottom: 1px solid var(--ink); }
tbody tr + tr > * { border-top: 1px solid var(--line); }
tbody th { min-width: 9rem; font-weight: 400; }
tbody td { white-space: nowrap; }
th .reference { color: var(--soft); font-weight: 400; }
small { color: var(--soft); font-size: .82em; white-space: nowrap; }
th small { margin-left: .35em; }
strong { font-weight: 650; }
.pairs { margin: 0; columns: 19rem; column-gap: 3rem; font: .87rem/1.4 var(--sans);
  font-variant-numeric: tabular-nums; }
th button { margin: 0; padding: 0; border: 0; background: none; color: inherit; font: inherit; text-align: inherit;
  cursor: pointer; }
th[aria-sort] button::after { content: " ↑"; }
th[aria-sort=descending] button::after { content: " ↓"; }
.made { margin: 1rem 0 0; overflow-wrap: anywhere; color: var(--soft); font: .8rem/1.5 var(--mono); }
.scroll + .pairs { margin-top: 1.4rem; }
.pairs div { display: flex; justify-content: space-between; gap: 1.5rem; padding: .36rem 0;
  border-bottom: 1px solid var(--line); break-inside: avoid; }
.pairs dt { flex: none; max-width: 60%; color: var(--soft); }
.pairs dd { margin: 0; min-width: 0; text-align: right; overflow-wrap: anywhere; }
.pictures, .figures { display: grid; gap: 2rem 2.2rem; align-items: start; }
.pictures { grid-template-columns: repeat(auto-fit, minmax(min(100%, 18rem), 1fr)); }
.figures { grid-template-columns: repeat(auto-fit, minmax(min(100%, 25rem), 1fr)); }
figure { margin: 0; min-width: 0; }
figure img { display: block; max-width: 100%; height: auto; }
figure svg { display: block; width: 100%; max-width: 36rem; height: auto; }
figure svg text { font-family: var(--sans) !important; }
figcaption { margin-top: .7rem; max-width: 36rem; color: var(--soft); font-size: .93rem; line-height: 1.45; }
article { margin-top: 4rem; padding-top: 1.5rem; border-top: 1.5px solid var(--ink); }
article > .name { margin: 0; font-size: 1.6rem; }
footer { margin-top: 3.5rem; border-top: 1.5px solid var(--ink); }
footer h2 { margin-top: 1.4rem; }
footer .pairs { columns: auto; }
footer .pairs div { justify-content: flex-start; }
footer .pairs dt { width: 11rem; max-width: 38%; overflow-wrap: anywhere; }
footer .pairs dd { text-align: left; }
pre { margin: 0 0 .8rem; font: .85rem/1.5 var(--mono); }
@media (max-width: 34rem) {
  body { padding-top: 1.75rem; }
  table { font-size: .84rem; }
  th, td { padding-left: .75rem; }
  tbody th { min-width: 7rem; }
  th small { display: block; margin-left: 0; } }
@media print { body { max-width: none; padding: 0; } section { break-inside: avoid; } }
"""
