"""What a device holds while a program runs, by part, and the largest of it by name."""

import dataclasses
import math
from collections.abc import Iterator

import jax

from jaxfw.audit.programs import Program
from jaxfw.core import aot, hlo
from jaxfw.core.replay import FREE
from jaxfw.core.shapes import PyTree
from jaxfw.core.targets import Chip

USABLE = 0.95  # of a chip's memory: the rest is CUDA's, NCCL's, and what allocation leaves in gaps
NAMED = 8


@dataclasses.dataclass(frozen=True)
class Account:
    """Bytes of one device.

    `parts` are the arguments by their names; `results` are outputs that lie nowhere else; `largest` the largest
    arrays, those of arguments by their paths, those in between by the instruction that makes them.
    """

    parts: dict[str, int]
    results: int
    temporaries: int
    capacity: int
    largest: tuple[tuple[str, int], ...]

    @property
    def total(self) -> int:
        """All of it."""
        return sum(self.parts.values()) + self.results + self.temporaries

    @property
    def fits(self) -> bool:
        """Whether a device has so much to give."""
        return self.total <= self.capacity

    def causes(self, count: int = 3) -> list[tuple[str, int]]:
        """The largest parts, in falling order."""
        named = {**self.parts, "temporaries": self.temporaries, "results": self.results}
        return sorted(named.items(), key=lambda item: -item[1])[:count]


def account(program: Program, compiled: aot.Compiled, chip: Chip) -> Account:
    """What the compiled program takes of a chip."""
    parts = {name: held_bytes(tree) for name, tree in program.parts.items()}
    other = compiled.bytes.arguments - sum(parts.values())
    if other > 0:
        parts["other arguments"] = other
    leaves = [
        (f"{name}{jax.tree_util.keystr(path, simple=True, separator='/') and '/'}"
         f"{jax.tree_util.keystr(path, simple=True, separator='/')}", held_bytes(leaf))
        for name, tree in program.parts.items()
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    ]  # fmt: skip
    made = [(f"{i.source or i.name} ({i.opcode})", i.bytes) for i in _made(compiled.text)]
    largest = sorted([*leaves, *made], key=lambda item: -item[1])[:NAMED]
    return Account(parts, compiled.bytes.outputs, compiled.bytes.temporaries, int(USABLE * chip.memory), tuple(largest))


def held_bytes(tree: PyTree) -> int:
    """Bytes of one device's shards."""
    total = 0
    for leaf in jax.tree.leaves(tree):
        shape = leaf.sharding.shard_shape(leaf.shape) if leaf.sharding is not None else leaf.shape
        total += math.prod(shape) * leaf.dtype.itemsize
    return total


def _made(text: str) -> Iterator[hlo.Instruction]:
    """What is computed outside of fusions, loops' bodies included; what only passes arrays on is left out."""
    fused = {name for i in hlo.instructions(text) if i.opcode == "fusion" for name in i.called.get("calls", ())}
    passed_on = {*FREE, "while", "conditional", "call"}
    for i in hlo.instructions(text):
        if i.computation not in fused and i.opcode not in passed_on and not i.opcode.endswith(("-start", "-update")):
            yield i
