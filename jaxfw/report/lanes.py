"""`Lanes` -> inline SVG in the page's colours: bars on lanes along one axis, each with its name to be hovered over."""

from html import escape

from jaxfw.report.contents import Lanes
from jaxfw.report.drawing import COLOURS
from jaxfw.report.numerals import write_ticks

WIDTH, LEFT, LANE, BAR, AXIS = 736, 104, 30, 20, 26
LEAST = 0.4  # pixels of the shortest bar
TICKS = 6


def draw_lanes(lanes: Lanes) -> str | None:
    """The drawing; None where there is no bar."""
    from matplotlib.ticker import MaxNLocator

    if not lanes.bars:
        return None
    names = list(dict.fromkeys(bar.lane for bar in lanes.bars))
    kinds = list(dict.fromkeys(bar.kind for bar in lanes.bars))
    end = max(bar.end for bar in lanes.bars) or 1.0
    scale, height = (WIDTH - LEFT - 8) / end, LANE * len(names)
    parts = []
    for row, name in enumerate(names):
        y = row * LANE
        parts.append(f'<text x="{LEFT - 10}" y="{y + 19}" text-anchor="end" fill="var(--muted)">{escape(name)}</text>')
    for bar in lanes.bars:
        x, width = LEFT + bar.begin * scale, max((bar.end - bar.begin) * scale, LEAST)
        y, colour = names.index(bar.lane) * LANE + (LANE - BAR) // 2, kinds.index(bar.kind) % COLOURS
        parts.append(
            f'<rect x="{x:.2f}" y="{y}" width="{width:.2f}" height="{BAR}" style="fill:var(--series-{colour})">'
            f"<title>{escape(bar.name)}</title></rect>"
        )
    places = [place for place in MaxNLocator(TICKS, steps=[1, 2, 5, 10]).tick_values(0, end) if 0 <= place <= end]
    for place, written in zip(places, write_ticks(places), strict=True):
        x = LEFT + place * scale
        parts.append(f'<path d="M{x:.2f} 0V{height}" style="stroke:var(--rule)" stroke-width="0.6" fill="none"/>')
        parts.append(f'<text x="{x:.2f}" y="{height + 18}" text-anchor="middle" fill="var(--muted)">{written}</text>')
    label = escape(f"{lanes.title}: {', '.join(names)} over {lanes.x_label}", quote=True)
    box = f"0 0 {WIDTH} {height + AXIS}"
    return f'<svg viewBox="{box}" role="img" aria-label="{label}" font-size="12">{"".join(parts)}</svg>'


def legend(lanes: Lanes) -> tuple[tuple[str, int, int], ...]:
    """Kinds with the numbers of their colours, as a plot's legend has them."""
    kinds = dict.fromkeys(bar.kind for bar in lanes.bars)
    return tuple((name, i % COLOURS, 0) for i, name in enumerate(kinds))
