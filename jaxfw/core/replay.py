"""A scheduled program played through a model of the machine: when what would run, and what hides what. Predicted.

Kernels run one after another, as the program lists them; collectives run beside them on streams of their own, from
where they start until their `-done` is waited for. A kernel takes the longer of its arithmetic and its memory traffic,
a collective its latency and its bytes on the wire: `Profile` has the rates. Loops are played as often as the compiler
knows them to run, of a conditional the branch that takes longest.

    timeline = replay(compiled.text, PROFILES["h200"], gpus_per_host=8, streams=compiled.streams)
    timeline.seconds, timeline.hidden("inter"), timeline.overlaps()
"""

import copy
import dataclasses
import math
import re
from collections.abc import Mapping, Sequence
from typing import Literal

import numpy as np

from jaxfw.core import hlo
from jaxfw.core.errors import InputError, unknown

Streams = Literal["link", "one"] | Mapping[str, str]
Kind = Literal["gemm", "kernel", "collective", "copy"]
LINKS = ("inter", "intra", "host")

# No kernel: names for what is there already.
FREE = frozenset(
    "parameter constant bitcast tuple get-tuple-element after-all opt-barrier partition-id replica-id domain".split()
)
# One kernel each, unless fused: their bytes are read and written.
KERNELS = frozenset(
    "fusion custom-call dot copy transpose broadcast reduce reduce-window concatenate slice dynamic-slice "
    "dynamic-update-slice gather scatter sort iota pad select convert add subtract multiply divide maximum minimum "
    "exponential log rsqrt sqrt tanh negate abs compare and or not xor power remainder reverse reshape clamp cholesky "
    "triangular-solve rng-bit-generator rng-get-and-update-state rng topk".split()
)
CALLS = ("__cublas", "__cudnn$fmha", "__gpu$xla.gpu.triton", "mosaic_gpu", "__cub$", "__gpu$TopK")
SYNCHRONOUS = '"is_sync":true'  # how XLA marks a collective that kernels wait for: nothing could run beside it
_GROUPS = re.compile(r"replica_groups=\{?\{([\d,]*)\}")
_IOTA = re.compile(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?")
_MESH = re.compile(r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\(\[([\d,]+)\](?:T\(([\d,]+)\))?\))? ?\{([^}]*)\}")
_PAIRS = re.compile(r"source_target_pairs=\{\{(\d+),(\d+)\}")


@dataclasses.dataclass(frozen=True)
class Link:
    """Seconds before the first byte, and bytes a second and GPU from then on."""

    latency: float
    bandwidth: float


@dataclasses.dataclass(frozen=True)
class Profile:
    """What a machine does in a second, as programs reach it rather than as data sheets say it."""

    inter: Link
    intra: Link
    host: Link
    flops: float  # of matrix products in 16 bits
    memory: float  # bytes read and written
    launch: float  # seconds of each kernel beside that

    def link(self, name: str) -> Link:
        """`inter` between hosts, `intra` inside of one, `host` to its memory."""
        return getattr(self, name)


# Ethernet or InfiniBand at 400 Gb/s a GPU, NVLink 4, PCIe 5; a GEMM at 70 % of the peak, memory at 83 %.
PROFILES = {
    "h200": Profile(
        inter=Link(15e-6, 45e9),
        intra=Link(10e-6, 370e9),
        host=Link(10e-6, 55e9),
        flops=700e12,
        memory=4e12,
        launch=3e-6,
    ),
}


@dataclasses.dataclass(frozen=True)
class Span:
    """An instruction that runs from `begin` to `end`, in seconds; `source` is what it was traced from.

    Of collectives and copies, `link` is what they go over; it is empty for kernels.
    """

    name: str
    source: str
    kind: Kind
    link: str
    begin: float
    end: float
    bytes: int

    @property
    def seconds(self) -> float:
        """How long."""
        return self.end - self.begin


@dataclasses.dataclass(frozen=True)
class Timeline:
    """A predicted run, of one device."""

    spans: tuple[Span, ...]

    @property
    def seconds(self) -> float:
        """From the first instruction to the end of the last."""
        return max((span.end for span in self.spans), default=0.0)

    def busy(self, *kinds: Kind) -> float:
        """Seconds of all spans of these kinds, together."""
        return sum(span.seconds for span in self.spans if span.kind in kinds)

    def hidden(self, *links: str) -> float:
        """The share of these links' busy time (all links', by default) that useful work covers; nan without any.

        Useful work is a matrix product, or a collective on another link.
        """
        mine = [span for span in self.spans if span.link and (not links or span.link in links)]
        total = sum(span.seconds for span in mine)
        return sum(self.covered(span) for span in mine) / total if total else math.nan

    def covered(self, span: Span) -> float:
        """Seconds of a collective during which useful work runs."""
        at, found = span.begin, 0.0
        for other in self.during(span):
            begin, end = max(at, other.begin), min(span.end, other.end)
            found, at = found + max(0.0, end - begin), max(at, end)
        return found

    def during(self, span: Span) -> list[Span]:
        """The useful work beside a collective, in its order."""
        others = (s for s in self.spans if s.kind == "gemm" or (s.link and s.link != span.link))
        return sorted((s for s in others if s.begin < span.end and s.end > span.begin), key=lambda s: s.begin)


