"""Which bytes move between devices, over what, and what runs meanwhile."""

import dataclasses
from collections import Counter
from collections.abc import Iterator

import numpy as np
from jax.sharding import Mesh

from jaxfw.core import hlo
from jaxfw.core.replay import Span, Timeline, members_of, wire_bytes

CALLS = {
    "__gpu$xla.gpu.triton": "Pallas kernel (Triton)",
    "mosaic_gpu": "Pallas kernel (Mosaic)",
    "__cudnn$fmha": "cuDNN attention",
    "__cublas": "cuBLAS",
}


OTHER = "other fusion"


@dataclasses.dataclass(frozen=True)
class Flow:
    """Collectives of one kind over the same axes: how often, and the bytes that a device sends in all."""

    kind: str
    axes: str
    link: str
    times: int
    bytes: int


def flows(text: str, mesh: Mesh) -> list[Flow]:
    """Collectives by kind, axes and link, largest first."""
    program, found = hlo.program(text), Counter[tuple[str, str, str]]()
    times: Counter[tuple[str, str, str]] = Counter()
    for collective in hlo.collectives(text):
        begin = collective.instruction
        members = members_of(begin.line)
        key = (collective.kind, axes_of(members, mesh), link_of(members, mesh))
        sent = wire_bytes(collective.kind, program.operand_bytes(begin), len(members))
        found[key] += int(sent) * collective.times
        times[key] += collective.times
    return [Flow(*key, times[key], count) for key, count in found.most_common()]


def axes_of(members: list[int], mesh: Mesh) -> str:
    """The mesh axes along which the members of a group differ: "data+fsdp"."""
    places = np.array(np.unravel_index(members, mesh.devices.shape))
    differ = (places != places[:, :1]).any(axis=1)
    return "+".join(name for name, does in zip(mesh.axis_names, differ, strict=True) if does) or "-"


def link_of(members: list[int], mesh: Mesh) -> str:
    """`intra` where all members share a host."""
    devices = mesh.devices.flat
    return "intra" if len({devices[member].process_index for member in members}) == 1 else "inter"


def kernels(text: str) -> dict[str, int]:
    """What does the work: calls of kernels and libraries, products that XLA makes kernels of, and all other kernels."""
    found: Counter[str] = Counter()
    for name, _, times in _kernels(text):
        found[name] += times
    return dict(found.most_common())


def sources(text: str) -> dict[tuple[str, str], int]:
    """Of calls and products how often each runs, by kernel and by the part of the model that it comes from."""
    found: Counter[tuple[str, str]] = Counter()
    for name, source, times in _kernels(text):
        if name != OTHER:
            found[name, source or "-"] += times
    return dict(found.most_common())


def _kernels(text: str) -> Iterator[tuple[str, str, int]]:
    program = hlo.program(text)
    fused = {name for i in hlo.instructions(text) if i.opcode == "fusion" for name in i.called.get("calls", ())}
    for i in hlo.instructions(text):
        if i.computation in fused:
            continue
        if i.target:
            name = next((name for start, name in CALLS.items() if i.target.startswith(start)), i.target)
            yield name, i.source, i.times
        elif i.opcode == "fusion":
            yield "product fused by XLA" if program.flops(i) else OTHER, i.source, i.times


@dataclasses.dataclass(frozen=True)
class Overlap:
    """A collective of the replay: how often it runs, and once how long, in seconds.

    `hidden` of that run beside useful work, which is `beside` it the first time.
    """

    name: str
    kind: str
    source: str
    link: str
    begin: float
    times: int
    seconds: float
    hidden: float
    beside: tuple[str, ...]


def overlaps(text: str, timeline: Timeline) -> list[Overlap]:
    """Every collective instruction, in the order in which they first begin; means over its runs."""
    kinds = {collective.instruction.name: collective.kind for collective in hlo.collectives(text)}
    runs: dict[str, list[Span]] = {}
    for span in timeline.spans:
        if span.kind == "collective":
            runs.setdefault(span.name, []).append(span)
    found = [
        Overlap(
            name, kinds.get(name, "collective"), spans[0].source, spans[0].link, spans[0].begin, len(spans),
            sum(span.seconds for span in spans) / len(spans), sum(map(timeline.covered, spans)) / len(spans),
            tuple(other.source or other.name for other in timeline.during(spans[0])),
        )
        for name, spans in runs.items()
    ]  # fmt: skip
    return sorted(found, key=lambda one: one.begin)
