"""Where parameters live on a mesh: rules by a parameter's path, and the table of what they come to.

A path is the keys that lead to a parameter, joined by slashes: "layers_0/attn/q/kernel". Every parameter must match
exactly one rule; there is no catch-all, so that a new parameter is never replicated unasked. A rule lists layouts in
order of preference, and the first that cuts every axis evenly is taken. Replication is a layout like others, only taken
where it is listed.
"""

import dataclasses
import functools
import math
import re
from collections.abc import Iterable, Sequence
from typing import Any

import jax
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

from jaxfw.core.errors import InputError
from jaxfw.core.mesh import Entry
from jaxfw.core.shapes import PyTree

Spec = tuple[Entry, ...]


@dataclasses.dataclass(frozen=True)
class Rule:
    """Layouts for the parameters whose whole path matches the regular expression `pattern`.

    A layout names mesh axes for the last axes of an array; axes before them (stacked layers) stay whole. `units` says
    for an axis of how many blocks it consists that must not be cut (heads); None, or nothing, is its length.
    `why` is a reason to replicate.
    """

    pattern: str
    layouts: tuple[Spec, ...]
    units: tuple[int | None, ...] = ()
    why: str = ""


@dataclasses.dataclass(frozen=True)
class Row:
    """One line of a table: `count` parameters of one shape that a rule lays out alike; bytes are of all of them.

    `why` says what kept them from the rule's first layout, or why they are replicated.
    """

    pattern: str
    count: int
    shape: tuple[int, ...]
    dtype: str
    spec: PartitionSpec
    bytes: int
    bytes_per_device: int
    why: str


@dataclasses.dataclass(frozen=True)
class Table:
    """What rules come to on a mesh; `print` shows it."""

    rows: tuple[Row, ...]

    @property
    def bytes(self) -> int:
        """Bytes of all parameters, once."""
        return sum(row.bytes for row in self.rows)

    @property
    def bytes_per_device(self) -> int:
        """Bytes that each device holds."""
        return sum(row.bytes_per_device for row in self.rows)

    def __str__(self) -> str:
        lines = [("parameters", "count", "shape", "layout", "bytes", "per device", "")]
        for row in self.rows:
            shape, spec = "x".join(map(str, row.shape)) or "scalar", ", ".join(map(_say_entry, row.spec))
            lines.append(
                (row.pattern, str(row.count), f"{shape} {row.dtype}", spec, f"{row.bytes:,}",
                 f"{row.bytes_per_device:,}", row.why)
            )  # fmt: skip
        lines.append(("all", "", "", "", f"{self.bytes:,}", f"{self.bytes_per_device:,}", ""))
        widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
        numbers = (1, 4, 5)
        columns = list(enumerate(widths))
        aligned = [
            [line[i].rjust(width) if i in numbers else line[i].ljust(width) for i, width in columns] for line in lines
        ]
        return "\n".join("  ".join(line).rstrip() for line in aligned)


def shardings(rules: Sequence[Rule], mesh: Mesh | AbstractMesh, shapes: PyTree) -> PyTree:
    """A `NamedSharding` for every array of `shapes` (abstract or not).

    Raises:
        InputError: an array that no rule matches, or several; a rule of which no layout fits.
    """

    def place(path, leaf):
        name = _name(path)
        return NamedSharding(mesh, _choose(match(rules, name), name, leaf.shape, mesh)[0])

    return jax.tree_util.tree_map_with_path(place, shapes)


def table(rules: Sequence[Rule], mesh: Mesh | AbstractMesh, shapes: PyTree) -> Table:
    """The rows that `shardings` comes to, in the order of the rules; raises as it does."""
    groups: dict[tuple[Any, ...], int] = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(shapes):
        name = _name(path)
        rule = match(rules, name)
        spec, why = _choose(rule, name, leaf.shape, mesh)
        key = (rules.index(rule), rule.pattern, tuple(leaf.shape), str(leaf.dtype), spec, why)
        groups[key] = groups.get(key, 0) + 1
    rows = []
    for key, count in sorted(groups.items(), key=lambda item: item[0][0]):
        _, pattern, shape, dtype, spec, why = key
        whole, part = (
            count * jax.ShapeDtypeStruct(size, dtype).size * jax.numpy.dtype(dtype).itemsize
            for size in (shape, NamedSharding(mesh, spec).shard_shape(shape))
        )
        rows.append(Row(pattern, count, shape, dtype, spec, whole, part, why))
    return Table(tuple(rows))


