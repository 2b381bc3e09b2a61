"""Plot -> inline SVG that takes colours and fonts from the page, so that one drawing serves light and dark.

matplotlib draws with marker colours (`INK`, `SERIES`); afterwards each of them becomes a CSS variable. Text
stays text and is measured in DejaVu Sans, which comes with matplotlib and is wider than the fonts that
browsers put in its place: labels have room there, and every machine writes the same bytes. No pyplot.
"""

import io
import itertools
import math
import re
import textwrap
import warnings
import xml.etree.ElementTree as ET
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from jaxfw.report.contents import Curve, Plot
from jaxfw.report.numerals import write_ticks

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.text import Text as MatplotlibText

COLOURS = 6  # --series-0 .. --series-5 in page.html.j2; from the seventh curve on they come again, dashed
DASHES = ("solid", (0, (5, 2)), (0, (1.5, 1.5)))
SERIES = tuple(f"#07010{index}" for index in range(COLOURS))
INK = {"muted": "#070202", "rule": "#070203"}
CSS = {colour: f"var(--{name})" for name, colour in INK.items()} | {
    colour: f"var(--series-{index})" for index, colour in enumerate(SERIES)
}
SVG = "{http://www.w3.org/2000/svg}"
HREF = "{http://www.w3.org/1999/xlink}href"
MARKED = 24  # a curve with at most so many points shows each of them
POINTS = 2000  # longer curves keep the lowest and highest point of each stretch: the same picture, a small page
DIRECT = 6  # so many curves carry their name at their end, more get a legend
LABEL = 24  # letters of a name that fit beside the axes
RC = {
    "svg.hashsalt": "jaxfw",
    "svg.fonttype": "none",
    "text.parse_math": False,
    "font.family": ["DejaVu Sans"],
    "font.size": 12,
    "axes.unicode_minus": True,
    "text.color": INK["muted"],
    "axes.labelcolor": INK["muted"],
    "xtick.color": INK["muted"],
    "ytick.color": INK["muted"],
}


@dataclass(frozen=True)
class Shape:
    """A canvas in CSS pixels at which one unit of the drawing is one pixel of the page."""

    name: str
    width: int
    height: int
    ticks: int
    direct: bool


WIDE = Shape("wide", 736, 340, ticks=6, direct=True)
NARROW = Shape("narrow", 372, 270, ticks=4, direct=False)


@dataclass(frozen=True)
class Drawing:
    """One plot as the template needs it; `lost` says in words which values the plot could not show."""

    wide: str
    narrow: str
    legend: tuple[tuple[str, int, int], ...]  # name, number of the colour, number of the dash
    is_direct: bool
    lost: str


@dataclass(frozen=True)
class _Line:
    """A curve as float64 with NaN for whatever cannot be drawn; `given` and `lost` count its values."""

    name: str
    x: np.ndarray
    y: np.ndarray
    low: np.ndarray | None
    high: np.ndarray | None
    given: int
    lost: int

    @property
    def drawn(self) -> np.ndarray:
        return np.isfinite(self.x) & np.isfinite(self.y)


