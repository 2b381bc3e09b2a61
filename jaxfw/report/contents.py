"""What a report is made of: plain frozen values that say what to show, and nothing about how it looks."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

from jaxfw.core.errors import InputError


@dataclass(frozen=True)
class Interval:
    """An estimate with its 95 % interval, written `0.83 [0.79, 0.86]`."""

    value: float
    low: float
    high: float


ROUNDING = 1e-6  # a mean of ones in float32 may exceed 1
Cell: TypeAlias = str | int | float | bool | Interval | None


@dataclass(frozen=True)
class Table:
    """Rows under named columns; units belong into the column's name, as in `prefill (ms)`.

    A cell is a `Cell`, or a numpy or jax scalar. A column has one precision, taken from its intervals where
    it has some, else from its values; a string is shown as it is, for any other wish.
    """

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[Any, ...], ...]
    note: str = ""

    def __post_init__(self):
        for number, row in enumerate(self.rows):
            if len(row) != len(self.columns):
                raise InputError(
                    f"Table {self.title!r}: row {number} has {len(row)} cells, the table {len(self.columns)} "
                    f"columns ({', '.join(map(str, self.columns))}). Use None for a cell without a value."
                )


@dataclass(frozen=True, eq=False)
class Curve:
    """A line through (x, y), with the 95 % interval `low..high` as a band. None and NaN leave a gap."""

    name: str
    x: Sequence[float]
    y: Sequence[float]
    low: Sequence[float] | None = None
    high: Sequence[float] | None = None

    def __post_init__(self):
        if (self.low is None) != (self.high is None):
            raise InputError(f"Curve {self.name!r} has one of low and high. A band needs both.")
        given = {"x": self.x, "y": self.y, "low": self.low, "high": self.high}
        sizes = {name: len(values) for name, values in given.items() if values is not None}
        if len(set(sizes.values())) > 1:
            raise InputError(f"Curve {self.name!r} has lengths {sizes}. They must be equal.")


@dataclass(frozen=True)
class Plot:
    """Curves over one pair of axes. On a log axis, values <= 0 are left out, and the page says how many."""

    title: str
    curves: tuple[Curve, ...]
    x_label: str
    y_label: str
    note: str = ""
    log_x: bool = False
    log_y: bool = False


@dataclass(frozen=True)
class Bar:
    """Something on a lane from `begin` to `end`; bars of one kind share a colour."""

    lane: str
    kind: str
    name: str
    begin: float
    end: float


@dataclass(frozen=True)
class Lanes:
    """Bars on lanes, along one axis: what runs when, say. Lanes and kinds stand in the order in which they come up."""

    title: str
    bars: tuple[Bar, ...]
    x_label: str
    note: str = ""


@dataclass(frozen=True, eq=False)
class HeatMap:
    """Rows of numbers in [0, 1], one a column, as shades of one colour. None and NaN leave a column empty.

    `boundaries` are the columns at which a unit begins: thin rules over all rows. `ends` says in the legend what 0 and
    1 mean: the words left and right of the shades.
    """

    title: str
    rows: tuple[str, ...]
    values: Sequence[Sequence[float | None]]
    x_label: str
    boundaries: tuple[int, ...] = ()
    ends: tuple[str, str] = ("0", "1")
    note: str = ""

    def __post_init__(self):
        if len(self.rows) != len(self.values):
            raise InputError(
                f"HeatMap {self.title!r} has {len(self.rows)} names of rows and {len(self.values)} rows of values. "
                "Each row needs its name."
            )
        sizes = [len(row) for row in self.values]
        if len(set(sizes)) > 1:
            raise InputError(
                f"HeatMap {self.title!r}: rows have {sizes} values. They must have equally many: use None for a "
                "column without a value."
            )
        for name, row in zip(self.rows, self.values, strict=True):
            odd = [value for value in row if value is not None and value == value and not 0 <= value <= 1 + ROUNDING]
            if odd:
                raise InputError(f"HeatMap {self.title!r}: row {name!r} holds {odd[0]}. Values are shares, in [0, 1].")
        for column in self.boundaries:
            if not 0 <= column <= max(sizes, default=0):
                raise InputError(
                    f"HeatMap {self.title!r}: boundary {column} lies outside of the {max(sizes, default=0)} columns."
                )


@dataclass(frozen=True)
class Text:
    """Prose, or with `mono` anything whose spaces and line breaks matter: generated samples, logs, code."""

    title: str
    body: str
    mono: bool = False


Section: TypeAlias = Table | Plot | Lanes | HeatMap | Text