def replay(
    text: str, profile: Profile, *, gpus_per_host: int, streams: Streams = "one", unknown_trips: int | None = None
) -> Timeline:
    """Play scheduled HLO, as `jaxfw.core.aot.Compiled.text` holds it.

    Args:
        text: the program.
        profile: the machine.
        gpus_per_host: devices i with equal i // gpus_per_host share a host.
        streams: which collectives wait for each other: those of one stream, as `Compiled.streams` names them ("one"
            where it names none); "link" lets those of different links run at once, "one" none.
        unknown_trips: how often loops run of which the compiler does not know it.

    Raises:
        InputError: collectives that do not start and end apart from each other, or an instruction that moves bytes and
            whose cost is not known: a figure without them would be wrong.
    """
    if isinstance(streams, str) and streams not in ("link", "one"):
        raise unknown("streams", streams, ("link", "one"))
    if gpus_per_host < 1:
        raise InputError(f"gpus_per_host={gpus_per_host} must be at least 1.")
    player = _Player(hlo.program(text), profile, gpus_per_host, streams, unknown_trips)
    player.play(player.program.entry)
    return Timeline(tuple(player.spans))


@dataclasses.dataclass
class _Player:
    program: hlo.Program
    profile: Profile
    gpus_per_host: int
    streams: Streams
    unknown_trips: int | None
    clock: float = 0.0
    free: dict[str, float] = dataclasses.field(default_factory=dict)
    ends: dict[str, float] = dataclasses.field(default_factory=dict)
    spans: list[Span] = dataclasses.field(default_factory=list)

    def play(self, computation: str) -> None:
        for instruction in self.program.computations[computation]:
            self.take(instruction)

    def take(self, i: hlo.Instruction) -> None:
        opcode = i.opcode
        if opcode in FREE:
            return
        if opcode == "while":
            for _ in range(self._trips(i)):
                self.play(i.called["body"][0])
        elif opcode == "conditional":
            self._longest([name for names in i.called.values() for name in names])
        elif opcode == "call":
            self.play(i.called["to_apply"][0])
        elif opcode == "fusion-start":
            # A kernel that starts beside others shares their processors and memory: as if in turn.
            self._kernel(dataclasses.replace(i, opcode="fusion", line=i.line.replace(" fusion-start(", " fusion(", 1)))
            self.ends[i.name] = self.clock
        elif opcode.endswith("-start"):
            self._start(i)
        elif opcode.endswith("-done"):
            self.clock = max(self.clock, self.ends[self._begun(i)])
        elif opcode.endswith("-update"):
            self.ends[i.name] = self.ends[self._begun(i)]
        elif opcode in hlo.COLLECTIVES and SYNCHRONOUS in i.line:
            self._start(i)
            self.clock = max(self.clock, self.ends[i.name])
        elif opcode in hlo.COLLECTIVES:
            raise InputError(
                f"{i.name} ({opcode} in {i.computation}) has no start and done, and is not marked as one that "
                "kernels wait for: no GPU runs it so. Replay what jaxfw.core.aot compiled for GPUs."
            )
        elif opcode in KERNELS:
            self._kernel(i)
        elif i.bytes:
            raise InputError(f"{i.name} is {opcode!r}, which moves {i.bytes:,} bytes at an unknown cost: add it here.")

    def _begun(self, i: hlo.Instruction) -> str:
        name = i.operands[0] if i.operands else ""
        if name not in self.ends:
            raise InputError(f"{i.name} ({i.opcode}) waits for {name or 'nothing'}, which was not started.")
        return name

    def _kernel(self, i: hlo.Instruction) -> None:
        target = i.target
        if target is not None and not target.startswith(CALLS):
            raise InputError(f"{i.name} calls {target!r}, whose cost is not known: add it here.")
        moved = self.program.moved_bytes(i)
        products = self.program.flops(i)
        seconds = max(products / self.profile.flops, moved / self.profile.memory) + self.profile.launch
        self._span(i, "gemm" if products else "kernel", "", self.clock, seconds, moved)
        self.clock += seconds

    def _start(self, i: hlo.Instruction) -> None:
        for kind, moved in self._wrapped(i):
            if kind == "copy":
                link, wire = "host", self.program.operand_bytes(moved)
            elif kind in hlo.COLLECTIVES:
                size, link = self._group(moved)
                wire = wire_bytes(kind, self.program.operand_bytes(moved), size)
            else:
                raise InputError(f"{moved.name} is {moved.opcode!r}, beside kernels at an unknown cost: add it here.")
            rate = self.profile.link(link)
            stream = self._stream(i.name, link)
            begin = max(self.clock, self.free.get(stream, 0.0))
            seconds = rate.latency + wire / rate.bandwidth
            self.free[stream] = self.ends[i.name] = begin + seconds
            self._span(i, "copy" if kind == "copy" else "collective", link, begin, seconds, int(wire))

    def _stream(self, name: str, link: str) -> str:
        if isinstance(self.streams, str):
            return link if self.streams == "link" else "one"
        return self.streams.get(name, "one")

    def _wrapped(self, i: hlo.Instruction) -> Sequence[tuple[str, hlo.Instruction]]:
        """What an asynchronous instruction runs: itself, or the collectives in the computation that it wraps."""
        if i.opcode != "async-start":
            return [(i.opcode.removesuffix("-start"), i)]
        (name,) = i.called["calls"]
        return [(x.opcode, x) for x in self.program.computations[name] if x.opcode not in FREE]

    def _group(self, i: hlo.Instruction) -> tuple[int, str]:
        """How many devices take part, and over which link."""
        members = members_of(i.line)
        hosts = {member // self.gpus_per_host for member in members}
        return len(members), "intra" if len(hosts) == 1 else "inter"

    def _trips(self, i: hlo.Instruction) -> int:
        known = i.trips if i.trips is not None else self.unknown_trips
        if known is None:
            raise InputError(f"{i.name} is a loop whose length the compiler does not know: give unknown_trips=.")
        return known

    def _longest(self, branches: Sequence[str]) -> None:
        played = []
        for name in branches:
            other = dataclasses.replace(self, free=dict(self.free), ends=dict(self.ends), spans=copy.copy(self.spans))
            other.play(name)
            played.append(other)
        longest = max(played, key=lambda other: other.clock)
        self.clock, self.free, self.ends, self.spans = longest.clock, longest.free, longest.ends, longest.spans

    def _span(self, i: hlo.Instruction, kind: Kind, link: str, begin: float, seconds: float, moved: int) -> None:
        self.spans.append(Span(i.name, i.source, kind, link, begin, begin + seconds, moved))


def wire_bytes(kind: str, given: int, size: int) -> float:
    """Bytes that a device sends in a collective over `size` devices, of `given` bytes of input.

    >>> wire_bytes("all-gather", 100, 4), wire_bytes("reduce-scatter", 100, 4), wire_bytes("all-reduce", 100, 4)
    (300, 75.0, 150.0)
    """
    share = (size - 1) / size
    return {
        "all-gather": (size - 1) * given, "reduce-scatter": share * given, "all-to-all": share * given,
        "ragged-all-to-all": share * given, "all-reduce": 2 * share * given,
    }.get(kind, given)  # fmt: skip


def members_of(line: str) -> list[int]:
    """The devices of an instruction's first group, in any of the three ways in which XLA writes groups.

    >>> members_of("replica_groups={{0,8},{1,9}}, dimensions={0}"), members_of("replica_groups=[2,4]<=[4,2]T(1,0)")
    ([0, 8], [0, 2, 4, 6])
    >>> members_of("replica_groups=mesh['a'=2,'b'=4] {'a'}, dimensions={0}")
    [0, 4]
    >>> members_of("replica_groups=mesh['a'=2,'b'=2], device_ids=([2,2]T(1,0)) {'b'}, dimensions={0}")
    [0, 2]
    """
    if found := _GROUPS.search(line):
        return [int(x) for x in found[1].split(",") if x]
    if found := _IOTA.search(line):
        shape, source, order = ([int(x) for x in part.split(",")] if part else None for part in found.groups())
        assert shape and source
        ids = np.arange(math.prod(source)).reshape(source)
        return (ids.transpose(order) if order else ids).reshape(shape)[0].tolist()
    if found := _MESH.search(line):
        return _mesh_members(*found.groups())
    if found := _PAIRS.search(line):
        return [int(found[1]), int(found[2])]
    raise InputError(f"a collective names no devices, or in a way that is not known here: {line:.160}")


def _mesh_members(sizes: str, source: str | None, order: str | None, axes: str) -> list[int]:
    """Of a mesh `'a'=2,'b'=4`, the first group along `'a'`, or along a part of an axis: `'b':(2)2`.

    The devices stand in it in their order, or in that of a transposed array.
    """
    names = dict(re.findall(r"'([^']+)'=(\d+)", sizes))
    shape = [int(size) for size in names.values()]
    place: list[slice | int] = [0] * len(shape)
    ids = np.arange(math.prod(shape))
    if source:
        ids = ids.reshape([int(size) for size in source.split(",")])
        ids = ids.transpose([int(axis) for axis in order.split(",")]) if order else ids
    ids = ids.reshape(shape)
    chosen = re.findall(r"'([^']+)'(?::\((\d+)\)(\d+))?", axes)
    for name, before, size in chosen:
        at = list(names).index(name)
        step = 1 if not size else shape[at] // (int(before) * int(size))
        place[at] = slice(0, step * int(size) if size else None, step)
    return ids[tuple(place)].ravel().tolist()
