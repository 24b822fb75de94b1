import io
import re
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from jlt.evaluation.records import Figure
from jlt.experiments import plots

LINES = {"JLT": ([0.0, 10, 20], [1.0, 0.5, 0.25]), "DiT": ([0.0, 10, 20], [2.0, 1.5, 1.25])}


def luminance(colour: str) -> float:
    channels = (int(colour[k : k + 2], 16) / 255 for k in (1, 3, 5))
    red, green, blue = (c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def test_every_line_of_the_figure_is_drawn_with_its_own_data():
    (axes,) = plots.draw(Figure("Loss.", "step", "loss", LINES)).axes
    drawn = [(list(line.get_xdata()), list(line.get_ydata())) for line in axes.lines]
    assert drawn == [tuple(map(list, line)) for line in LINES.values()]
    assert len({line.get_color() for line in axes.lines}) == 2
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("step", "loss")


def test_a_name_looks_the_same_in_every_panel(monkeypatch):
    drawn, draw = [], plots.draw
    monkeypatch.setattr(plots, "draw", lambda *arguments: drawn.append(draw(*arguments)) or drawn[-1])
    plots.panels(
        [Figure("", "step", "loss", LINES), Figure("", "step", "loss", {"eps": ([0], [1]), "DiT": LINES["DiT"]})]
    )
    (_, first), (eps, second) = (drawing.axes[0].lines for drawing in drawn)
    assert (first.get_color(), first.get_linestyle()) == (second.get_color(), second.get_linestyle())
    assert eps.get_color() not in {line.get_color() for line in drawn[0].axes[0].lines}


def test_the_axes_hold_every_point():
    (axes,) = plots.draw(Figure("Loss.", "step", "loss", LINES)).axes
    (left, right), (bottom, top) = axes.get_xlim(), axes.get_ylim()
    assert left <= 0 < 20 <= right
    assert bottom <= 0.25 < 2 <= top


@pytest.mark.parametrize(("scale", "lowest"), [("linear", -1.5), ("log", 0.5)])  # 2 - 0.5, 1.5 - 3, 1.25 - 0.75
def test_a_line_lies_in_a_band_of_its_spread_that_a_log_scale_ends_at_the_line(scale, lowest):
    figure = Figure("", "step", "loss", LINES, y_scale=scale, spreads={"DiT": [0.5, 3.0, 0.75]})
    (axes,) = plots.draw(figure).axes
    (band,) = axes.collections
    ((left, bottom), (right, top)) = band.get_datalim(axes.transData).get_points()
    assert (left, right, bottom, top) == (0, 20, lowest, 4.5)
    with pytest.raises(ValueError, match="line 'DiT' has 3 y values and 1 spreads"):
        plots.draw(Figure("", "step", "loss", LINES, spreads={"DiT": [0.5]}))


def test_a_level_is_a_line_across_the_axes_without_a_name():
    drawing = plots.draw(Figure("", "step", "ratio", LINES, y_scale="log", level=4))
    *lines, level = drawing.axes[0].lines
    assert len(lines) == len(drawing.legends[0].get_texts()) == len(LINES)
    assert (list(level.get_ydata()), level.get_color()) == ([4, 4], plots.INK)
    bottom, top = drawing.axes[0].get_ylim()
    assert bottom <= 0.25 < 4 <= top


def test_a_log_scale_leaves_out_what_it_cannot_show():
    figure = Figure("Spectrum.", "direction", "variance", {"Sigma": ([1, 2, 3], [10, 0.1, 0])}, y_scale="log")
    (axes,) = plots.draw(figure).axes
    assert axes.get_yscale() == "log"
    assert list(axes.lines[0].get_ydata()) == [10, 0.1]


@pytest.mark.parametrize(("top", "ticks"), [(3, {"0.5", "1", "2"}), (3000, {"1", "100"})])
def test_a_log_scale_is_labelled_in_plain_numbers(top, ticks):
    svg = plots.svg(Figure("", "step", "loss", {"JLT": ([0, 1], [0.4, top])}, y_scale="log"))
    assert ticks <= set(re.findall(r">([^<>]*)</text>", svg))
    assert "$" not in svg


def test_an_svg_carries_the_names_as_text_and_asks_for_nothing():
    svg = plots.svg(Figure("Loss.", "step", "loss", LINES))
    for text in ("JLT", "DiT", "step", "loss"):
        assert f">{text}</text>" in svg
    assert svg.startswith("<svg")
    assert svg.endswith("</svg>")
    assert "http" not in svg
    assert plots.INK not in svg


def test_two_figures_on_a_page_share_no_id_and_one_figure_is_always_the_same():
    one, other = (Figure("", "x", "y", {name: line}) for name, line in LINES.items())
    assert plots.svg(one) == plots.svg(one)
    first, second = (set(re.findall(r'\bid="([^"]*)"', plots.svg(figure))) for figure in (one, other))
    assert first
    assert first.isdisjoint(second)
    text = plots.svg(one)
    assert set(re.findall(r'(?:url\(|href=")#([^")]*)', text)) <= first


@settings(deadline=None, max_examples=12)
@given(st.text(st.characters(exclude_categories=["Cs", "Cc"]), min_size=1, max_size=12))
def test_any_name_can_be_drawn(name):
    plots.svg(Figure(name, name, name, {name: ([0], [0])}))


@pytest.mark.parametrize("name", ["$\\frac$", "_hidden", "</svg><script>", "数字", ""])
def test_awkward_names_reach_the_legend(name):
    drawing = plots.draw(Figure("", "x", "y", {name: ([0, 1], [0, 1])}))
    assert [text.get_text().replace("\u200b", "") for text in drawing.legends[0].get_texts()] == [name]
    assert "<script" not in plots.svg(Figure("", "x", "y", {name: ([0, 1], [0, 1])}))


@pytest.mark.parametrize(
    "names", [["x", "eps", "v", "k"], ["largest, λ = 12.2", "median, λ = 0.117", "smallest, λ = 0.00128"]]
)
def test_the_legend_stays_within_the_figure(names):
    drawing = plots.draw(Figure("", "x", "y", {name: ([0, 1], [0, 1]) for name in names}))
    drawing.canvas.draw()
    box = drawing.legends[0].get_window_extent()
    assert 0 <= box.x0 < box.x1 <= drawing.bbox.width


def test_a_png_is_transparent_around_the_axes():
    image = Image.open(io.BytesIO(plots.png(Figure("Loss.", "step", "loss", LINES), dots_per_inch=50)))
    assert image.mode == "RGBA"
    assert image.getpixel((image.width - 1, image.height - 1))[3] == 0


@pytest.mark.parametrize("colour", [plots.INK, *plots.PALETTE])
@pytest.mark.parametrize("page", ["#fdfdfb", "#16171a"])
def test_colours_stand_out_on_light_and_dark_pages(colour, page):
    one, other = sorted((luminance(colour), luminance(page)))
    assert (other + 0.05) / (one + 0.05) >= 3  # WCAG 2.1, 1.4.11: graphical objects


def test_lines_of_unequal_lists_and_unknown_scales_are_refused():
    with pytest.raises(ValueError, match="'JLT' has 2 x values and 1 y values"):
        plots.draw(Figure("", "x", "y", {"JLT": ([1, 2], [1])}))
    with pytest.raises(ValueError, match="did you mean 'log'"):
        plots.draw(Figure("", "x", "y", {}, y_scale="logg"))


@pytest.mark.parametrize("channels", [1, 3])
def test_a_grid_shows_each_image_row_by_row(channels):
    images = torch.randint(0, 256, (5, channels, 64, 64), dtype=torch.uint8)
    sheet = plots.grid(images, columns=3)
    assert sheet.size == (3 * 64 + 2 * 2, 2 * 64 + 2)
    for k, image in enumerate(images):
        left, top = k % 3 * 66, k // 3 * 66
        tile = torch.tensor(list(sheet.crop((left, top, left + 64, top + 64)).convert("RGB").tobytes()))
        torch.testing.assert_close(tile.reshape(64, 64, 3), image.expand(3, 64, 64).permute(1, 2, 0).long())
    assert sheet.getpixel((65, 10))[3] == 0  # a gap lets the page through


def test_tiny_images_are_enlarged_without_smoothing():
    sheet = plots.grid(torch.tensor([[[[0, 255], [255, 0]]]], dtype=torch.uint8), columns=8)
    assert sheet.size == (64, 64)
    assert {colour for _, colour in sheet.getcolors()} == {(0, 0, 0, 255), (255, 255, 255, 255)}


def test_labels_add_height_below_each_row_and_leave_the_images_alone():
    images = torch.full((2, 1, 64, 64), 7, dtype=torch.uint8)
    plain, labelled = plots.grid(images, 1), plots.grid(images, 1, ["four", "nine"])
    assert labelled.width == plain.width
    assert labelled.height > plain.height
    assert labelled.crop((0, 0, 64, 64)).getcolors() == [(64 * 64, (7, 7, 7, 255))]


def test_a_grid_of_nothing_or_with_labels_to_spare_is_refused():
    images = torch.zeros(2, 1, 8, 8, dtype=torch.uint8)
    for arguments, message in [
        ((images[:0], 1), "at least 1 image"),
        ((images, 0), "1 column"),
        ((images, 1, ["a"]), "1 labels for 2 images"),
        ((torch.zeros(1, 4, 8, 8, dtype=torch.uint8), 1), "1 or 3 channels, got 4"),
    ]:
        with pytest.raises(ValueError, match=message):
            plots.grid(*arguments)


def test_without_matplotlib_a_line_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    for draw in (
        lambda: plots.svg(Figure("Loss.", "step", "loss", LINES)),
        lambda: plots.heat_map([[1]], ("a", ["1"]), ("b", ["1"]), ""),
    ):
        with pytest.raises(ValueError, match=r"pip install 'jlt\[plots\]'"):
            draw()
