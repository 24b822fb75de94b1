import base64
import dataclasses
import hashlib
import re
from html import escape
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from PIL import Image
from tests.chromium import PROGRAM, Chromium

from jlt.cli import report as cli
from jlt.evaluation import records
from jlt.evaluation.records import Figure, Record, Value
from jlt.experiments import plots
from jlt.experiments.report import (
    direction,
    format_value,
    leader,
    page,
    split_settings,
    summary,
    write_figures,
    write_report,
)

VOID = {"meta", "img", "br", "hr", "link", "input"}
FD, KD = "FD (EfficientNet-Lite0)", "KD (EfficientNet-Lite0)"


class Page(HTMLParser):
    """Reads a page strictly: every tag that opens closes in order; keeps its tags, attributes and text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        assert len(dict(attrs)) == len(attrs), f"an attribute twice in {tag}"
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open, f"</{tag}> closes nothing"
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.words.append(data)

    @property
    def text(self) -> str:
        return "\n".join(self.words)


def comparison(folder: Path) -> Record:
    """A record of the quickstart's shape, with pictures of random digits' size beside it."""
    generator = torch.Generator().manual_seed(0)
    steps, bins = [float(k) for k in range(0, 1500, 10)], [(k + 0.5) / 10 for k in range(10)]
    sheets = {"samples-jlt.png": 40, "samples-dit.png": 90, "real.png": 0}
    for name, noise in sheets.items():
        rows = torch.linspace(0, 255, 32).expand(60, 1, 32, 32) + noise * torch.randn(
            60, 1, 32, 32, generator=generator
        )
        plots.grid(rows.clamp(0, 255).byte(), columns=10).save(folder / name)
    spectrum = [12 * 0.93**k + 0.01 for k in range(64)]
    values = {
        "JLT": {FD: 41.27, KD: 0.031, "class agreement": 0.842, "training seconds": 101.3, "sampling seconds": 22.4},
        "DiT": {FD: 63.9, KD: 0.064, "class agreement": 0.726, "training seconds": 100.8, "sampling seconds": 22.6},
    }
    runs = tuple(
        Record(
            kind="run",
            name=name,
            values={
                **{key: Value(value, unit="s" if "seconds" in key else "") for key, value in values[name].items()},
                "evaluations": Value(99),
                "network passes": Value(123_456),
            },
            settings={"target": target},
            fingerprints={"weights": f"{name}-0123456789abcdef"},
            command="jlt quickstart --seed 0",
            pictures={f"{name}, 60 samples, each column a digit": f"samples-{name.lower()}.png"},
        )
        for name, target in (("JLT", "x"), ("DiT", "v"))
    )
    reference = Record(
        kind="reference",
        name="real against real",
        values={FD: Value(7.3), KD: Value(-0.0002), "class agreement": Value(0.968)},
        settings={},
        command="jlt quickstart --seed 0",
        pictures={"Real held-out digits": "real.png"},
    )
    return Record(
        kind="compare",
        name="JLT against DiT on 5,000 MNIST digits",
        values={"seconds in all": Value(301.5, unit="s")},
        settings={
            "source": "mnist",
            "representation": "patch-pca",
            "model": {"hidden_size": 192, "depth": 6, "num_heads": 6, "patch_size": 1},
            "steps": 1500,
            "batch_size": 128,
            "learning_rate": 5e-4,
            "betas": [0.9, 0.95],
            "ema_decays": [0.99, 0.995],
            "label_drop": 0.1,
            "floor": 0.05,
            "solver": "heun",
            "sampling_steps": 50,
            "scale": 2.0,
            "interval": [0.1, 1.0],
            "seed": 0,
            "compile": False,
            "resume": None,
        },
        figures={
            "training loss": Figure(
                "Training loss in v-space, averaged over 10 steps.",
                "step",
                "loss",
                {
                    name: (steps, [scale * (0.3 + 2 / (1 + k / 40)) for k in steps])
                    for name, scale in (("JLT", 1.0), ("DiT", 1.2))
                },
                y_scale="log",
            ),
            "held-out loss": Figure(
                "Held-out loss in v-space by time.",
                "t (0 = noise, 1 = data)",
                "loss",
                {name: (bins, [s * (t - 0.4) ** 2 + 0.4 for t in bins]) for name, s in (("JLT", 1.0), ("DiT", 1.3))},
            ),
            "spectrum": Figure(
                "Variance of each target along the eigen-directions of the latents' covariance.",
                "direction",
                "variance",
                {
                    "x: Σ": (list(range(1, 65)), spectrum),
                    "eps: I": (list(range(1, 65)), [1.0] * 64),
                    "v: Σ + I": (list(range(1, 65)), [value + 1 for value in spectrum]),
                },
                y_scale="log",
            ),
        },
        parts=(*runs, reference),
        fingerprints={"latents": "feedfacecafebeef"},
        command="jlt quickstart --seed 0",
        commit="0123456789ab",
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("comparison")
    records.write(comparison(folder), folder / "record.json")
    return folder


@pytest.fixture(scope="module")
def record(folder):
    return records.read(folder / "record.json")


@pytest.fixture(scope="module")
def html(folder):
    return write_report(folder).read_text()


def test_the_page_is_well_formed_and_its_ids_are_unique(html):
    ids = [attributes["id"] for _, attributes in Page(html).tags if "id" in attributes]
    assert len(ids) == len(set(ids))


def test_the_page_asks_the_network_for_nothing_and_runs_nothing(html):
    assert not re.search(r"https?:|@import|url\((?!#)", html, re.IGNORECASE)
    for tag, attributes in Page(html).tags:
        assert tag not in {"script", "link", "iframe", "object", "embed", "base", "form"}
        assert not any(name.startswith("on") for name in attributes)
        for name in ("src", "href", "xlink:href", "action"):
            assert (attributes.get(name) or "#").startswith(("#", "data:image/"))


def test_the_page_fits_phones_and_the_dark(html):
    assert ("meta", {"name": "viewport", "content": "width=device-width, initial-scale=1"}) in Page(html).tags
    assert "prefers-color-scheme: dark" in html


def test_every_value_appears_in_words_and_in_full(html, record):
    read = Page(html)
    titles = {attributes.get("title") for tag, attributes in read.tags if tag == "td"}
    for part in record.parts:
        for name, value in part.values.items():
            assert name in read.text
            assert format_value(value) in read.text
            assert repr(value.value) in titles
    for name, value in record.values.items():
        assert name in read.text
        assert format_value(value) in read.text


def test_every_setting_and_the_provenance_appear(html, record):
    text = Page(html).text
    differing, shared = split_settings(record)
    assert len(shared) == 20  # 16 and the four of the model
    assert {"model.hidden_size": "192", "betas": "[0.9, 0.95]", "compile": "false"}.items() <= shared.items()
    for name, value in shared.items():
        assert f"{name}\n{value}\n" in text
    for name, values in differing.items():
        assert "\n".join([name, *values]) in text
    prints = [value for holder in (record, *record.parts) for value in holder.fingerprints.values()]
    for fact in (record.command, record.commit, record.hardware, record.created, *record.versions.values(), *prints):
        assert fact in text


def test_pictures_are_embedded_to_the_byte_with_their_captions(html, folder, record):
    read = Page(html)
    embedded = {
        attributes["alt"]: base64.b64decode((attributes["src"] or "").removeprefix("data:image/png;base64,"))
        for tag, attributes in read.tags
        if tag == "img"
    }
    expected = {caption: folder / name for part in record.parts for caption, name in part.pictures.items()}
    assert embedded == {caption: path.read_bytes() for caption, path in expected.items()}
    assert all(caption in read.text for caption in expected)


def test_every_figure_appears_with_its_lines_and_caption(html, record):
    text = Page(html).text
    assert html.count("<svg ") == len(record.figures)
    for figure in record.figures.values():
        assert figure.caption in text
        assert all(name in text for name in figure.lines)


def test_the_summary_states_what_differs_the_values_and_who_is_ahead(record):
    assert summary(record) == (
        "JLT and DiT differ in target and share 20 settings. "
        f"{FD} is 41.27 for JLT and 63.9 for DiT (lower is better; real against real: 7.3). "
        f"{KD} is 0.031 for JLT and 0.064 for DiT (lower is better; real against real: -0.0002). "
        "Class agreement is 0.842 for JLT and 0.726 for DiT (higher is better; real against real: 0.968). "
        f"JLT is ahead in {FD}, {KD} and class agreement. "
        "Each number is a single run, so the spread over seeds is not known."
    )


def test_the_real_line_never_leads_and_has_no_settings(record):
    jlt, dit, real = record.parts
    assert leader(FD, [jlt, dit]) is jlt
    assert split_settings(record)[0] == {"target": ["x", "v"]}
    swapped = dataclasses.replace(record, parts=(real, dit, jlt))
    assert "DiT is ahead" not in summary(swapped)
    assert "real against real is ahead" not in summary(swapped)


def test_a_tie_has_no_leader_and_a_value_of_no_direction_neither(record):
    jlt, dit, _ = record.parts
    assert leader(FD, [jlt, jlt]) is None
    assert leader("training seconds", [jlt, dit]) is None
    assert leader(FD, [jlt]) is None


def test_of_a_distance_over_fifths_no_way_is_better_on_any_features():
    for name, way in (("FID", "lower"), (FD, "lower"), ("FID, over fifths of 9", ""), (f"{FD}, over fifths of 9", "")):
        assert direction(name) == way


def test_a_difference_within_the_spread_has_no_leader(record):
    jlt, dit = (
        dataclasses.replace(part, values={FD: Value(part.values[FD].value, spread, 3)})
        for part, spread in zip(record.parts, (30.0, 1.0), strict=False)
    )
    assert leader(FD, [jlt, dit]) is None  # 41.27 and 63.9 lie 22.6 apart
    jlt = dataclasses.replace(jlt, values={FD: Value(41.27, 20.0, 3)})
    assert leader(FD, [jlt, dit]) is jlt
    assert "single run" not in summary(dataclasses.replace(record, parts=(jlt, dit)))


def test_the_summary_of_many_parts_tells_the_extremes():
    parts = tuple(Record("run", f"seed {k}", {"FID": Value(20 - k)}, {"seed": k}) for k in range(5))
    assert summary(Record("compare", "Seeds", {}, {}, parts=parts)) == (
        "5 parts differ in seed and share 0 settings. "
        "FID lies between 16 for seed 4 and 20 for seed 0 (lower is better). "
        "seed 4 is ahead in FID. Each number is a single run, so the spread over seeds is not known."
    )


def test_a_setting_on_which_all_parts_agree_is_shared(record):
    jlt, dit, _ = record.parts
    parts = tuple(
        dataclasses.replace(part, settings={**part.settings, "seed": 3, "loss": "x", **extra})
        for part, extra in ((jlt, {"k": 0.5}), (dit, {}))
    )
    differing, shared = split_settings(dataclasses.replace(record, parts=parts))
    assert differing == {"target": ["x", "v"], "seed": ["3", "3"], "k": ["0.5", "—"]}  # the record itself says seed 0
    assert shared["loss"] == "x"
    assert "seed" not in shared


def test_a_record_without_parts_is_one_column_with_its_settings(tmp_path):
    record = Record("evaluate", "Samples of a run", {FD: Value(12.5, 0.3, 3)}, {"num_images": 5000, "extractor": "e"})
    text = Page(page(record, tmp_path)).text
    assert "12.5 ± 0.3" in text
    assert "n = 3" in text
    assert "num_images\n5000\n" in text
    assert summary(record) == f"{FD} is 12.5 ± 0.3 (lower is better)."


def test_a_part_with_parts_is_a_section_of_its_own_and_no_column(record, folder):
    leaves = tuple(Record("run", f"seed {k}", {"rank": Value(k / 8)}, {"seed": k}) for k in (7, 8))
    branch = Record("sweep", "Two seeds", {"total": Value(0.375)}, {"width": 96}, parts=leaves)
    whole = dataclasses.replace(record, parts=(*record.parts, branch))
    assert summary(whole) == summary(record)
    assert split_settings(whole) == split_settings(record)
    html = page(whole, folder)
    text = Page(html).text
    for told in ("Two seeds", "seed 7", "0.875", "0.375", "width\n96\n", summary(branch)):
        assert told in text
    headings = [tag for tag, _ in Page(html).tags if re.fullmatch(r"h\d", tag)]
    assert all(int(after[1]) <= int(before[1]) + 1 for before, after in pairwise(headings))


def test_a_picture_that_record_and_part_share_is_shown_once(record, folder):
    jlt, dit, real = record.parts
    whole = dataclasses.replace(record, pictures=jlt.pictures)
    assert page(whole, folder).count("<img ") == len(jlt.pictures) + len(dit.pictures) + len(real.pictures)


def every_text_is(text: str) -> Record:
    record = Record(
        kind=text,
        name=text,
        values={text: Value(1.0, unit=text)},
        settings={text: text},
        fingerprints={text: text},
        pictures={text: "picture.png"},
        command=text,
        commit=text,
        hardware=text,
        versions={text: text},
        created=text,
    )
    figures = {text: Figure(text, text, text, {text: ([0, 1], [0, 1])})}
    return dataclasses.replace(record, figures=figures, parts=(record, dataclasses.replace(record, settings={text: 1})))


hostile = [
    "<script>alert(1)</script>",
    '" onload="x',
    "' onload='x",
    "</style>",
    "</svg>",
    "-->",
    "]]>",
    "&lt;",
    "<!--",
]


@settings(deadline=None, max_examples=10, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.text(st.characters(exclude_categories=["Cs", "Cc"]), min_size=1) | st.sampled_from(hostile))
@example(" ".join(hostile))
def test_no_text_of_a_record_becomes_markup(tmp_path, text):
    plots.grid(torch.zeros(1, 1, 8, 8, dtype=torch.uint8), 1).save(tmp_path / "picture.png")
    html = page(every_text_is(text), tmp_path)
    read = Page(html)
    assert escape(text) in html
    assert not any(name.startswith("on") for _, attributes in read.tags for name in attributes)
    assert "script" not in {tag for tag, _ in read.tags}
    drawn = [tag for tag, _ in Page(plots.svg(every_text_is(text).figures[text])).tags]
    ours = [tag for tag, _ in Page(page(dataclasses.replace(every_text_is("a"), figures={}), tmp_path)).tags]
    extra = ["figure", "figcaption", "section", "h2", "div", "p", "code"]  # which the figure stands in
    assert sorted([tag for tag, _ in read.tags]) == sorted(ours + drawn + extra)


def test_a_picture_outside_the_folder_or_of_another_kind_is_refused(tmp_path):
    folder = tmp_path / "record"
    folder.mkdir()
    (tmp_path / "secret.png").write_bytes(b"\x89PNG\r\n\x1a\nsecret")
    (folder / "link.png").symlink_to(tmp_path / "secret.png")
    (folder / "page.png").write_bytes(b"<svg onload='alert(1)'>")
    record = Record("evaluate", "r", {}, {})
    for name, message in [
        ("../secret.png", "outside"),
        (str(tmp_path / "secret.png"), "outside"),
        ("link.png", "outside"),
        ("page.png", "neither PNG nor JPEG"),
    ]:
        with pytest.raises(ValueError, match=message):
            page(dataclasses.replace(record, pictures={"a": name}), folder)
    with pytest.raises(FileNotFoundError):
        page(dataclasses.replace(record, pictures={"a": "missing.png"}), folder)


def test_the_command_takes_a_record_or_its_folder_and_prints_the_path_last(folder, tmp_path, capsys):
    for argument in (folder, folder / "record.json"):
        cli.run(argument, tmp_path / "page.html")
        assert capsys.readouterr().out.splitlines()[-1] == str(tmp_path / "page.html")
    cli.run(folder)
    assert capsys.readouterr().out.splitlines()[-1] == str(folder / "report.html")
    assert (folder / "report.html").read_text() == (tmp_path / "page.html").read_text()


def test_a_folder_in_place_of_the_page_is_refused(folder, tmp_path):
    with pytest.raises(ValueError, match="is a folder"):
        write_report(folder, tmp_path)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (Value(250_000), "250,000"),
        (Value(12345.678), "12,346"),
        (Value(0.84159), "0.8416"),
        (Value(2.5, 0.125, 3), "2.5 ± 0.12"),
        (Value(101.34, unit="s"), "101.3 s"),
        (Value(-0.0002), "-0.0002"),
        (Value(1e300), "1e+300"),
    ],
)
def test_values_are_written_for_people(value, text):
    assert format_value(value) == text


def test_figures_are_written_as_pictures_named_by_their_part_and_themselves(tmp_path, capsys):
    figure = Figure("Two lines.", "t", "loss", {"a": ([0, 1], [1, 2])})
    part = Record(kind="forecast", name="part", values={}, settings={}, figures={"Samples of x": figure})
    records.write(
        Record(kind="geometry", name="r", values={}, settings={}, figures={"spectrum": figure}, parts=(part,)),
        tmp_path / "record.json",
    )
    cli.run(tmp_path, figures=tmp_path / "figures")
    *drawn, page_path = capsys.readouterr().out.splitlines()
    assert [Path(line).name for line in drawn] == ["geometry-spectrum.png", "forecast-samples-of-x.png"]
    assert all(Path(line).read_bytes().startswith(b"\x89PNG") for line in drawn)
    assert page_path == str(tmp_path / "report.html")


def test_the_pictures_of_the_parts_and_of_the_record_are_put_in_a_row(tmp_path):
    for name, side in (("a", 4), ("b", 6), ("real", 5)):
        Image.new("RGB", (side, side), "red").save(tmp_path / f"{name}.png")
    parts = [Record("evaluate", name, {}, {}, pictures={name: f"{name}.png"}) for name in ("a", "b")]
    record = Record("compare", "r", {}, {}, pictures={"real": "real.png"}, parts=tuple(parts))
    records.write(record, tmp_path / "record.json")
    (path,) = write_figures(tmp_path, tmp_path / "figures")
    assert path.name == "compare-pictures.png"
    with Image.open(path) as row:
        alpha = np.asarray(row)[..., 3] > 0
    assert alpha.shape == (6, 15 + 2 * 24)
    assert alpha.sum(0).tolist() == [4] * 4 + [0] * 24 + [6] * 6 + [0] * 24 + [5] * 5
    for name in ("c", "d", "e", "f"):
        Image.new("RGB", (4, 4), "red").save(tmp_path / f"{name}.png")
        parts.append(Record("evaluate", name, {}, {}, pictures={name: f"{name}.png"}))
    records.write(dataclasses.replace(record, parts=tuple(parts)), tmp_path / "record.json")
    write_figures(tmp_path, tmp_path / "figures")
    with Image.open(path) as seven:  # 4 + 3
        assert seven.size == (4 + 6 + 4 + 4 + 3 * 24, 6 + 24 + 5)
    records.write(dataclasses.replace(record, pictures={"real": "../real.png"}), tmp_path / "record.json")
    with pytest.raises(ValueError, match="lies outside the record's folder"):
        write_figures(tmp_path, tmp_path / "figures")


def test_figures_of_one_name_are_written_each_to_its_own_file(tmp_path):
    parts = tuple(
        Record("geometry", f"Geometry of {name}", {}, {}, figures={"spectrum": Figure("", "", "", {name: ([0], [y])})})
        for name, y in (("a", 1), ("b", 2))
    )
    records.write(Record("compare", "r", {}, {}, parts=parts), tmp_path / "record.json")
    written = write_figures(tmp_path, tmp_path)
    assert [path.name for path in written] == ["geometry-spectrum.png", "geometry-geometry-of-b-spectrum.png"]
    assert written[0].read_bytes() == plots.png(parts[0].figures["spectrum"])


def many(number: int) -> Record:
    """A record of that many runs, whose distance falls as their text rises, one of them unknown."""
    parts = tuple(
        Record("run", f"run {k}", {"FID": Value(100 - 11.0 * k)} if k else {}, {"solver": "xyz"[k % 3], "steps": 10**k})
        for k in range(number)
    )
    figures = {"loss": Figure("Training loss, averaged over 10 steps.", "step", "loss", {"a": ([0, 1], [2, 1])})}
    return Record(
        "sweep", "Many runs of one kind", {}, {}, figures=figures, parts=parts, command="jlt sweep " + "x" * 99
    )


def test_what_is_shown_has_its_command_below(html, tmp_path):
    assert html.count('<p class="made"><code>jlt quickstart --seed 0</code></p>') == 3  # values, pictures, figures
    assert page(many(9), tmp_path).count(f"<code>jlt sweep {'x' * 99}</code>") == 1


def test_the_only_script_is_allowed_by_its_hash_and_stands_where_rows_are_parts(tmp_path):
    assert "script-src" not in page(many(8), tmp_path)
    html = page(many(9), tmp_path)
    assert [tag for tag, _ in Page(html).tags].count("script") == 1
    (script,) = re.findall(r"<script>(.*?)</script>", html, re.DOTALL)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert f"script-src &#x27;sha256-{digest}&#x27;" in html
    assert not re.search("http|fetch|import|eval|innerHTML", script)


@pytest.mark.slow
@pytest.mark.skipif(not PROGRAM.exists(), reason="not run: no Chromium")
def test_a_browser_shows_the_page_on_a_phone_in_the_dark_and_sorts_its_tables(folder, tmp_path):
    (tmp_path / "many.html").write_text(page(many(12), tmp_path))
    browser = Chromium(tmp_path / "profile")
    try:
        for path in (write_report(folder, tmp_path / "few.html"), tmp_path / "many.html"):
            for width, height, scheme in [(390, 844, "dark"), (1280, 900, "light")]:
                seen = browser.visit("about:blank", width, height)
                scheme_is = [{"name": "prefers-color-scheme", "value": scheme}]
                browser.call("Emulation.setEmulatedMedia", seen.session, features=scheme_is)
                browser.call("Page.navigate", seen.session, url=path.as_uri())
                seen.wait("document.readyState === 'complete' && document.querySelector('footer') !== null")
                assert seen.run("document.documentElement.scrollWidth") <= width
                light = seen.run("Math.max(...getComputedStyle(document.body).backgroundColor.match(/\\d+/g))")
                assert light < 60 if scheme == "dark" else light > 240
                assert all(url.startswith(("about:", "file:", "data:")) for url in seen.requests())
        column = "[...document.querySelectorAll('.sortable')[0].tBodies[0].rows].map(row => row.cells[0].textContent)"
        button = "document.querySelector('.sortable thead button').click()"
        assert seen.run(column)[0] == "run 0"
        seen.run(button)
        assert seen.run(column) == [*(f"run {k}" for k in range(11, 0, -1)), "run 0"]  # the unknown last
        seen.run(button)
        assert seen.run(column) == [*(f"run {k}" for k in range(1, 12)), "run 0"]
        seen.run("document.body.append(Object.assign(document.createElement('script'), {text: 'window.other = 1'}))")
        assert not seen.run("window.other")  # of no other script is the hash allowed
    finally:
        browser.close()
