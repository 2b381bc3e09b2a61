"""Heat maps, read back from their SVG: the shade of every cell, rules, ticks, names; and what is refused."""

import re

import numpy as np
import pytest

from jaxfw.core.errors import InputError
from jaxfw.report import HeatMap, Plot, write_report
from jaxfw.report.contents import Curve
from jaxfw.report.heatmap import SHADES, STEPS, HeatDrawing, draw_heat_map
from tests.test_report import EVIL, Element, parse

NAN = float("nan")


def drawn(values, rows=None, **options) -> HeatDrawing:
    rows = rows or tuple(f"row {i}" for i in range(len(values)))
    made = draw_heat_map(HeatMap("Kept", rows, values, "position", **options), prefix="s1")
    assert made is not None
    return made


def opacities(made: HeatDrawing, shape) -> np.ndarray:
    """What a browser paints over the page in each cell: paths over one another."""
    seen = np.zeros(shape)
    for path in parse(made.wide).all("g")[0].all("path"):
        opacity, cells = float(path.attributes["stroke-opacity"]), np.zeros(shape, bool)
        at = y = 0
        for letter, first, second in re.findall(r"([Mmh])(\d+)(?: (\d+))?", path.attributes["d"]):
            if letter == "h":
                assert not cells[y, at : at + int(first)].any(), "a cell is painted twice"
                cells[y, at : at + int(first)] = True
                at += int(first)
            else:
                at, y = (int(first), int(second)) if letter == "M" else (at + int(first), y)
        seen = np.where(cells, 1 - (1 - seen) * (1 - opacity), seen)
    return seen


def texts(svg: str) -> list[str]:
    return [text.text for text in parse(svg).all("text")]


def rules(svg: str) -> list[tuple[float, float, float]]:
    """(x, top, height) of what is drawn in the page's ink."""
    (path,) = [p for p in parse(svg).all("path") if p.attributes.get("style") == "stroke:var(--ink)"]
    found = re.findall(r"M([\d.]+) ([\d.-]+)v([\d.]+)", path.attributes["d"])
    return [(float(x), float(y), float(height)) for x, y, height in found]


def test_every_cell_has_the_shade_of_its_value():
    rng = np.random.default_rng(0)
    values = rng.uniform(0, 1, (4, 60))
    values[1] = np.repeat([0, 0.5, 1], 20)
    values[2, 10:20] = NAN
    expected = np.where(np.isnan(values), 0, np.array(SHADES)[np.round(np.nan_to_num(values) * STEPS).astype(int)])
    np.testing.assert_allclose(opacities(drawn(values), values.shape), expected, atol=2e-3)
    assert np.all(np.diff(SHADES) > 0) and SHADES[0] > 0, "0 is seen, unlike no value"


def test_none_nan_and_numpy_or_python_numbers_mean_the_same():
    plain = drawn([[0, None, 1], [0.5, NAN, 0.25]])
    assert plain == drawn(np.array([[0, NAN, 1], [0.5, NAN, 0.25]], np.float32))
    assert opacities(plain, (2, 3))[:, 1].tolist() == [0, 0]
    drawn(np.full((1, 3), 1 + 1e-7))  # a mean of ones, in float32


def test_names_ticks_and_the_axis_stand_in_both_drawings():
    made = drawn(np.zeros((3, 690)), ("snapkv", "a<b", "h2o"))
    for svg in (made.wide, made.narrow):
        assert texts(svg)[:3] == ["snapkv", "a<b", "h2o"] and texts(svg)[-1] == "position"
        ticks = [int(text) for text in texts(svg)[3:-1]]
        assert 3 <= len(ticks) <= 9 and ticks[0] == 0 and ticks[-1] < 690
    assert texts(drawn([[1]]).wide) == ["row 0", "0", "position"]
    assert texts(drawn([[0, 1, 0]]).wide) == ["row 0", "0", "1", "2", "position"]


def test_long_names_stand_above_their_strips():
    short, long = (parse(drawn([[1, 0], [1, 0]], (name, "b")).wide) for name in ("a" * 26, "a" * 27))
    anchors = [[text.attributes["text-anchor"] for text in root.all("text")[:2]] for root in (short, long)]
    assert anchors == [["end"] * 2, ["start"] * 2]
    left = float(short.all("text")[0].attributes["x"])
    assert 26 * 6.5 < left < 240, "a name has room, and strips have most of the width"


