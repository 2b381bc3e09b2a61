"""The report page, read back the way a browser reads it: by its elements, not by its source."""

import math
import os
import subprocess
import sys
from dataclasses import dataclass, field
from html.parser import HTMLParser
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from jaxfw.core.errors import InputError
from jaxfw.report import Curve, Interval, Plot, Table, Text, write_report
from jaxfw.report.drawing import _limits, _ticks, draw
from jaxfw.report.numerals import MINUS, write_column, write_value

VOID = {"meta", "link", "br", "img", "input", "hr"}


@dataclass
class Element:
    tag: str
    attributes: dict
    parent: "Element | None" = None
    children: list = field(default_factory=list)

    @property
    def text(self) -> str:
        return "".join(child if isinstance(child, str) else child.text for child in self.children)

    def all(self, tag: str, cls: str | None = None) -> "list[Element]":
        found = []
        for child in self.children:
            if isinstance(child, Element):
                if child.tag == tag and (cls is None or cls in child.attributes.get("class", "").split()):
                    found.append(child)
                found += child.all(tag, cls)
        return found

    def everything(self) -> "list[Element]":
        inside = [child for child in self.children if isinstance(child, Element)]
        return inside + [element for child in inside for element in child.everything()]


class Reader(HTMLParser):
    """A tree of elements; an end tag that does not match what is open is an error."""

    def __init__(self):
        super().__init__()
        self.root = self.open = Element("root", {})

    def handle_starttag(self, tag, attrs):
        element = Element(tag, dict(attrs), self.open)
        assert len(element.attributes) == len(attrs), f"an attribute of <{tag}> stands twice"
        self.open.children.append(element)
        if tag not in VOID:
            self.open = element

    def handle_startendtag(self, tag, attrs):
        self.open.children.append(Element(tag, dict(attrs), self.open))

    def handle_endtag(self, tag):
        assert self.open.tag == tag, f"</{tag}> closes <{self.open.tag}>"
        self.open = self.open.parent

    def handle_data(self, data):
        self.open.children.append(data)


def parse(source: str) -> Element:
    reader = Reader()
    reader.feed(source)
    reader.close()
    assert reader.open is reader.root, f"<{reader.open.tag}> is never closed"
    return reader.root


@pytest.fixture
def page(tmp_path):
    def write(**given) -> Element:
        path = write_report(tmp_path / "report.html", **{"title": "A run", **given})
        return parse(path.read_text("utf-8"))

    return write


def cells(table: Element) -> list[list[str]]:
    return [[cell.text for cell in row.all("td")] for row in table.all("tr") if row.all("td")]


STEPS = np.arange(600)
LOSS = Plot(
    "Loss",
    (Curve("train", STEPS, 2 + np.exp(-STEPS / 100)), Curve("validation", STEPS[::50], [2.5] * 12)),
    "step",
    "loss (nats)",
)
ACCURACY = Plot("Accuracy", (Curve("ours", [0.1, 0.5], [0.6, 0.8], [0.5, 0.7], [0.7, 0.9]),), "keep", "accuracy")
FULL = {
    "summary": "One.\n\nTwo.",
    "sections": [
        LOSS,
        ACCURACY,
        LOSS,
        Table("Times", ("cache", "ms"), (("full", Interval(1.23, 1.1, 1.4)),)),
        Text("Samples", "a\n  b", mono=True),
    ],
    "checks": [{"name": "loss", "value": 2.0, "bound": 2.1, "ok": True}],
    "config": {"model": {"layers": 2, "rope": {"theta": 1e4}}, "lr": 3e-4, "name": "x"},
    "environment": {
        "command": ["python", "-m", "jaxfw.launch", "--config.note=two words"],
        "started": "2026-01-02",
    },
    "figures": [("loss", Interval(2.0, 1.9, 2.1)), ("tokens/s", "48,210")],
}


