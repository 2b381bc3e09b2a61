"""Every kernel at the named shapes of real models, compiled for an H200: does it lower, fit, and keep to its registers?

    JAX_PLATFORMS=cpu python -m experiments.kernels      # needs no GPU: pip install 'jaxfw[aot]'

The PTX of each program goes through `ptxas -v`; shared memory and the list of launches are those of XLA's schedule.
`experiments/results/kernels.json` has a section for each version of jax, and a run replaces its own. What is compiled
is not measured: nothing here says how fast a kernel is.
"""

import contextlib
import dataclasses
import functools
import importlib.util
import json
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import jax

from jaxfw.core import aot, hlo, runtime
from jaxfw.core.errors import InputError
from jaxfw.core.workdir import write_json
from pallas_kernels import decode_attention
from pallas_kernels._shapes import DECODE_SHAPES, DecodeShape
from pallas_kernels.decode_attention import Config

RESULTS = Path(__file__).parent / "results" / "kernels.json"
TARGET, ARCH = "h200:1x1x1", "sm_90a"
TRITON = "__gpu$xla.gpu.triton"
# Of one multiprocessor of an H100 or H200; a block of threads also takes 1 KiB of shared memory for itself.
REGISTERS, SHARED_MEMORY, RESERVED = 65536, 233472, 1024