def test_rules_stand_where_units_begin_over_the_whole_height():
    made = drawn(np.zeros((3, 100)), boundaries=(25, 50))
    start, width = 7 * 5 + 14, 736 - (7 * 5 + 14) - 10
    found = rules(made.wide)
    np.testing.assert_allclose([x for x, _, _ in found], [start + width * share for share in (0.25, 0.5)], atol=0.5)
    assert {height for _, _, height in found} == {2 * 20 + 16 + 6}
    assert len(rules(made.narrow)) == 2 * 3, "in parts, which leave the names above the strips alone"
    assert "var(--ink)" not in drawn(np.zeros((3, 100))).wide


def test_colours_are_the_pages_and_the_cells_are_drawn_once():
    made = drawn(np.zeros((2, 9)), boundaries=(3,))
    for svg in (made.wide, made.narrow, made.scale):
        assert not re.findall(r"#[0-9a-f]{3,6}\b|rgb", svg.replace("#s1-cells", "")) and "var(--" in svg
    assert [use.attributes["href"] for svg in (made.wide, made.narrow) for use in parse(svg).all("use")] == [
        "#s1-cells"
    ] * 2
    assert not parse(made.narrow).all("g")


def test_realistic_and_worst_maps_stay_small():
    rng = np.random.default_rng(0)
    kept = [rng.binomial(32, share, 700) / 32 for share in np.linspace(0.05, 0.9, 15)]
    for values, most in ((kept, 60_000), (rng.uniform(0, 1, (15, 700)), 150_000)):
        made = drawn(values, boundaries=tuple(range(0, 700, 50)))
        assert len(made.wide) + len(made.narrow) < most


def test_on_a_page(tmp_path):
    heat = HeatMap(
        EVIL, (EVIL, "b"), [[0, 1], [1, 0]], EVIL, (1,), ends=("kept in 0 %", "100 % of layers and heads"), note=EVIL
    )
    empty = HeatMap("none", (), (), "x")
    sections = [heat, Plot("p", (Curve("c", [1, 2], [1, 2]),), "x", "y"), heat, empty]
    root = parse(write_report(tmp_path / "report.html", title="t", sections=sections).read_text("utf-8"))
    assert [span.text for span in root.all("span", "label")] == [f"Figure {i}" for i in (1, 2, 3, 4)]
    assert not root.all("script") and EVIL in [text.text for text in root.all("text")]
    (first, _) = root.all("p", "scale")
    assert first.text == "kept in 0 %100 % of layers and heads" and len(first.all("rect")) == STEPS + 1
    drawings = [svg for svg in root.all("svg") if svg.attributes.get("role") == "img"]
    assert EVIL in drawings[0].attributes["aria-label"]
    ids = [e.attributes["id"] for e in root.everything() if "id" in e.attributes]
    wanted = {e.attributes["href"][1:] for e in root.everything() if e.attributes.get("href", "").startswith("#")}
    assert len(ids) == len(set(ids)) and {"s1-cells", "s3-cells"} <= wanted <= set(ids)
    assert [p.text for p in root.all("p", "empty")] == ["No values to draw."]
    assert [_class(e) for e in root.all("p", "note")] == ["note", "note"]


def _class(element: Element) -> str:
    return element.attributes["class"]


@pytest.mark.parametrize("values", [[], [[]], [[None, NAN]]])
def test_without_a_value_nothing_is_drawn(values):
    rows = tuple("a" for _ in values)
    assert draw_heat_map(HeatMap("t", rows, values, "x"), prefix="s1") is None


@pytest.mark.parametrize(
    "given, message",
    [
        ({"rows": ("a",)}, r"'t' has 1 names of rows and 2 rows of values"),
        ({"values": [[0, 1], [1]]}, r"rows have \[2, 1\] values. They must have equally many: use None"),
        ({"values": [[0, 1], [1, 35.0]]}, r"row 'b' holds 35.0. Values are shares, in \[0, 1\]"),
        ({"values": [[0, 1], [-0.1, 1]]}, r"row 'b' holds -0.1"),
        ({"boundaries": (0, 3)}, r"boundary 3 lies outside of the 2 columns"),
        ({"boundaries": (-1,)}, r"boundary -1 lies outside"),
    ],
)
def test_wrong_shapes_and_values_are_refused_where_they_are_made(given, message):
    with pytest.raises(InputError, match=message):
        HeatMap(**{"title": "t", "rows": ("a", "b"), "values": [[0, 1], [1, 0]], "x_label": "x", **given})
