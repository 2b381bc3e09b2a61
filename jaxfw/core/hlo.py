"""Reading a compiled program's text (scheduled HLO): what it runs, how often, and which bytes it moves between devices.

Instructions are found in every computation: bodies of loops, fusions, asynchronous wrappers. `times` counts how often
one runs in one run of the program: a loop's body as often as the compiler knows it to (1 where it does not), each
branch of a conditional once.
"""

import collections
import dataclasses
import functools
import math
import re
from collections.abc import Iterator, Mapping

COLLECTIVES = (
    "all-gather", "all-reduce", "reduce-scatter", "all-to-all", "ragged-all-to-all", "collective-permute",
    "collective-broadcast",
)  # fmt: skip

_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\) -> .* \{$")
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?([\w.\-]+) = (\(.*?\)|\S+) ([\w\-]+)\((.*)$")
_ARRAY = re.compile(r"\b([a-z]+\d*\w*)\[([\d,]*)\]")
_BODIES = re.compile(
    r"\b(body|condition|calls|to_apply|true_computation|false_computation|branch_computations|called_computations)="
    r"(\{[^}]*\}|%?[\w.\-]+)"
)
_CONTRACTED = re.compile(r'lhs_contracting_dim(?:ension)?s(?:=\{|":\[)([\d,"]*)')
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')
_STARTED = re.compile(r"-done\((?:[^%)]*%)?([\w.\-]+)\)")
_SOURCE = re.compile(r'op_name="([^"]*)"')
_TARGET = re.compile(r'custom_call_target="([^"]*)"')


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One instruction; `arrays` are those of its result, (type, shape) each, as one device holds them."""

    name: str
    opcode: str
    arrays: tuple[tuple[str, tuple[int, ...]], ...]
    computation: str
    times: int
    line: str

    @property
    def bytes(self) -> int:
        """Bytes of the result on one device, once."""
        return sum(_array_bytes(*array) for array in self.arrays)

    @property
    def source(self) -> str:
        """What in the traced program it comes from, "jvp(Head)/dot_general" say; "" where nobody knows.

        The end of a path, and of what was combined the first and how many more.
        """
        found = _SOURCE.search(self.line)
        if not found:
            return ""
        first, *more = found[1].partition("/")[2].removeprefix("(").removesuffix(")").split(":")
        return "/".join(first.split("/")[-3:]) + (f" and {len(more)} more" if more else "")

    @property
    def operands(self) -> tuple[str, ...]:
        """Names of what it takes, in order."""
        given, depth = self.line.split(f" {self.opcode}(", 1)[1], 1
        for end, character in enumerate(given):
            depth += (character in "([{") - (character in ")]}")
            if not depth:
                return tuple(re.findall(r"%([\w.\-]+)", given[:end]))
        return ()

    @property
    def called(self) -> dict[str, tuple[str, ...]]:
        """The computations that it runs, by the attribute that names them: body, condition, calls, to_apply, ..."""
        return {kind: tuple(re.findall(r"[\w.\-]+", names)) for kind, names in _BODIES.findall(self.line)}

    @property
    def trips(self) -> int | None:
        """How often a loop runs its body, where the compiler knows it."""
        found = _TRIPS.search(self.line) if self.opcode == "while" else None
        return int(found[1]) if found else None

    @property
    def target(self) -> str | None:
        """What a custom call calls."""
        found = _TARGET.search(self.line) if self.opcode.startswith("custom-call") else None
        return found[1] if found else None


@dataclasses.dataclass(frozen=True)
class Collective:
    """A collective operation: the bytes of its result on one device, once, and how often it runs.

    `instruction` is where it starts.
    """

    kind: str
    bytes: int
    times: int
    instruction: Instruction


@dataclasses.dataclass(frozen=True, eq=False)
class Program:
    """The computations that are run, each in its order, and the name of the one that begins."""

    computations: dict[str, tuple[Instruction, ...]]
    entry: str

    @functools.cached_property
    def _by_name(self) -> dict[tuple[str, str], Instruction]:
        return {(name, i.name): i for name, found in self.computations.items() for i in found}

    def operands(self, instruction: Instruction) -> list[Instruction]:
        """What it takes."""
        return [self._by_name[instruction.computation, name] for name in instruction.operands]

    def operand_bytes(self, instruction: Instruction) -> int:
        """Bytes of what it takes, on one device."""
        return sum(x.bytes for x in self.operands(instruction))

    def moved_bytes(self, instruction: Instruction) -> int:
        """Bytes that a kernel reads and writes: all that it takes and gives, but of what it slices the slice.

        A loop over stacked layers hands whole stacks to kernels that read one layer or write one in its place.
        """
        body = (instruction,)
        if instruction.opcode == "fusion":
            (name,) = instruction.called["calls"]
            body = self.computations[name]
        return self._read(instruction, body) + self._written(body[-1], body)

    def _read(self, instruction: Instruction, body: tuple[Instruction, ...]) -> int:
        if instruction.opcode != "fusion":
            given = self.operands(instruction)
            return sum(_taken(instruction, place, x.bytes) for place, x in enumerate(given))
        total, users = 0, collections.defaultdict(list)
        for i in body:
            for place, name in enumerate(i.operands):
                users[name].append((i, place))
        for i in body:
            if i.opcode == "parameter":
                # Several slices may overlap: never more than the whole.
                total += min(i.bytes, sum(_taken(user, place, i.bytes) for user, place in _through(users, i.name)))
        return total

    def _written(self, root: Instruction, body: tuple[Instruction, ...]) -> int:
        if root.opcode in ("bitcast", "tuple") and len(body) > 1:
            return sum(self._written(i, body) for i in self.operands(root))
        if root.opcode == "dynamic-update-slice":
            return self.operands(root)[1].bytes
        if root.opcode == "scatter":
            return sum(x.bytes for x in self.operands(root)[-len(root.arrays) :])
        return 0 if root.opcode == "parameter" else root.bytes

    def flops(self, instruction: Instruction) -> int:
        """Operations of matrix products in it or in the fusion that it is: two for each number that is multiplied.

        Attention kernels of cuDNN count as the two products of each query with every key, causal ones too.
        """
        if instruction.opcode == "fusion":
            return sum(self.flops(i) for name in instruction.called["calls"] for i in self.computations[name])
        target = instruction.target or ""
        if instruction.opcode == "dot" or target.startswith("__cublas"):
            found = _CONTRACTED.search(instruction.line)
            sizes = self.operands(instruction)[0].arrays[0][1]
            contracted = [int(n) for n in found[1].replace('"', "").split(",") if n] if found else []
            return 2 * math.prod(instruction.arrays[0][1]) * math.prod(sizes[n] for n in contracted)
        if target.startswith("__cudnn$fmha"):
            q, k = (x.arrays[0][1] for x in self.operands(instruction)[:2])
            return (10 if "Backward" in target else 4) * math.prod(q) * k[1]
        return 0


@functools.lru_cache(maxsize=8)
def program(text: str) -> Program:
    """The program with its structure."""
    held: dict[str, list[Instruction]] = collections.defaultdict(list)
    for instruction in instructions(text):
        held[instruction.computation].append(instruction)
    return Program({name: tuple(found) for name, found in held.items()}, _computations(text)[1])


@functools.lru_cache(maxsize=8)
def instructions(text: str) -> tuple[Instruction, ...]:
    """Every instruction of every computation that the entry reaches, in the text's order."""
    bodies, entry = _computations(text)
    times = _times(bodies, entry)
    return tuple(
        Instruction(name, opcode, _arrays(shape), computation, times[computation], line)
        for computation, found in bodies.items()
        if computation in times
        for name, shape, opcode, line in found
    )


def custom_calls(text: str) -> dict[str, int]:
    """How often each custom-call target is called in one run."""
    counts: collections.Counter[str] = collections.Counter()
    for instruction in instructions(text):
        if instruction.target:
            counts[instruction.target] += instruction.times
    return dict(counts)


def collectives(text: str) -> tuple[Collective, ...]:
    """The collective operations; an asynchronous one (a start and a done) once, with the bytes of what is done."""
    found = {instruction.name: instruction for instruction in instructions(text)}
    listed = []
    for instruction in found.values():
        kind = instruction.opcode.removesuffix("-done")
        if kind in COLLECTIVES:
            started = _STARTED.search(instruction.line) if instruction.opcode != kind else None
            begin = found.get(started[1], instruction) if started else instruction
            listed.append(Collective(kind, instruction.bytes, instruction.times, begin))
    return tuple(listed)


def _computations(text: str) -> tuple[dict[str, list[tuple[str, str, str, str]]], str]:
    bodies: dict[str, list[tuple[str, str, str, str]]] = {}
    entry = current = ""
    for line in text.splitlines():
        header = _COMPUTATION.match(line)
        if header:
            current = header[2]
            bodies[current] = []
            entry = current if header[1] else entry
        elif current and (found := _INSTRUCTION.match(line)):
            bodies[current].append((found[1], found[2], found[3], line.strip()))
    return bodies, entry


def _times(bodies: dict[str, list[tuple[str, str, str, str]]], entry: str) -> dict[str, int]:
    """Runs of each computation: the sum over its callers, each times its own runs and the trips of its loop."""
    callers: dict[str, list[tuple[str, int]]] = collections.defaultdict(list)
    for computation, found in bodies.items():
        for _, _, opcode, line in found:
            if opcode in ("async-update", "async-done"):
                continue  # what they call is counted where it starts
            trips = _TRIPS.search(line) if opcode == "while" else None
            for _, names in _BODIES.findall(line):
                for name in re.findall(r"[\w.\-]+", names):
                    callers[name].append((computation, int(trips[1]) if trips else 1))

    @functools.cache
    def runs(computation: str) -> int:
        return 1 if computation == entry else sum(runs(caller) * trips for caller, trips in callers[computation])

    return {computation: runs(computation) for computation in bodies if runs(computation)}


def _taken(user: Instruction, place: int, given: int) -> int:
    """What an instruction reads of an operand that has so many bytes."""
    if user.opcode in ("slice", "dynamic-slice", "gather") and place == 0:
        return user.bytes
    return 0 if user.opcode in ("dynamic-update-slice", "scatter") and place == 0 else given


def _through(users: Mapping[str, list[tuple[Instruction, int]]], name: str) -> Iterator[tuple[Instruction, int]]:
    """Those that read a value, behind what only gives it another shape."""
    for user, place in users[name]:
        if user.opcode == "bitcast":
            yield from _through(users, user.name)
        else:
            yield user, place


def _arrays(shape: str) -> tuple[tuple[str, tuple[int, ...]], ...]:
    return tuple((kind, tuple(int(n) for n in sizes.split(",") if n)) for kind, sizes in _ARRAY.findall(shape))


def _array_bytes(kind: str, shape: tuple[int, ...]) -> int:
    if kind in ("token", "opaque"):
        return 0
    bits = 8 if kind == "pred" else int((re.search(r"\d+", kind) or ["8"])[0])
    return math.ceil(math.prod(shape) * bits / 8)
