"""Pictures from records: line figures as SVG or PNG, and grids of images.

Every picture is made for light and dark pages alike: backgrounds are transparent, lines take a dash pattern each and a
colour-blind-safe palette of middle lightness, and the ink of axes and text is a middle grey, which in SVG becomes the
`currentColor` of the page. Nothing here touches matplotlib's global state (no pyplot).
"""

import hashlib
import io
import math
import re
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jaxtyping import UInt8
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from jlt import files
from jlt.evaluation.records import Figure
from jlt.extras import needed

if TYPE_CHECKING:
    from matplotlib.figure import Figure as Drawing

INK = "#7f7f7f"
# Blue, orange, green, pink, yellow, violet after Okabe and Ito, each at least 3 : 1 against white and against #16171a.
PALETTE = ("#2f86c9", "#d8701f", "#1b9975", "#c264a0", "#9c8418", "#8674dc")
DASHES: tuple[Any, ...] = ("-", (0, (5, 1.5)), (0, (1.5, 1.2)), (0, (6, 1.5, 1.5, 1.5)))
SCALES = {"linear": "linear", "log": "log"}
LEAST_TILE = 64  # pixels: smaller images are enlarged by a whole factor


def draw(figure: Figure, styled: Sequence[str] = ()) -> "Drawing":
    """Draw the lines of a record's figure, in a band of their spread; a log scale leaves out what is not above 0.

    Lines take their colours and dashes in the order of `styled`, those that are not in it after them; the figure's
    level is a thin grey line without a name.
    """
    style = _style()
    from matplotlib.figure import Figure as Drawing
    from matplotlib.lines import Line2D
    from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

    x_scale, y_scale = (files.choose("scale", scale, SCALES) for scale in (figure.x_scale, figure.y_scale))
    for name, (x, y) in figure.lines.items():
        if len(x) != len(y):
            raise ValueError(f"line {name!r} has {len(x)} x values and {len(y)} y values")
        if len(spread := figure.spreads.get(name, y)) != len(y):
            raise ValueError(f"line {name!r} has {len(y)} y values and {len(spread)} spreads")
    with style:
        drawing = Drawing(figsize=(5.4, 3.5), layout="constrained")
        axes = drawing.add_subplot()
        axes.set(xlabel=figure.x_label, ylabel=figure.y_label, xscale=x_scale, yscale=y_scale)
        handles, order = [], list(dict.fromkeys([*styled, *figure.lines]))
        for name, (x, y) in figure.lines.items():
            k = order.index(name)
            shown = [
                (a, b, spread)
                for a, b, spread in zip(x, y, figure.spreads.get(name, [0] * len(y)), strict=True)
                if _visible(a, x_scale) and _visible(b, y_scale)
            ]
            xs, ys, spreads = zip(*shown, strict=True) if shown else ((), (), ())
            line = Line2D(xs, ys, color=PALETTE[k % len(PALETTE)], linestyle=DASHES[k % len(DASHES)])
            if len(shown) == 1:
                line.set_marker("o")  # a line of one point would be invisible
            handles.append(line)
            axes.add_line(line)
            if any(spreads):
                below = [b - spread if _visible(b - spread, y_scale) else min(ys) for _, b, spread in shown]
                above = [b + spread for _, b, spread in shown]
                axes.fill_between(xs, below, above, color=line.get_color(), alpha=0.18, linewidth=0)
        if figure.level is not None and _visible(figure.level, y_scale):
            axes.axhline(figure.level, color=INK, linewidth=0.8, zorder=1)
        axes.autoscale_view()
        for axis, scale in ((axes.xaxis, x_scale), (axes.yaxis, y_scale)):
            if scale == "linear":
                axis.set_major_locator(MaxNLocator(6, steps=[1, 2, 2.5, 5, 10]))
            else:
                low, high = axis.get_view_interval()
                axis.set_major_locator(LogLocator(subs=(1, 2, 5) if high < 100 * low else (1,)))
                axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
                axis.set_minor_formatter(NullFormatter())
        if handles:
            names = [name.replace("_", "\u200b_", 1) if name.startswith("_") else name for name in figure.lines]
            widest = 45 + 6 * max(map(len, names))  # points that a line's sample and name take, of 380 in all
            columns = max(1, min(len(names), 4, 380 // widest))
            drawing.legend(handles, names, loc="outside upper left", ncols=columns)
    return drawing


def heat_map(
    table: Sequence[Sequence[float]],
    rows: tuple[str, Sequence[str]],
    columns: tuple[str, Sequence[str]],
    title: str,
    lower: bool = True,
) -> bytes:
    """Draw a table of numbers by two settings, each its name and its values, as a PNG file.

    Lighter is better, which `lower` says is lower; the best is outlined. Colours end at the worst tenth.
    """
    style = _style(**{"axes.grid": False})
    from matplotlib.figure import Figure as Drawing
    from matplotlib.patches import Rectangle

    sign = 1 if lower else -1
    flat = sorted(sign * value for row in table for value in row)
    best, worst = flat[0], flat[int(0.9 * (len(flat) - 1))]
    with style:
        size = (1.6 + 0.8 * len(columns[1]), 1.3 + 0.5 * len(rows[1]))
        drawing = Drawing(figsize=(max(size[0], 4.2), size[1]), layout="constrained")
        axes = drawing.add_subplot()
        shades = [[sign * value for value in row] for row in table]
        axes.imshow(shades, cmap="viridis_r", vmin=best, vmax=max(worst, best + 1e-12), aspect="auto")
        axes.set(xlabel=columns[0], ylabel=rows[0], title=title)
        axes.set_xticks(range(len(columns[1])), columns[1])
        axes.set_yticks(range(len(rows[1])), rows[1])
        for i, row in enumerate(table):
            for k, value in enumerate(row):
                light = sign * value < (best + worst) / 2
                axes.text(k, i, f"{value:.3g}", ha="center", va="center", color="#16171a" if light else "#fdfdfb")
                if sign * value == best:
                    axes.add_patch(Rectangle((k - 0.46, i - 0.46), 0.92, 0.92, fill=False, edgecolor="#d8701f", lw=2))
        buffer = io.BytesIO()
        drawing.savefig(buffer, format="png", dpi=160, transparent=True)
    return buffer.getvalue()


def svg(figure: Figure) -> str:
    """Return a figure as one `<svg>` element to stand in an HTML page: text stays text, ids are the figure's own."""
    text = _save(figure, format="svg", metadata={"Date": None}).decode()
    text = text[text.index("<svg") :].strip()
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r' xmlns(:\w+)?="[^"]*"', "", text)  # implied in HTML
    text = text.replace(INK, "currentColor")
    prefix = f"f{hashlib.sha256(text.encode()).hexdigest()[:8]}-"
    return re.sub(r'(\bid="|url\(#|href="#)', rf"\g<1>{prefix}", text)


def png(figure: Figure, dots_per_inch: int = 160, styled: Sequence[str] = ()) -> bytes:
    """Return a figure as a PNG file with a transparent background."""
    return _save(figure, styled, format="png", dpi=dots_per_inch)


def grid(images: UInt8[Tensor, "n c h w"], columns: int, labels: Sequence[str] | None = None) -> Image.Image:
    """Lay out images of 1 or 3 channels row by row, `columns` to a row, with `labels` below them if given.

    Images smaller than 64 pixels are enlarged by a whole factor, without smoothing. Gaps are transparent.
    """
    count, channels, height, width = images.shape
    if count < 1 or columns < 1:
        raise ValueError(f"a grid needs at least 1 image and 1 column, got {count} and {columns}")
    if channels not in (1, 3):
        raise ValueError(f"a grid shows images of 1 or 3 channels, got {channels}")
    if labels is not None and len(labels) != count:
        raise ValueError(f"{len(labels)} labels for {count} images")
    columns = min(columns, count)
    factor = math.ceil(LEAST_TILE / max(height, width))
    height, width = height * factor, width * factor
    gap = max(2, width // 32)
    font_size = max(10, width // 6)
    font = ImageFont.load_default(font_size)
    below = 0 if labels is None else math.ceil(1.5 * font_size)
    rows = math.ceil(count / columns)
    size = (columns * (width + gap) - gap, rows * (height + below + gap) - gap)
    sheet = Image.new("RGBA", size, (0, 0, 0, 0))
    pen = ImageDraw.Draw(sheet)
    for k, pixels in enumerate(images.permute(0, 2, 3, 1).cpu().numpy()):
        left, top = k % columns * (width + gap), k // columns * (height + below + gap)
        tile = Image.fromarray(pixels[..., 0] if channels == 1 else pixels)
        sheet.paste(tile.resize((width, height), Image.Resampling.NEAREST), (left, top))
        if labels is not None:
            pen.text((left + width / 2, top + height + below / 2), labels[k], INK, font, anchor="mm")
    return sheet


def _visible(value: float, scale: str) -> bool:
    return math.isfinite(value) and (scale == "linear" or value > 0)


def _save(figure: Figure, styled: Sequence[str] = (), **options: Any) -> bytes:
    buffer = io.BytesIO()
    with _style(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing")  # a page's own fonts may well have it
        draw(figure, styled).savefig(buffer, transparent=True, **options)
    return buffer.getvalue()


def _style(**more: Any) -> Any:
    """Return the context that everything is drawn in."""
    with needed("figures", "plots"):
        from matplotlib import rc_context
    style: dict[Any, Any] = {
        "axes.edgecolor": INK,
        "axes.labelcolor": INK,
        "axes.linewidth": 0.6,
        "axes.spines.right": False,
        "axes.spines.top": False,
        "axes.grid": True,
        "axes.axisbelow": True,
        "font.family": "sans-serif",
        "font.sans-serif": ["DejaVu Sans"],  # it comes with matplotlib
        "font.size": 10,
        "grid.alpha": 0.25,
        "grid.color": INK,
        "grid.linewidth": 0.6,
        "legend.frameon": False,
        "legend.handlelength": 2.2,
        "legend.borderaxespad": 0,
        "legend.labelcolor": INK,
        "lines.linewidth": 1.6,
        "lines.solid_capstyle": "round",
        "svg.fonttype": "none",
        "svg.hashsalt": "jlt",
        "text.color": INK,
        "text.parse_math": False,  # a name may hold any character
        "xtick.color": INK,
        "ytick.color": INK,
        "xtick.major.width": 0.6,
        "ytick.major.width": 0.6,
        "ytick.minor.width": 0.4,
        "xtick.minor.width": 0.4,
    }
    return rc_context(style | more)


def panels(figures: Sequence[Figure], columns: int | None = None) -> Image.Image:
    """Draw figures beside each other, for a page; a name's line looks the same in all of them."""
    styled = [name for figure in figures for name in figure.lines]
    return beside([Image.open(io.BytesIO(png(figure, 110, styled))) for figure in figures], columns)


def save(path: Path, image: Image.Image) -> None:
    """Write a PNG file, whole or not at all."""
    with files.replaced(path) as temporary:
        image.save(temporary, format="PNG")


def beside(pictures: Sequence[Image.Image], columns: int | None = None, gap: int = 24) -> Image.Image:
    """Return pictures in a row, or in rows of `columns`, with transparent gaps, their tops aligned."""
    rows = [pictures[i : i + (columns or len(pictures))] for i in range(0, len(pictures), columns or len(pictures))]
    width = max(sum(picture.width + gap for picture in row) for row in rows) - gap
    sheet = Image.new("RGBA", (width, sum(max(picture.height for picture in row) + gap for row in rows) - gap))
    top = 0
    for row in rows:
        left = 0
        for picture in row:
            sheet.paste(picture, (left, top))
            left += picture.width + gap
        top += max(picture.height for picture in row) + gap
    return sheet