_LAUNCH = re.compile(r"\] (\S+) grid: \[(\d+), (\d+), (\d+)\] threads: \[(\d+), .*shared_memory: (\d+) bytes")
_REGISTERS = re.compile(r"Used (\d+) registers")
_SPILLS = re.compile(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads")


@dataclasses.dataclass(frozen=True)
class Variant:
    """How an operation is asked for, beside its shape; `everywhere` at all shapes, else at one of each model."""

    name: str
    dtype: str = "bfloat16"
    return_mass: bool = False
    window: int | None = None
    everywhere: bool = False


VARIANTS = (
    Variant("plain", everywhere=True),
    Variant("mass", return_mass=True, everywhere=True),
    Variant("window", window=1024),
    Variant("float32", dtype="float32"),
)
ONCE = "/8x32768"  # the shape of each model that the other variants are compiled at


@dataclasses.dataclass(frozen=True)
class Audit:
    """What the compilers say of one kernel in one program; `launches` are all kernels of the program, in order."""

    programs: int
    threads: int
    registers: int
    spilled_bytes: int
    stack_bytes: int
    shared_memory: int
    launches: tuple[str, ...]

    @property
    def resident(self) -> int:
        """Programs that a multiprocessor holds at once."""
        by_registers = REGISTERS // (self.registers * self.threads)
        return min(by_registers, SHARED_MEMORY // (self.shared_memory + RESERVED), 2048 // self.threads)


def audit(fn: Any, *args: Any, kernel: str) -> Audit:
    """Compile `fn` for one H200 and look at its kernel of that name.

    Raises:
        InputError: the program holds no such kernel; ptxas or another part of `jaxfw[aot]` is missing.
    """
    with tempfile.TemporaryDirectory() as folder:
        options = {"xla_dump_to": folder, "xla_dump_emitter_re": "ptx", "xla_dump_hlo_as_text": True}
        compiled = aot.compile(fn, *args, mesh=aot.cluster(TARGET), compiler_options=options)
        dumped = {path.name: path.read_text() for path in Path(folder).iterdir()}
    calls = hlo.custom_calls(compiled.text).get(TRITON, 0)
    ptx = next((text for text in dumped.values() if f".entry {kernel}(" in text and text.startswith("//")), None)
    if calls != 1 or ptx is None:
        raise InputError(f"expected one Triton call, named {kernel!r}: the program has {calls}.")
    launches = [found.groups() for name, text in dumped.items() if name.endswith("thunk_sequence.txt")
                for found in _LAUNCH.finditer(text)]  # fmt: skip
    _, *grid, threads, shared = next(launch for launch in launches if launch[0] == kernel)
    registers, stack, spilled = read_ptxas(assemble(ptx))
    programs = int(grid[0]) * int(grid[1]) * int(grid[2])
    names = tuple(launch[0] for launch in launches)
    return Audit(programs, int(threads), registers, spilled, stack, int(shared), names)


def assemble(ptx: str) -> str:
    """What `ptxas -v` says of a PTX text."""
    with tempfile.NamedTemporaryFile("w", suffix=".ptx") as file:
        file.write(ptx)
        file.flush()
        command = [find_ptxas(), "-v", f"-arch={ARCH}", file.name, "-o", "/dev/null"]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    return done.stdout + done.stderr


def read_ptxas(said: str) -> tuple[int, int, int]:
    """(registers a thread, bytes of stack, bytes of spill stores and loads) of the one kernel that `ptxas -v` saw.

    >>> read_ptxas("0 bytes stack frame, 4 bytes spill stores, 8 bytes spill loads; Used 72 registers")
    (72, 0, 12)
    """
    (registers,), (spills,) = _REGISTERS.findall(said), _SPILLS.findall(said)
    stack, stores, loads = (int(number) for number in spills)
    return int(registers), stack, stores + loads


@functools.cache
def find_ptxas() -> str:
    """The ptxas of the wheel nvidia-cuda-nvcc, else that on PATH."""
    with contextlib.suppress(ModuleNotFoundError):
        spec = importlib.util.find_spec("nvidia.cu13")
        for folder in (spec.submodule_search_locations or ()) if spec else ():
            if (Path(folder) / "bin" / "ptxas").exists():
                return str(Path(folder) / "bin" / "ptxas")
    found = shutil.which("ptxas")
    if not found:
        raise InputError(f"ptxas is missing: {aot.INSTALL}, or put CUDA's bin folder on PATH.")
    return found


def audit_decode(shape: DecodeShape, variant: Variant) -> Audit:
    """`decode_attention` of one shape."""
    q = jax.ShapeDtypeStruct((shape.B, shape.H, shape.d), variant.dtype)
    k = jax.ShapeDtypeStruct((shape.B, shape.K, shape.S, shape.d), variant.dtype)
    lengths = jax.ShapeDtypeStruct((shape.B,), "int32")

    def decode(q, k, v, lengths):
        options = {"window": variant.window, "return_mass": variant.return_mass}
        return decode_attention(q, k, v, lengths=lengths, scale=shape.d**-0.5, **options)

    return audit(decode, q, k, k, lengths, kernel="decode_attention")


def decode_row(name: str, shape: DecodeShape, variant: Variant) -> dict[str, Any]:
    """One row of the table."""
    found = audit_decode(shape, variant)
    itemsize = jax.numpy.dtype(variant.dtype).itemsize
    config = Config.for_shape(B=shape.B, K=shape.K, S=shape.S, d=shape.d, itemsize=itemsize)
    return {
        "kernel": "decode_attention", "shape": name, "variant": variant.name, **dataclasses.asdict(config),
        **dataclasses.asdict(found), "launches": len(found.launches), "resident": found.resident,
        "ok": found.spilled_bytes == 0,
    }  # fmt: skip


def run() -> dict[str, Any]:
    """All shapes and variants on this version of jax."""
    wanted = [(name, v) for name in DECODE_SHAPES for v in VARIANTS if v.everywhere or name.endswith(ONCE)]
    rows = [decode_row(name, DECODE_SHAPES[name], v) for name, v in wanted]
    return {"environment": runtime.environment(), "target": TARGET, "ok": all(row["ok"] for row in rows), "rows": rows}


def main() -> int:
    """Print the table, write this version's section; 1 when a kernel spills, 2 when nothing can be compiled here."""
    reason = aot.missing()
    if reason:
        print(f"error: {reason}", file=sys.stderr)
        return 2
    report = run()
    print(f"jax {jax.__version__}, compiled for {TARGET}")
    print(f"{'shape':42}{'variant':9}registers spilled shared programs resident")
    for row in report["rows"]:
        print(f"{row['shape']:42}{row['variant']:9}{row['registers']:9}{row['spilled_bytes']:8}"
              f"{row['shared_memory']:7}{row['programs']:9}{row['resident']:9}")  # fmt: skip
    sections = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.exists() else {}
    write_json(RESULTS, dict(sorted((sections | {jax.__version__: report}).items())))
    return 0 if report["ok"] else 1


if __name__ == "__main__":
    sys.exit(main())