def draw(plot: Plot, *, prefix: str) -> Drawing | None:
    """Draw a plot for a wide and a narrow page; None when it has no point to show.

    `prefix` starts every id inside the SVG, because ids are shared by the whole page.
    """
    lines = [_prepare(curve, plot) for curve in plot.curves]
    if not any(line.drawn.any() for line in lines):
        return None
    has_room = 1 < len(lines) <= DIRECT and all(len(line.name) <= LABEL for line in lines)
    is_direct = has_room and _end_at_the_right(lines, plot.log_x)
    legend = tuple((line.name, i % COLOURS, i // COLOURS % len(DASHES)) for i, line in enumerate(lines))
    wide, narrow = (_svg(plot, lines, shape, is_direct, f"{prefix}-{shape.name}") for shape in (WIDE, NARROW))
    losses = [f"{line.lost} of {line.given} values of {line.name}" for line in lines if line.lost]
    reason = "missing, not finite, or not positive on a log axis"
    lost = f"Not drawn: {', '.join(losses)} ({reason})." if losses else ""
    return Drawing(wide, narrow, legend if len(lines) > 1 else (), is_direct, lost)


def _prepare(curve: Curve, plot: Plot) -> _Line:
    x, y = _floats(curve.x, plot.log_x), _floats(curve.y, plot.log_y)
    low = None if curve.low is None else _floats(curve.low, plot.log_y)
    high = None if curve.high is None else _floats(curve.high, plot.log_y)
    lost = int(np.isnan(x + y).sum())
    keep = _outline(y)
    bands = (None if band is None else band[keep] for band in (low, high))
    return _Line(_clean(curve.name), x[keep], y[keep], *bands, given=len(x), lost=lost)


def _floats(values: Any, log: bool) -> np.ndarray:
    array = np.array(values, dtype=np.float64)  # None becomes NaN
    with np.errstate(invalid="ignore"):
        array[~(np.abs(array) < 1e300) | ((array <= 0) & log)] = np.nan
    return array


def _outline(y: np.ndarray) -> np.ndarray:
    """Indices of the lowest and the highest point of each of POINTS / 2 stretches, with both ends."""
    if len(y) <= POINTS:
        return np.arange(len(y))
    keep = [0, len(y) - 1]
    for stretch in np.array_split(np.arange(len(y)), POINTS // 2):
        if np.isfinite(y[stretch]).any():
            keep += [stretch[np.nanargmin(y[stretch])], stretch[np.nanargmax(y[stretch])]]
        else:
            keep.append(stretch[0])  # a gap stays a gap
    return np.unique(keep)


def _end_at_the_right(lines: list[_Line], log_x: bool) -> bool:
    """Whether every curve ends in the last seventh of the x axis, near enough to a name in the margin."""
    xs = [line.x[line.drawn] for line in lines if line.drawn.any()]
    xs = [np.log10(x) for x in xs] if log_x else xs
    low, high = np.concatenate(xs).min(), np.concatenate(xs).max()
    return all(x[-1] >= high - (high - low) / 7 for x in xs)


def _svg(plot: Plot, lines: list[_Line], shape: Shape, is_direct: bool, prefix: str) -> str:
    from matplotlib import style
    from matplotlib.figure import Figure

    buffer = io.StringIO()
    with warnings.catch_warnings(), style.context(["default", RC]):
        warnings.simplefilter("ignore")  # a letter that DejaVu lacks: the browser has a font for it
        figure = Figure(figsize=(shape.width / 72, shape.height / 72), layout="constrained")
        axes = figure.subplots()
        title = _frame(axes, plot, lines, shape)
        for index, line in enumerate(lines):
            _draw_line(axes, line, SERIES[index % COLOURS], DASHES[index // COLOURS % len(DASHES)])
        if is_direct and shape.direct:
            _name_ends(axes, lines, shape)
        _to_the_edge(axes, title)
        nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
        figure.savefig(buffer, format="svg", metadata=nothing, transparent=True)
    curves = "; ".join(line.name for line in lines)
    spoken = f"{plot.title}: {plot.y_label} over {plot.x_label}. Curves: {curves}"
    return _inline(buffer.getvalue(), prefix, spoken)


def _frame(axes: "Axes", plot: Plot, lines: list[_Line], shape: Shape) -> "MatplotlibText":
    """Limits, ticks, labels and the horizontal grid; returns the y label, which stands above the axes."""
    columns = shape.width // 8
    title = axes.set_title(textwrap.fill(_clean(plot.y_label), columns), loc="left", fontsize=12, pad=9)
    axes.set_xlabel(textwrap.fill(_clean(plot.x_label), columns), labelpad=5)
    xs = [line.x[line.drawn] for line in lines]
    ys = [part[line.drawn] for line in lines for part in (line.y, line.low, line.high) if part is not None]
    sides = (("x", axes.xaxis, xs, plot.log_x, 0.012), ("y", axes.yaxis, ys, plot.log_y, 0.06))
    for letter, axis, values, log, margin in sides:
        low, high = _limits(np.concatenate(values), log, margin)
        axes.set(**{f"{letter}scale": "log" if log else "linear", f"{letter}lim": (low, high)})
        places = _ticks(low, high, log, shape.ticks)
        names = [write_ticks([place])[0] for place in places] if log else write_ticks(places)
        axis.set_ticks(places, labels=names)
        axis.set_ticks([], minor=True)
    axes.tick_params(axis="x", length=3, width=0.8, color=INK["rule"], pad=4)
    axes.tick_params(axis="y", length=0, pad=6)
    axes.grid(axis="y", color=INK["rule"], linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["left", "right", "top"]].set_visible(False)
    axes.spines["bottom"].set(color=INK["muted"], linewidth=0.8)
    return title


def _limits(values: np.ndarray, log: bool, margin: float) -> tuple[float, float]:
    low, high = float(np.nanmin(values)), float(np.nanmax(values))
    if log:
        low, high = math.log10(low), math.log10(high)
    pad = (high - low) * margin or (0.3 if log else abs(low) * 0.1 or 1.0)
    return (10 ** (low - pad), 10 ** (high + pad)) if log else (low - pad, high + pad)


def _ticks(low: float, high: float, log: bool, count: int) -> list[float]:
    """About so many round places between the limits."""
    from matplotlib.ticker import MaxNLocator

    places: list[float] = []
    if log and high / low >= 10:
        powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
        places = [factor * 10.0**power for power in powers for factor in (1, 2, 5)]
        if sum(low <= place <= high for place in places) > count + 2:
            places = [10.0**power for power in powers[:: math.ceil(len(powers) / count)]]
    if sum(low <= place <= high for place in places) < 2:
        found = MaxNLocator(count, steps=[1, 2, 5, 10]).tick_values(low, high)
        places = [float(f"{place:.10g}") for place in found]
    return [place for place in places if low <= place <= high]


def _draw_line(axes: "Axes", line: _Line, colour: str, dash: Any):
    drawn = line.drawn
    few = drawn.sum() <= MARKED
    # A point between two gaps has no line through it, so it is always marked.
    alone = drawn & ~np.append(drawn[1:], False) & ~np.insert(drawn[:-1], 0, False)
    marked = np.flatnonzero(drawn if few else alone).tolist()
    axes.plot(
        line.x,
        line.y,
        color=colour,
        linestyle=dash,
        linewidth=1.6 if few else 1.3,
        marker="o" if marked else None,
        markersize=4.5,
        markeredgewidth=0,
        markevery=marked or None,
        solid_joinstyle="round",
        clip_on=not few,
    )
    if line.low is None or line.high is None:
        return
    axes.fill_between(line.x, line.low, line.high, where=drawn, color=colour, alpha=0.16, linewidth=0)
    axes.vlines(line.x[alone], line.low[alone], line.high[alone], color=colour, linewidth=1.3, alpha=0.6)


def _name_ends(axes: "Axes", lines: list[_Line], shape: Shape):
    """Write each name right of the axes where its curve ends, pushed apart where names would touch."""
    to_axes = axes.transScale + axes.transLimits
    ends = []
    for index, line in enumerate(lines):
        if line.drawn.any():
            last = np.flatnonzero(line.drawn)[-1]
            ends.append([float(to_axes.transform((line.x[last], line.y[last]))[1]), index])
    ends.sort()
    step = 16 / (shape.height * 0.78)
    for below, above in itertools.pairwise(ends):
        above[0] = max(above[0], below[0] + step)
    ceiling = 1.0
    for end in reversed(ends):
        end[0] = min(end[0], ceiling)
        ceiling = end[0] - step
    for height, index in ends:
        axes.annotate(
            lines[index].name,
            (1, height),
            xycoords="axes fraction",
            xytext=(8, 0),
            textcoords="offset points",
            va="center",
            color=SERIES[index % COLOURS],
            annotation_clip=False,
        )


def _to_the_edge(axes: "Axes", title: "MatplotlibText"):
    """Start the y label where the tick labels start."""
    figure = axes.get_figure(root=True)
    assert figure is not None
    figure.draw_without_rendering()
    figure.set_layout_engine("none")  # the layout is found; it would make room for the title a second time
    box = axes.get_position()
    left = axes.yaxis.get_tightbbox()
    edge = left.x0 / figure.bbox.width if left is not None else box.x0
    title.set_x((edge - box.x0) / box.width)


def _clean(text: str) -> str:
    """Text that XML can carry: no control characters, no lone surrogates, on one line."""
    return re.sub(r"[\x00-\x1f\x7f-\x9f\ud800-\udfff\ufffe\uffff]+", " ", str(text)).strip()


def _inline(svg: str, prefix: str, label: str) -> str:
    """Make matplotlib's document a part of a page: without its style, with own ids and the page's colours."""
    root = ET.fromstring(svg)
    for parent in root.iter():
        for child in [child for child in parent if child.tag in (f"{SVG}metadata", f"{SVG}style")]:
            parent.remove(child)  # matplotlib's style names every element of the page
    used = set(re.findall(r"(?:url\(|href=\")#([^)\"]+)", svg))
    for element in root.iter():
        element.tag = element.tag.removeprefix(SVG)
        element.tail = None
        if element.tag != "text":
            element.text = None
        element.attrib = dict(_attributes(element.attrib, prefix, used))
    for name in ("width", "height", "version"):
        root.attrib.pop(name, None)
    root.attrib |= {"role": "img", "aria-label": _clean(label)}
    return ET.tostring(root, encoding="unicode")


def _attributes(attributes: dict[str, str], prefix: str, used: set[str]):
    for name, value in attributes.items():
        if name == "id":
            if value in used:
                yield "id", f"{prefix}-{value}"
        elif name == HREF:
            yield "href", f"#{prefix}-{value[1:]}"
        elif name == "clip-path":
            yield name, value.replace("#", f"#{prefix}-")
        elif name == "style":
            for colour, variable in CSS.items():
                value = value.replace(colour, variable)
            yield name, re.sub(r"font-family:[^;]*;? ?", "", value)
        elif name in ("d", "x", "y"):
            short = re.sub(r"-?\d+\.\d+", lambda number: f"{round(float(number[0]), 2):g}", value)
            yield name, " ".join(short.split())
        elif not (name == "transform" and value.startswith("rotate(-0 ")):
            yield name, value
