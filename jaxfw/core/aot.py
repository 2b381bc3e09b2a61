"""Compile for a cluster that is not there: what a jitted function becomes on H200s, from any machine.

    mesh = cluster("h200:1x8", tensor=8)
    x = jax.ShapeDtypeStruct((8, 4096), "bfloat16", sharding=NamedSharding(mesh, PartitionSpec(None, "tensor")))
    compiled = compile(step, params, x, mesh=mesh)
    compiled.bytes.total, hlo.custom_calls(compiled.text), hlo.collectives(compiled.text)

XLA's GPU compiler needs no GPU when it is given a description of one: it is the real compiler, which refuses kernels
that need too much shared memory, schedules, and plans memory. It cannot show times. It comes with
`pip install 'jaxfw[aot]'`: jax's CUDA plugin in jax's own version, ptxas and cuDNN; neither a driver nor a GPU.

The plugin looks for a GPU when jax starts and complains where there is none; `JAX_SKIP_CUDA_CONSTRAINTS_CHECK=1` or
`JAX_PLATFORMS=cpu` in the environment keeps it quiet. Here it is loaded without that check where no driver is found.
"""

import contextlib
import ctypes.util
import dataclasses
import functools
import importlib
import importlib.util
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxfw.core.errors import InputError, unknown
from jaxfw.core.mesh import make_mesh
from jaxfw.core.targets import CHIPS

_THUNK = re.compile(r'profile_annotation: "([^"]*)"\s*thunk_id: (\d+)')
_STARTS = re.compile(r"^\s*0*(\d+): kAsyncStart .*\bstream=([^,\s]+)", flags=re.M)
INSTALL = "pip install 'jaxfw[aot]'"


@dataclasses.dataclass(frozen=True)
class Bytes:
    """Memory of one device. Outputs that reuse a donated argument count once, as arguments."""

    arguments: int
    outputs: int
    temporaries: int

    @property
    def total(self) -> int:
        """All of it; what a device needs while the program runs."""
        return self.arguments + self.outputs + self.temporaries


@dataclasses.dataclass(frozen=True)
class Compiled:
    """A program compiled for a cluster: its scheduled HLO, memory per device, and PTX where it was asked for.

    `streams` is, of what runs beside the kernels, the stream that each instruction starts on, where it was asked for.
    """

    text: str
    bytes: Bytes
    ptx: tuple[str, ...] = ()
    streams: Mapping[str, str] = dataclasses.field(default_factory=dict)


def cluster(target: str, **axes: int) -> Mesh:
    """A mesh of devices that are described, not there; `target` is "chip:hosts x GPUs per host".

    `cluster("h200:2x4", tensor=4, data=2)` is two hosts of four; a third number, in front, is of slices. Axes are those
    of `jaxfw.core.mesh.make_mesh`.

    Raises:
        InputError: an unknown chip, a malformed shape, axes that do not fit, or a package that is missing.
    """
    chip, sizes = parse_target(target)
    return make_mesh(**axes, devices=_devices(chip, "x".join(map(str, sizes))))


def parse_target(target: str) -> tuple[str, tuple[int, int, int]]:
    """Chip; slices, hosts of each, GPUs of each host.

    Raises:
        InputError: an unknown chip, or a malformed shape.

    >>> parse_target("h200:2x8")
    ('h200', (1, 2, 8))
    """
    chip, _, shape = target.partition(":")
    if chip not in CHIPS:
        raise unknown("target chip", chip, CHIPS)
    sizes = shape.split("x")
    if len(sizes) not in (2, 3) or not all(size.isdecimal() and int(size) for size in sizes):
        raise InputError(f"target={target!r} must be chip:HOSTSxGPUS, as in {chip}:1x8.")
    slices, hosts, gpus = [1] * (3 - len(sizes)) + [int(size) for size in sizes]
    return chip, (slices, hosts, gpus)


def compile(
    fn: Callable[..., Any],
    *args: Any,
    mesh: Mesh,
    compiler_options: Mapping[str, Any] | None = None,
    dump_ptx: bool = False,
    dump_streams: bool = False,
) -> Compiled:
    """`fn` (a function, or a jitted one with its donations and static arguments) compiled for the devices of `mesh`.

    Arrays in `args` may be `jax.ShapeDtypeStruct`s; those without a sharding on `mesh` are replicated. Everything else
    is passed on as it is. `fn` is traced under `jax.set_mesh(mesh)`. PTX is one text a module of kernels, of XLA's and
    Pallas Triton's alike.
    """
    jitted: Any = fn if hasattr(fn, "lower") else jax.jit(fn)
    with jax.set_mesh(mesh):
        lowered = jitted.lower(*jax.tree.map(functools.partial(_abstract, mesh), args))
    options = dict(compiler_options or {})
    with tempfile.TemporaryDirectory() as folder, _no_compilation_cache():
        if dump_ptx or dump_streams:
            kinds = "|".join(["ptx"] * dump_ptx + ["thunk"] * dump_streams)
            options |= {"xla_dump_to": folder, "xla_dump_emitter_re": kinds, "xla_dump_hlo_as_text": dump_streams}
        program = lowered.compile(compiler_options=options or None)
        streams = _streams(Path(folder))
        ptx = tuple(path.read_text() for path in sorted(Path(folder).glob("*.ptx")) if path.stat().st_size)
    stats = program.memory_analysis()
    sizes = Bytes(
        stats.argument_size_in_bytes, stats.output_size_in_bytes - stats.alias_size_in_bytes, stats.temp_size_in_bytes
    )
    return Compiled(program.as_text(), sizes, ptx if dump_ptx else (), streams)


