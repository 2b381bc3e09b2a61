"""`HeatMap` -> inline SVG in the page's colours: a strip for each row, darker where its values are larger.

A value is rounded to one of STEPS + 1 shades of one colour. The shade of step k is drawn over that of step k - 1, each
with the opacity that adds up to its own: all runs of a shade are one path, so that neighbours leave no seam and columns
narrower than a pixel mix as they should. The cells are drawn once; a wide and a narrow page stretch them.
"""

from dataclasses import dataclass
from html import escape

import numpy as np

from jaxfw.core.shapes import Bool, Float
from jaxfw.report.contents import HeatMap
from jaxfw.report.numerals import write_ticks

STEPS = 5
SHADES = (0.09, 0.24, 0.41, 0.59, 0.78, 1.0)  # opacity of step 0 (a value, and it is zero) .. STEPS
COLOUR = "var(--series-0)"
BESIDE = 26  # letters of a name that fit left of its strip on a wide page; a longer one stands above it
LETTER, RIGHT, AXIS, STRIP, OVER = 7.0, 10, 44, 16, 3  # pixels: a letter, beside, below, a strip, a rule beyond it


@dataclass(frozen=True)
class HeatDrawing:
    """One heat map as the template needs it; `scale` is the row of its shades, for the legend."""

    wide: str
    narrow: str
    scale: str


@dataclass(frozen=True)
class _Shape:
    """Where the strips lie: from `left` on, one every `pitch` pixels; names stand beside or above them."""

    width: int
    left: int
    pitch: int
    ticks: int

    @property
    def is_above(self) -> bool:
        """Whether names stand above their strips."""
        return self.left == 0

    @property
    def top(self) -> int:
        """Where the first strip begins."""
        return self.pitch - STRIP if self.is_above else 2 * OVER


def draw_heat_map(heat: HeatMap, *, prefix: str) -> HeatDrawing | None:
    """Draw for a wide and a narrow page; None when there is no value to show. `prefix` starts the id of the cells."""
    values = np.array(heat.values, dtype=np.float64)  # None becomes NaN
    if not np.isfinite(values).any():
        return None
    longest = max(map(len, heat.rows))
    beside = _Shape(736, round(longest * LETTER) + 14, STRIP + 4, ticks=8)
    wide = beside if longest <= BESIDE else _Shape(736, 0, 2 * STRIP + 8, ticks=8)
    narrow = _Shape(372, 0, 2 * STRIP + 8, ticks=5)
    cells = f"{prefix}-cells"
    paths = f'<defs><g id="{cells}" fill="none" style="stroke:{COLOUR}">{_paths(values)}</g></defs>'
    drawings = (_svg(heat, values.shape[1], shape, cells, inside) for shape, inside in ((wide, paths), (narrow, "")))
    return HeatDrawing(*drawings, scale=_scale())


def _paths(values: Float[np.ndarray, "N T"]) -> str:
    """One path a step, of the runs of columns that are at least as dark; a unit is a column, and a row."""
    steps = np.where(np.isfinite(values), np.round(np.nan_to_num(values) * STEPS), -1)
    parts, before = [], 0.0
    for step, shade in enumerate(SHADES):
        added, before = 1 - (1 - shade) / (1 - before), shade
        runs = "".join(_runs(row >= step, y) for y, row in enumerate(steps))
        if runs:
            parts.append(f'<path d="{runs}" stroke-opacity="{added:.3f}"/>')
    return "".join(parts)


def _runs(is_in: Bool[np.ndarray, "T"], y: int) -> str:
    """Horizontal strokes over the runs of true columns: `M3 0h2m4 0h1`."""
    edges = np.flatnonzero(np.diff(is_in.astype(np.int8), prepend=0, append=0)).tolist()
    drawn, at = "", None
    for begin, end in zip(edges[::2], edges[1::2]):
        drawn += (f"M{begin} {y}" if at is None else f"m{begin - at} 0") + f"h{end - begin}"
        at = end
    return drawn


def _svg(heat: HeatMap, columns: int, shape: _Shape, cells: str, inside: str) -> str:
    scale = (shape.width - shape.left - RIGHT) / columns
    bottom = shape.top + (len(heat.rows) - 1) * shape.pitch + STRIP
    parts = [inside]
    for row, name in enumerate(heat.rows):
        x, y, anchor = shape.left - 10, shape.top + row * shape.pitch + STRIP - 4, "end"
        if shape.is_above:
            x, y, anchor = 0, y - STRIP - 2, "start"
        parts.append(f'<text x="{x}" y="{y}" text-anchor="{anchor}" fill="var(--muted)">{escape(name)}</text>')
    parts.append(
        f'<use href="#{cells}" transform="translate({shape.left} {shape.top + STRIP // 2}) '
        f'scale({scale:.5g} {shape.pitch})" stroke-width="{STRIP / shape.pitch:.4g}"/>'
    )
    # A rule goes through all strips, but not through names above them.
    tops = range(shape.top, bottom, shape.pitch) if shape.is_above else [shape.top]
    length = (STRIP if shape.is_above else bottom - shape.top) + 2 * OVER
    xs = [int(shape.left + scale * at) + 0.5 for at in heat.boundaries]  # the middle of a pixel: sharp
    rules = "".join(f"M{x} {y - OVER}v{length}" for x in xs for y in tops)
    if rules:  # a rule of the page's colour below parts it from dark cells
        for colour, width in (("page", 2.6), ("ink", 0.8)):
            parts.append(f'<path d="{rules}" fill="none" style="stroke:var(--{colour})" stroke-width="{width}"/>')
    parts += _axis(heat.x_label, columns, shape, scale, bottom)
    label = escape(f"{heat.title}: {', '.join(heat.rows)} over {heat.x_label}", quote=True)
    box = f"0 0 {shape.width} {bottom + AXIS}"
    return f'<svg viewBox="{box}" role="img" aria-label="{label}" font-size="12">{"".join(parts)}</svg>'


def _axis(x_label: str, columns: int, shape: _Shape, scale: float, bottom: int) -> list[str]:
    """Ticks at the middle of a few columns, their numbers, and the name of the axis."""
    from matplotlib.ticker import MaxNLocator

    found = MaxNLocator(shape.ticks, steps=[1, 2, 5, 10], integer=True).tick_values(0, max(columns - 1, 1))
    places = [int(place) for place in found if 0 <= place < columns and place == int(place)]
    xs = [shape.left + (place + 0.5) * scale for place in places]
    ticks = "".join(f"M{x:.2f} {bottom + OVER}v4" for x in xs)
    parts = [f'<path d="{ticks}" fill="none" style="stroke:var(--muted)" stroke-width="0.8"/>']
    for x, written in zip(xs, write_ticks(places), strict=True):
        anchor = "start" if x < 8 else "middle"
        x = 0 if x < 8 else x
        parts.append(f'<text x="{x:.2f}" y="{bottom + 19}" text-anchor="{anchor}" fill="var(--muted)">{written}</text>')
    middle = shape.left + scale * columns / 2
    name = f'<text x="{middle:.2f}" y="{bottom + 37}" text-anchor="middle" fill="var(--muted)">{escape(x_label)}'
    return [*parts, f"{name}</text>"]


def _scale() -> str:
    boxes = "".join(
        f'<rect x="{20 * step}" width="20" height="12" fill-opacity="{shade}"/>' for step, shade in enumerate(SHADES)
    )
    return f'<svg viewBox="0 0 {20 * len(SHADES)} 12" aria-hidden="true" style="fill:{COLOUR}">{boxes}</svg>'