def state_shardings(param_shardings: PyTree, params: PyTree, state: PyTree, *, rules: Sequence[Rule] = ()) -> PyTree:
    """Layouts of an optimiser's state, or any other: what has a parameter's path and shape lies as that parameter.

    Scalars are replicated, and so is what has a parameter's path and fewer axes (factored moments). What belongs to no
    parameter needs one of `rules`, which match the end of its path.

    Raises:
        InputError: an array under no parameter's path that no rule matches, or several.
    """
    leaves = jax.tree_util.tree_leaves_with_path(params)
    places = jax.tree.leaves(param_shardings)
    of = {_name(path): (tuple(leaf.shape), place) for (path, leaf), place in zip(leaves, places, strict=True)}
    mesh = places[0].mesh
    replicated = NamedSharding(mesh, PartitionSpec())

    def place(path, leaf):
        words = _name(path).split("/")
        ends = ["/".join(words[i:]) for i in range(len(words))]
        ruled = next((end for end in ends if any(_compiled(rule.pattern).fullmatch(end) for rule in rules)), None)
        if ruled:
            return NamedSharding(mesh, _choose(match(rules, ruled), ruled, leaf.shape, mesh)[0])
        shape, given = next((of[end] for end in ends if end in of), (None, replicated))
        if leaf.ndim == 0 or (shape is not None and leaf.ndim < len(shape)):
            return replicated
        if tuple(leaf.shape) != shape:
            raise InputError(
                f"state {_name(path)} {list(leaf.shape)} belongs to no parameter of that path and shape: "
                "lay it out by a rule of its own."
            )
        return given

    return jax.tree_util.tree_map_with_path(place, state)


def match(rules: Iterable[Rule], name: str) -> Rule:
    """The one rule that matches a parameter's path.

    Raises:
        InputError: none does, or several.
    """
    found = [rule for rule in rules if _compiled(rule.pattern).fullmatch(name)]
    if len(found) == 1:
        return found[0]
    if not found:
        raise InputError(f"parameter {name!r} matches no sharding rule: add a Rule for it.")
    patterns = " and ".join(repr(rule.pattern) for rule in found)
    raise InputError(
        f"parameter {name!r} matches {len(found)} sharding rules, {patterns}: make their patterns exclude each other."
    )


_compiled = functools.cache(re.compile)


def _choose(rule: Rule, name: str, shape: Sequence[int], mesh: Mesh | AbstractMesh) -> tuple[PartitionSpec, str]:
    """The first layout that cuts evenly, and what was wrong with the first of all, or why nothing is cut."""
    reasons, axes = [], {axis for layout in rule.layouts for entry in layout for axis in _axes(entry)}
    if not axes <= set(mesh.axis_names):
        raise InputError(
            f"the mesh has axes {', '.join(mesh.axis_names)}, rule {rule.pattern!r} names "
            f"{', '.join(sorted(axes - set(mesh.axis_names)))}: make the mesh by jaxfw.core.mesh.make_mesh."
        )
    for layout in rule.layouts:
        if len(layout) > len(shape):
            raise InputError(f"parameter {name!r} {list(shape)} has fewer axes than {layout} of rule {rule.pattern!r}.")
        spec, reason = _fit(rule, layout, shape, mesh)
        if not reason:
            replicated = all(entry is None for entry in spec)
            return spec, reasons[0] if reasons else _no_axis(rule, mesh) if replicated else ""
        reasons.append(reason)
    raise InputError(
        f"parameter {name!r} {list(shape)} fits no layout of rule {rule.pattern!r} on this mesh: {'; '.join(reasons)}. "
        "Choose other mesh sizes, or list a layout that fits."
    )


def _no_axis(rule: Rule, mesh: Mesh | AbstractMesh) -> str:
    if mesh.size == 1:
        return ""
    wanted = [axis for entry in rule.layouts[0] for axis in _axes(entry)]
    return rule.why or f"{', '.join(wanted)} of size 1"


def _fit(rule: Rule, layout: Spec, shape: Sequence[int], mesh: Mesh | AbstractMesh) -> tuple[PartitionSpec, str]:
    """`layout` without the axes that the mesh lacks or that are of size 1, and the cut that is uneven, if one is."""
    before = len(shape) - len(layout)
    units = (None,) * (len(layout) - len(rule.units)) + rule.units
    entries: list[Entry] = [None] * before
    for size, blocks, entry in zip(shape[before:], units, layout):
        axes = [axis for axis in _axes(entry) if mesh.shape.get(axis, 1) > 1]
        if (size if blocks is None else blocks) % math.prod(mesh.shape[axis] for axis in axes):
            said = f"{size}" if blocks is None else f"{blocks} blocks of {size // blocks}"
            return PartitionSpec(), f"{said} over {' x '.join(f'{axis}={mesh.shape[axis]}' for axis in axes)}"
        entries.append(tuple(axes) if len(axes) > 1 else axes[0] if axes else None)
    return PartitionSpec(*entries), ""


def _axes(entry: Entry) -> tuple[str, ...]:
    return (entry,) if isinstance(entry, str) else entry or ()


def _say_entry(entry: Any) -> str:
    return "-" if entry is None else entry if isinstance(entry, str) else "+".join(entry)


def _name(path: tuple[Any, ...]) -> str:
    return jax.tree_util.keystr(path, simple=True, separator="/")
