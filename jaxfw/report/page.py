"""`write_report`: everything an experiment hands over -> one HTML file, from the template `page.html.j2`.

Titles, cells and samples are untrusted (a model writes some of them): jinja2 escapes all but our own SVG, and
the page's content policy forbids scripts and every address. The same arguments give the same bytes.
"""

import json
import os
import re
import shlex
from collections.abc import Iterator, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

from jaxfw.report.contents import HeatMap, Lanes, Plot, Section, Table, Text
from jaxfw.report.drawing import draw
from jaxfw.report.heatmap import draw_heat_map
from jaxfw.report.lanes import draw_lanes, legend
from jaxfw.report.numerals import is_numeric, plain, write_column, write_value

CHECK_DIGITS = 6  # a value just beyond its bound must not look equal to it


def write_report(
    path: str | os.PathLike[str],
    *,
    title: str,
    summary: str = "",
    sections: Sequence[Section] = (),
    checks: Sequence[dict[str, Any]] = (),
    config: dict[str, Any] | None = None,
    environment: dict[str, Any] | None = None,
    figures: Sequence[tuple[str, Any]] = (),
) -> Path:
    """Write the page, whole or not at all, and return its path.

    Args:
      path: the file, usually `workdir/report.html`; its folder is made where it is missing.
      title: what was run.
      summary: what came out, in a few sentences; blank lines part paragraphs.
      sections: what `contents` holds, shown in this order and numbered as in a paper.
      checks: dicts with `name, value, bound, ok`; a check without `ok` counts as failed.
      config: the run's configuration, nested; shown folded, with dotted names.
      environment: likewise; its `command` and `started`, if there, also stand at the head of the page.
      figures: the few numbers to remember, as (label, value); a value is a string or any cell of a table.
    """
    environment = environment or {}
    page = {
        "title": title,
        "summary": _paragraphs(summary),
        "command": _command(environment.get("command")),
        "started": environment.get("started"),
        "figures": [(label, write_value(value)) for label, value in figures],
        "checks": [_check(check) for check in checks],
        "sections": list(_sections(sections)),
        "details": {"Configuration": list(_flatten(config)), "Environment": list(_flatten(environment))},
    }
    text = _template().render(page)
    return _replace(Path(path), text.encode("utf-8", "backslashreplace"))


def _template():
    import jinja2

    source = resources.files("jaxfw.report").joinpath("page.html.j2").read_text("utf-8")
    environment = jinja2.Environment(
        autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
    )
    return environment.from_string(source)


def _check(check: dict[str, Any]) -> dict[str, Any]:
    value, bound = (write_value(check.get(name), CHECK_DIGITS) for name in ("value", "bound"))
    name, ok = check.get("name", "unnamed"), bool(check.get("ok", False))
    return {"name": name, "value": value, "bound": bound, "ok": ok}


def _sections(sections: Sequence[Section]) -> Iterator[dict[str, Any]]:
    numbered = {Table: "table", Plot: "figure", Lanes: "figure", HeatMap: "figure", Text: "text"}
    counts = dict.fromkeys(numbered.values(), 0)
    for number, section in enumerate(sections, 1):
        counts[numbered[type(section)]] += 1
        anchor = f"s{number}"
        match section:
            case Table():
                made = {"kind": "table", **_table(section)}
            case Plot():
                has_bands = any(curve.low is not None for curve in section.curves)
                made = {"kind": "plot", "drawing": draw(section, prefix=anchor), "has_bands": has_bands}
            case Lanes():
                made = {"kind": "lanes", "drawing": draw_lanes(section), "legend": legend(section)}
            case HeatMap():
                made = {"kind": "heat", "drawing": draw_heat_map(section, prefix=anchor)}
            case Text():
                made = {"kind": "text", "paragraphs": _paragraphs(section.body)}
        yield {"anchor": anchor, "number": counts[numbered[type(section)]], "source": section, **made}


def _table(table: Table) -> dict[str, Any]:
    """Columns with their alignment, and rows of written cells."""
    columns = [write_column([row[index] for row in table.rows]) for index in range(len(table.columns))]
    return {
        "columns": [(name, is_numeric(column)) for name, column in zip(table.columns, columns)],
        "rows": [[column[index] for column in columns] for index in range(len(table.rows))],
        "has_intervals": any(cell.tail for column in columns for cell in column),
    }


def _paragraphs(text: str) -> list[str]:
    return [paragraph.strip() for paragraph in re.split(r"\n\s*\n", text) if paragraph.strip()]


def _command(command: Any) -> list[str]:
    """The words of a command line: the page breaks lines between them only, never after a hyphen."""
    if isinstance(command, list | tuple):
        return [shlex.quote(str(word)) for word in command]
    return str(command or "").split()


def _flatten(tree: Any, prefix: str = "") -> Iterator[tuple[str, str]]:
    """Leaves of nested dicts with dotted names, in the given order; numbers as exact as they are."""
    for name, value in (tree or {}).items():
        value = plain(value)
        if hasattr(value, "items") and value:
            yield from _flatten(value, f"{prefix}{name}.")
        elif isinstance(value, str):
            yield f"{prefix}{name}", value
        else:
            yield f"{prefix}{name}", json.dumps(value, default=str, ensure_ascii=False)


def _replace(path: Path, content: bytes) -> Path:
    """Put the content in place in one step: a reader sees the old page or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        beside.write_bytes(content)
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)
    return path