def test_refers_to_nothing_outside_itself(page):
    elements = page(**FULL).everything()
    assert not [e for e in elements if e.tag in {"script", "iframe", "object", "img", "base"}]
    for element in elements:
        for name in {"src", "href", "xlink:href", "action", "srcset"} & element.attributes.keys():
            assert element.attributes[name].startswith(("#", "data:,")), element
        assert not [name for name in element.attributes if name.startswith("on")]
    styles = "".join(element.text for element in elements if element.tag == "style")
    assert "url(" not in styles and "@import" not in styles
    policy = [e.attributes["content"] for e in elements if "http-equiv" in e.attributes]
    assert policy and policy[0].startswith("default-src 'none'")


def test_ids_are_unique_and_every_reference_has_its_target(page):
    elements = page(**FULL).everything()
    ids = [element.attributes["id"] for element in elements if "id" in element.attributes]
    assert len(ids) == len(set(ids)), "the same plot twice must not share ids"
    wanted = [e.attributes["href"] for e in elements if e.attributes.get("href", "").startswith("#")]
    wanted += [e.attributes["clip-path"][4:-1] for e in elements if "clip-path" in e.attributes]
    assert wanted and {reference[1:] for reference in wanted} <= set(ids)


def test_two_writes_are_equal_bytes(tmp_path):
    pages = [write_report(tmp_path / name / "report.html", title="A run", **FULL).read_bytes() for name in "ab"]
    assert pages[0] == pages[1]


def test_writing_ignores_the_matplotlib_settings_of_the_user(tmp_path):
    import matplotlib

    plain = write_report(tmp_path / "plain.html", title="A run", **FULL).read_bytes()
    with matplotlib.rc_context({"axes.grid": True, "lines.linewidth": 9, "axes.facecolor": "red"}):
        changed = write_report(tmp_path / "changed.html", title="A run", **FULL).read_bytes()
        assert matplotlib.rcParams["lines.linewidth"] == 9
    assert plain == changed


