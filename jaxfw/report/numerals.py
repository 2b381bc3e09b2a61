"""How a number is written in a report: as many digits as it is known to, and one precision per column.

With an interval, the digits follow from its half-width h: the last one shown is the first that h / 3 reaches,
so 0.8312 [0.7934, 0.8644] is written 0.83 [0.79, 0.86]. Without one, the largest value of a column gets four
significant digits and the smallest at least two. No number gets more decimals than it was given with.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from jaxfw.report.contents import Interval

MINUS = "\N{MINUS SIGN}"
GROUP_FROM = 10_000  # a four-digit number is often a length or a seed; grouping starts where reading gets hard
MAX_SPREAD = 2  # a column in which one cell needs this many more decimals than another gives up on one precision


@dataclass(frozen=True)
class Written:
    """A cell as text: `tail` is the bracket of an interval, `kind` one of number, odd, truth, none, text."""

    text: str
    tail: str = ""
    kind: str = "text"


def plain(value: Any) -> Any:
    """A Python scalar for a numpy or jax one; everything else as it is."""
    if getattr(value, "shape", None) == () and hasattr(value, "item"):
        return value.item()
    return value


def write_column(values: Sequence[Any]) -> list[Written]:
    """Write the cells of a column so that their decimal points stand in line.

    >>> [cell.text for cell in write_column([95.213, 4.3, None, float("nan")])]
    ['95.21', '4.30', '—', 'NaN']
    >>> cell = write_column([Interval(0.8312, 0.7934, 0.8644)])[0]
    >>> cell.text, cell.tail
    ('0.83', '[0.79, 0.86]')
    """
    cells = [plain(value) for value in values]
    decimals = _column_decimals(cells)
    grouped = any(abs(x) >= GROUP_FROM for x in _numbers(cells))
    return [_write_cell(cell, decimals, grouped) for cell in cells]


def write_value(value: Any, digits: int = 4) -> Written:
    """Write a value that stands alone, with so many significant digits.

    >>> write_value(-1234567).text, write_value(0.000012345).text, write_value([0.5, 1]).text
    ('−1,234,567', '1.234e−5', '[0.5, 1]')
    """
    value = plain(value)
    if isinstance(value, list | tuple):
        return Written("[" + ", ".join(write_value(part, digits).text for part in value) + "]")
    if isinstance(value, float) and math.isfinite(value):
        return Written(_alone(value, digits), kind="number")
    return write_column([value])[0]


def write_ticks(values: Sequence[float]) -> list[str]:
    """Write the round numbers along an axis, alike and short.

    >>> write_ticks([0.0, 0.05, 0.1]), write_ticks([0, 5e8, 1e9]), write_ticks([1e-4, 1e-3])
    (['0.00', '0.05', '0.10'], ['0.0B', '0.5B', '1.0B'], ['1e−4', '1e−3'])
    """
    largest = max((abs(value) for value in values), default=0.0)
    if largest >= 1e15 or 0 < largest < 1e-2:
        return [_scientific(value, 3) for value in values]
    scale, suffix = next(((s, name) for s, name in ((1e12, "T"), (1e9, "B"), (1e6, "M")) if largest >= s), (1.0, ""))
    scaled = [float(f"{value / scale:.10g}") for value in values]
    decimals = max((_given_decimals(value) for value in scaled if value != int(value)), default=0)
    return [_fixed(value, decimals, True) + suffix for value in scaled]


def is_numeric(cells: Iterable[Written]) -> bool:
    """Whether a column is set as numbers, to the right: it has some, and no words beside them."""
    kinds = {cell.kind for cell in cells}
    return "text" not in kinds and "truth" not in kinds and bool(kinds & {"number", "odd"})


def _write_cell(value: Any, decimals: int | None, grouped: bool) -> Written:
    if value is None:
        return Written("—", kind="none")
    if isinstance(value, bool):
        return Written("yes" if value else "no", kind="truth")
    if isinstance(value, Interval):
        parts = [plain(part) for part in (value.value, value.low, value.high)]
        own = _interval_decimals(value) if decimals is None else decimals
        text, low, high = (_write_number(part, own, grouped) for part in parts)
        return Written(text, tail=f"[{low}, {high}]", kind="number" if _is_finite(parts[0]) else "odd")
    if isinstance(value, int | float):
        return Written(_write_number(value, decimals, grouped), kind="number" if _is_finite(value) else "odd")
    return Written(str(value))


def _write_number(value: Any, decimals: int | None, grouped: bool) -> str:
    if value is None:
        return "—"
    if isinstance(value, int) and decimals is None:
        return f"{value:,d}".replace("-", MINUS) if grouped else f"{value:d}".replace("-", MINUS)
    if math.isnan(value):
        return "NaN"
    if math.isinf(value):
        return "∞" if value > 0 else f"{MINUS}∞"
    return _alone(value, 4) if decimals is None else _fixed(value, decimals, grouped)


def _column_decimals(cells: Sequence[Any]) -> int | None:
    """Decimals of a whole column; None where it has only integers, or every cell is better off alone."""
    intervals = [cell for cell in cells if isinstance(cell, Interval)]
    numbers = _numbers(cells)
    if not any(isinstance(x, float) for x in numbers):
        return None
    if intervals:
        each = [_interval_decimals(interval) for interval in intervals]
        return max(each) if max(each) - min(each) <= MAX_SPREAD else None
    sizes = [abs(x) for x in numbers if x != 0]
    if not sizes:
        return 1
    if max(sizes) >= 1e7 or max(sizes) < 1e-3:
        return None
    fewest, most = _decimals(max(sizes), 4), _decimals(min(sizes), 2)
    given = max(_given_decimals(x) for x in numbers)
    if min(most, given) - fewest > MAX_SPREAD:
        return None
    return min(max(fewest, most), given)


def _interval_decimals(interval: Interval) -> int:
    value, low, high = (plain(part) for part in (interval.value, interval.low, interval.high))
    finite = [x for x in (value, low, high) if _is_finite(x)]
    given = max((_given_decimals(x) for x in finite), default=0)
    half = max(value - low, high - value) if len(finite) == 3 else 0
    if half > 0:
        return min(_decimals(half / 3, 1), given)
    return min(max((_decimals(abs(x), 4) for x in finite if x != 0), default=1), given)


def _numbers(cells: Sequence[Any]) -> list[int | float]:
    """Every finite number of a column, the parts of intervals included."""
    parts = []
    for cell in cells:
        parts += [plain(x) for x in (cell.value, cell.low, cell.high)] if isinstance(cell, Interval) else [cell]
    return [x for x in parts if _is_finite(x)]


def _is_finite(value: Any) -> bool:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return isinstance(value, int) or math.isfinite(value)


def _decimals(size: float, digits: int) -> int:
    """Decimals that give a positive number so many significant digits."""
    return max(0, digits - 1 - math.floor(math.log10(size)))


def _given_decimals(value: int | float) -> int:
    """Decimals of the shortest text that reads back as the same float: 2 for 0.25."""
    if isinstance(value, int):
        return 0
    mantissa, _, exponent = repr(value).partition("e")
    return max(0, len(mantissa.partition(".")[2]) - int(exponent or 0))


def _alone(value: int | float, digits: int) -> str:
    if value != 0 and not 1e-3 <= abs(value) < 1e7:
        return _scientific(value, digits)
    decimals = _decimals(abs(value), digits) if value != 0 else 1
    return _fixed(value, min(decimals, _given_decimals(value)), True)


def _fixed(value: int | float, decimals: int, grouped: bool) -> str:
    text = f"{value:,.{decimals}f}" if grouped and abs(value) >= GROUP_FROM else f"{value:.{decimals}f}"
    return text.replace("-", MINUS) if float(text.replace(",", "")) != 0 else text.lstrip("-")


def _scientific(value: float, digits: int) -> str:
    if value == 0:
        return "0"
    mantissa, exponent = f"{value:.{digits - 1}e}".split("e")
    mantissa = mantissa.rstrip("0").rstrip(".") if "." in mantissa else mantissa
    return f"{mantissa}e{int(exponent)}".replace("-", MINUS)