def _streams(folder: Path) -> dict[str, str]:
    """Of instructions that start beside the kernels, the stream; from XLA's list of thunks and their names."""
    found: dict[str, str] = {}
    for path in folder.glob("*.thunk_sequence.txt"):
        names = path.with_name(path.name.replace("thunk_sequence", "thunk_metadata"))
        if names.exists():
            ids: dict[str, str] = {id_: name for name, id_ in _THUNK.findall(names.read_text())}
            found |= {ids[id_]: stream for id_, stream in _STARTS.findall(path.read_text()) if id_ in ids}
    return found


def missing() -> str | None:
    """Why nothing can be compiled for a cluster here, with the remedy; None if it can."""
    plugin = next((name for name in ("cuda13", "cuda12") if _found(f"jax_plugins.xla_{name}")), None)
    if plugin is None:
        return f"jax's CUDA plugin is missing: {INSTALL}."
    version = metadata.version(f"jax-{plugin}-plugin")
    if version != jax.__version__:
        return f"jax-{plugin}-plugin {version} does not fit jax {jax.__version__}: {INSTALL} makes them equal."
    if not _found("nvidia.cudnn") and not ctypes.util.find_library("cudnn"):
        return f"cuDNN is missing, and attention would compile to something else than on a GPU: {INSTALL}."
    if not shutil.which("ptxas") and not _found("nvidia.cu13") and not _found("nvidia.cuda_nvcc"):
        return f"ptxas is missing: {INSTALL}, or put CUDA's bin folder on PATH."
    return None


def _abstract(mesh: Mesh, x: Any) -> Any:
    if not (hasattr(x, "shape") and hasattr(x, "dtype")):
        return x
    sharding = getattr(x, "sharding", None)
    if not isinstance(sharding, NamedSharding) or sharding.mesh != mesh:
        sharding = NamedSharding(mesh, PartitionSpec())
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)


def _found(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:
        return False


@functools.cache
def _devices(chip: str, shape: str) -> tuple[Any, ...]:
    from jax.experimental import topologies

    reason = missing()
    if reason:
        raise InputError(f"cannot compile for {chip}: {reason}")
    describe = functools.partial(
        topologies.get_topology_desc,
        platform="cuda",
        topology_name=chip,
        target_config=CHIPS[chip].proto,
        topology=shape,
    )
    with _without_gpu_check():
        try:
            return tuple(describe().devices)
        except NotImplementedError:
            _load_plugin_late()
            return tuple(describe().devices)


def _load_plugin_late() -> None:
    """Load the plugin though jax has looked for plugins before, when it refused to load without a GPU."""
    from jax._src import xla_bridge  # jax has no public way to do for one plugin what it does for all at its start

    name = "cuda13" if _found("jax_plugins.xla_cuda13") else "cuda12"
    importlib.import_module(f"jax_plugins.xla_{name}").initialize()
    try:
        c_api = xla_bridge._backend_factories["cuda"].c_api
        callbacks = tuple(xla_bridge._plugin_callbacks)
    except (AttributeError, KeyError):
        raise InputError(
            "jax started without its CUDA plugin, and this jax cannot load it later: "
            "set JAX_SKIP_CUDA_CONSTRAINTS_CHECK=1 in the environment of this process."
        ) from None
    for callback in callbacks:
        callback(c_api=c_api)


@contextlib.contextmanager
def _without_gpu_check() -> Iterator[None]:
    """The plugin loads without a driver; where there is one, it makes its checks."""
    name = "JAX_SKIP_CUDA_CONSTRAINTS_CHECK"
    given = os.environ.get(name)
    if given is None and not Path("/dev/nvidiactl").exists():
        os.environ[name] = "1"
    try:
        yield
    finally:
        if given is None:
            os.environ.pop(name, None)


@contextlib.contextmanager
def _no_compilation_cache() -> Iterator[None]:
    """A program from the persistent cache would bring no PTX."""
    given = jax.config.jax_enable_compilation_cache  # pyright: ignore[reportAttributeAccessIssue]
    jax.config.update("jax_enable_compilation_cache", False)
    try:
        yield
    finally:
        jax.config.update("jax_enable_compilation_cache", given)