def test_importing_loads_neither_matplotlib_nor_jinja2_and_writing_never_pyplot(tmp_path):
    program = f"""
import sys
import jaxfw.report as r
assert not {{"matplotlib", "jinja2"}} & sys.modules.keys()
plot = r.Plot("p", (r.Curve("a", [1, 2], [1, 2]),), "x", "y")
r.write_report({str(tmp_path / "report.html")!r}, title="t", sections=[plot])
assert "matplotlib" in sys.modules and "matplotlib.pyplot" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", program], check=True, cwd=Path(__file__).parents[1])


EVIL = "</pre></title></svg></style><script>alert(1)</script>\"' onload=x {{ 7 * 7 }} &lt; $\\frac$"


def test_whatever_a_user_or_a_model_wrote_stays_text(page):
    root = page(
        title=EVIL,
        summary=EVIL,
        sections=[
            Text(EVIL, EVIL),
            Text("mono", EVIL, mono=True),
            Table(EVIL, (EVIL,), ((EVIL,),), note=EVIL),
            Plot(EVIL, (Curve(EVIL, [1, 2], [1, 2]), Curve("b<i>", [1, 2], [2, 3])), EVIL, EVIL, note=EVIL),
        ],
        checks=[{"name": EVIL, "value": EVIL, "bound": EVIL, "ok": False}],
        config={EVIL: EVIL},
        environment={"command": EVIL, "started": EVIL, "more": {"deep": [EVIL]}},
        figures=[(EVIL, EVIL)],
    )
    assert not root.all("script") and not root.all("i")
    assert root.all("h1")[0].text == EVIL and root.all("title")[0].text == EVIL
    assert root.all("pre")[0].text.strip() == EVIL
    assert [EVIL, EVIL, EVIL, "✗ fail"] in [row for table in root.all("table") for row in cells(table)]


def test_text_that_utf8_or_xml_cannot_carry_does_not_lose_the_report(page):
    broken = "half a pair \ud83d, a null \x00, an escape \x1b[0m, 漢字"
    root = page(
        title="t",
        sections=[
            Text("s", broken, mono=True),
            Plot(broken, (Curve(broken, [1], [1]), Curve("b", [1], [2])), broken, broken),
        ],
    )
    assert "\\ud83d" in root.all("pre")[0].text and "漢字" in root.all("pre")[0].text
    assert any("漢字" in text.text for text in root.all("text"))


@pytest.mark.parametrize(
    "interval, written",
    [
        (Interval(0.8312, 0.7934, 0.8644), "0.83 [0.79, 0.86]"),
        (Interval(0.83, 0.79, 0.86), "0.83 [0.79, 0.86]"),
        (Interval(171.34, 168.2, 175.01), "171 [168, 175]"),
        (Interval(0.0, 0.0, 0.0076), "0.000 [0.000, 0.008]"),
        (Interval(-0.5, -1.25, 0.25), f"{MINUS}0.5 [{MINUS}1.2, 0.2]"),
        (Interval(12345.6, 12000.2, 12700.9), "12,346 [12,000, 12,701]"),
        (Interval(1.5, 1.5, 1.5), "1.5 [1.5, 1.5]"),
        (Interval(math.nan, 0.1, math.inf), "NaN [0.1, ∞]"),
        (Interval(3, 1, 7), "3 [1, 7]"),
    ],
)
def test_an_interval_shows_the_digits_it_supports(interval, written):
    cell = write_column([interval])[0]
    assert f"{cell.text} {cell.tail}" == written


def test_a_column_has_one_precision_and_numbers_stand_right(page):
    times = Table(
        "Times",
        ("cache", "ms", "n", "same", "accuracy"),
        (
            ("full", 95.2131, 128, True, Interval(0.9941, 0.983, 0.998)),
            ("none", 4.3, 12345, False, Interval(0.41, 0.37, 0.456)),
            ("broken", float("nan"), None, None, None),
        ),
    )
    table = page(sections=[times]).all("table")[0]
    assert cells(table) == [
        ["full", "95.21", "128", "yes", "0.994 [0.983, 0.998]"],
        ["none", "4.30", "12,345", "no", "0.410 [0.370, 0.456]"],
        ["broken", "NaN", "—", "—", "—"],
    ]
    for row in table.all("tr"):
        sides = [e.attributes.get("class") for e in row.children if isinstance(e, Element)]
        assert sides == [None, "right", "right", None, "right"]


@pytest.mark.parametrize(
    "value, written",
    [
        (3e-4, f"3e{MINUS}4"),
        (0.1234567, "0.1235"),
        (6.02e23, "6.02e23"),
        (-math.inf, f"{MINUS}∞"),
        (float("nan"), "NaN"),
        (None, "—"),
        (True, "yes"),
        (1024, "1024"),
        (1_234_567, "1,234,567"),
        (-0.0, "0.0"),
        (10**400, f"{10**400:,d}"),
        ("0.50", "0.50"),
        ([0, None], "[0, —]"),
    ],
)
def test_a_single_value(value, written):
    assert write_value(value).text == written


def test_values_too_far_apart_keep_their_own_digits():
    assert [cell.text for cell in write_column([812.4, 0.00123])] == ["812.4", "0.00123"]


@pytest.mark.parametrize(
    "scalar", [np.float32(0.5), np.array(0.5), jnp.float32(0.5), jnp.bfloat16(0.5), np.float64(0.5)]
)
def test_array_scalars_are_numbers(scalar):
    assert write_column([scalar])[0].text == "0.5"
    cell = write_column([Interval(scalar, np.float32(0.25), jnp.float32(0.75))])[0]
    assert (cell.text, cell.tail) == ("0.50", "[0.25, 0.75]")


def test_a_failed_check_is_said_in_words_at_the_top_and_in_its_row(page):
    checks = [
        {"name": "loss", "value": np.float32(2.0), "bound": 2.1, "ok": np.bool_(True)},
        {"name": "error", "value": 1.0000004e-5, "bound": 1e-5, "ok": False},
        {"name": "not run", "value": None, "bound": 1},
    ]
    root = page(checks=checks)
    assert root.all("span", "pill")[0].text == "✗ 2 of 3 checks failed"
    assert [row[-1] for row in cells(root.all("table", "checks")[0])] == ["✓ pass", "✗ fail", "✗ fail"]
    sections = [section.attributes["id"] for section in root.all("section")]
    assert sections[0] == "checks"
    assert page(checks=checks[:1] * 3).all("span", "pill")[0].text == "✓ all 3 checks ok"
    assert page().all("span", "pill")[0].text == "no checks"


def test_a_value_just_beyond_its_bound_looks_different_from_it():
    values = [write_value(value, 6).text for value in (0.100004, 0.1)]
    assert values == ["0.100004", "0.1"]


def test_head_of_the_page(page):
    root = page(**FULL)
    header = root.all("header")[0]
    assert [p.text for p in header.all("p", "lead")] == ["One.", "Two."]
    assert header.all("time")[0].text == "2026-01-02"
    words = [span.text for span in header.all("p", "command")[0].all("span")]
    assert words == ["python", "-m", "jaxfw.launch", "'--config.note=two words'"]
    tiles = [(e.all("dt")[0].text, e.all("dd")[0].text) for e in header.all("dl", "figures")[0].all("div")]
    assert tiles == [("loss", "2.0 [1.9, 2.1]"), ("tokens/s", "48,210")]


def test_config_is_folded_with_dotted_names_and_exact_values(page):
    config, environment = page(**FULL).all("details")
    assert "open" not in config.attributes
    assert cells(config) == [
        ["model.layers", "2"],
        ["model.rope.theta", "10000.0"],
        ["lr", "0.0003"],
        ["name", "x"],
    ]
    assert ["started", "2026-01-02"] in cells(environment)


def test_empty_pieces(page):
    sections = [Table("none", ("a",), ()), Table("less", (), ()), Text("t", ""), Plot("p", (), "x", "y")]
    root = page(sections=[*sections, Plot("q", (Curve("c", [], []),), "x", "y")])
    assert [p.text for p in root.all("p", "empty")] == [
        "No rows.",
        "No rows.",
        "Nothing.",
        "No finite values to draw.",
        "No finite values to draw.",
    ]
    assert not page().all("table", "checks")


def drawing(*curves, **options):
    made = draw(Plot("p", curves, "x", "y", **options), prefix="p")
    assert made is not None
    return parse(made.wide), made


def test_sections_are_numbered_by_kind(page):
    labels = [span.text for span in page(**FULL).all("span", "label")]
    assert labels == ["Figure 1", "Figure 2", "Figure 3", "Table 1"]


def test_text_in_a_plot_is_text_and_colours_are_the_pages(page):
    root, _ = drawing(Curve("train", [1, 2, 3], [3.0, 2.0, 1.0]), Curve("validation", [1, 3], [3, 2]))
    texts = [text.text for text in root.all("text")]
    assert {"x", "y", "train", "validation", "2.0"} <= set(texts)
    styles = " ".join(element.attributes.get("style", "") for element in root.everything())
    assert "var(--series-0)" in styles and "var(--series-1)" in styles and "#" not in styles
    assert "font-family" not in styles


def test_names_of_curves_stand_at_their_ends_or_in_a_legend():
    two = [Curve("train", [1, 2], [1, 2]), Curve("validation", [1, 2], [2, 1])]
    root, made = drawing(*two)
    assert made.is_direct and "train" in [text.text for text in root.all("text")]
    assert "train" not in [text.text for text in parse(made.narrow).all("text")]
    assert made.legend == (("train", 0, 0), ("validation", 1, 0))
    root, made = drawing(*two, Curve("a name that is far too long for the margin", [1, 2], [1, 1]))
    assert not made.is_direct and len(made.legend) == 3
    assert "train" not in [text.text for text in root.all("text")]
    _, made = drawing(two[0], Curve("stops early", [1, 1.5], [1, 2]))
    assert not made.is_direct, "a name in the margin would be far from its curve"
    _, made = drawing(*[Curve(str(i), [1, 2], [i, i]) for i in range(8)])
    assert not made.is_direct and made.legend[6] == ("6", 0, 1), "the seventh curve is told apart by its dashes"


def test_names_at_the_ends_do_not_touch():
    root, _ = drawing(*[Curve(name, [1, 2], [1, 2 + i / 1000]) for i, name in enumerate("abcdef")])
    heights = sorted(float(t.attributes["y"]) for t in root.all("text") if t.text in set("abcdef"))
    assert len(heights) == 6 and min(np.diff(heights)) >= 14


def marks(root: Element) -> int:
    return sum("series" in use.attributes.get("style", "") for use in root.all("use"))


def test_a_curve_of_one_point_shows_it_with_its_interval():
    root, made = drawing(Curve("one", [5], [2.0]))
    assert marks(root) == 1 and made.lost == ""
    with_band, _ = drawing(Curve("one", [5], [2.0], [1.0], [3.0]))
    # The upright line of the interval: two points with the same x.
    paths = [
        path.attributes["d"].split() for path in with_band.all("path") if "series" in path.attributes.get("style", "")
    ]
    assert any(len(path) == 6 and path[1] == path[4] and path[2] != path[5] for path in paths)


def test_values_that_cannot_be_drawn_are_counted_and_leave_a_gap():
    values = [1.0, float("nan"), 3.0, None, math.inf, 2.0, 2.5]
    root, made = drawing(Curve("c", range(7), values))
    assert "3 of 7 values of c" in made.lost
    assert marks(root) == 4
    _, made = drawing(Curve("c", [0, 1, 10], [-1.0, 1.0, 100.0]), log_x=True, log_y=True)
    assert "1 of 3 values of c" in made.lost
    assert draw(Plot("p", (Curve("c", [1, 2], [0, -1]),), "x", "y", log_y=True), prefix="p") is None


def test_a_point_between_two_gaps_is_marked_in_a_long_curve():
    y = np.ones(100)
    y[[49, 51]] = np.nan
    root, _ = drawing(Curve("c", np.arange(100), y))
    assert marks(root) == 1


def test_a_long_curve_keeps_its_spikes_and_a_small_page():
    y = np.sin(np.arange(200_000) / 9000)
    y[123_457] = 50
    root, made = drawing(Curve("c", np.arange(200_000), y))
    assert len(made.wide) < 60_000
    assert "50" in [text.text for text in root.all("text")]
    assert made.lost == ""


@pytest.mark.parametrize("low, high", [(1e-4, 50), (0.05, 1), (3, 5), (1, 1), (1e-12, 1e12), (0.9, 11)])
@pytest.mark.parametrize("log", [False, True])
def test_every_axis_has_a_few_ticks_inside_its_limits(low, high, log):
    limits = _limits(np.array([low, high]), log, 0.05)
    for count in (4, 6):
        ticks = _ticks(*limits, log, count)
        assert 2 <= len(ticks) <= count + 2
        assert all(limits[0] <= tick <= limits[1] for tick in ticks)


@pytest.mark.parametrize("y", [[0, 0], [1e-30, 2e-30], [1e299, -1e299], [5, 5 + 1e-12], [1e17, 1e17 + 64]])
def test_extreme_ranges_are_drawn(y):
    root, _ = drawing(Curve("c", [1, 2], y))
    assert marks(root) == 2


def test_wrong_shapes_are_refused_where_they_are_made():
    with pytest.raises(InputError, match=r"row 1 has 1 cells, the table 2 columns \(a, b\)"):
        Table("t", ("a", "b"), ((1, 2), (1,)))
    with pytest.raises(InputError, match=r"'c' has lengths \{'x': 2, 'y': 3\}"):
        Curve("c", [1, 2], [1, 2, 3])
    with pytest.raises(InputError, match="one of low and high"):
        Curve("c", [1], [1], low=[0])


def test_a_failed_write_leaves_the_old_page_and_nothing_else(tmp_path, monkeypatch):
    path = write_report(tmp_path / "report.html", title="old")
    before = path.read_bytes()

    def full_disk(*_):
        raise OSError("no space left")

    monkeypatch.setattr(os, "replace", full_disk)
    with pytest.raises(OSError, match="no space"):
        write_report(path, title="new")
    assert path.read_bytes() == before
    assert [entry.name for entry in tmp_path.iterdir()] == ["report.html"]
