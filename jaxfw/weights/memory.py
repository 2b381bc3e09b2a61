"""Whether the parameters fit the devices, before anything is allocated."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
from jax.sharding import AbstractMesh, Mesh

from jaxfw.core.errors import InputError
from jaxfw.core.mesh import abstract_mesh
from jaxfw.core.sharding import table
from jaxfw.models import DecoderConfig
from jaxfw.models.sharding import decoder_rules
from jaxfw.ops.quant import BITS
from jaxfw.weights.arrays import abstract_params, default_device

MESHES = (2, 4, 8, 16, 32, 64)


def device_bytes(
    config: DecoderConfig,
    *,
    mesh: Mesh | AbstractMesh | None = None,
    quantise: str | None = None,
    dtypes: Mapping[str, Any] | None = None,
) -> int:
    """Bytes of the parameters that each device holds.

    Args:
        config: the model.
        mesh: laid out by `decoder_rules`; None is one device.
        quantise: as of `load`.
        dtypes: of each parameter, by path; None is `config.param_dtype` for all.
    """
    shapes = abstract_params(config, dtypes=dtypes, quantise=quantise)
    return table(decoder_rules(config), abstract_mesh() if mesh is None else mesh, shapes).bytes_per_device


def free_bytes(mesh: Mesh | None = None) -> int | None:
    """Bytes that are free on the fullest device of this process: of `mesh`, or the default one; None if it is unknown.

    Devices of a processor share what is available of its memory.
    """
    here = jax.process_index()
    devices = [default_device()] if mesh is None else [d for d in mesh.devices.flat if d.process_index == here]
    if not devices:
        return None
    if devices[0].platform == "cpu":
        available = _available_memory()
        return None if available is None else available // len(devices)
    found = [device.memory_stats() for device in devices]
    if not all(stats and "bytes_limit" in stats for stats in found):
        return None
    return min(stats["bytes_limit"] - stats["bytes_in_use"] for stats in found)


def preflight(
    config: DecoderConfig,
    *,
    mesh: Mesh | None = None,
    quantise: str | None = None,
    dtypes: Mapping[str, Any] | None = None,
) -> None:
    """Raise an `InputError` if the parameters exceed what is free on a device, with what would fit.

    The keywords are those of `device_bytes`. Where nobody says what is free, nothing is refused.
    """
    needed, free = device_bytes(config, mesh=mesh, quantise=quantise, dtypes=dtypes), free_bytes(mesh)
    if free is None or needed <= free:
        return
    options = [
        f"quantise={name!r} needs {_gb(device_bytes(config, mesh=mesh, quantise=name, dtypes=dtypes))}"
        for name, bits in BITS.items()
        if quantise is None or bits < BITS[quantise]
    ]
    raise InputError(
        f"the model needs {_gb(needed)} for its parameters on each device, {_gb(free)} are free: "
        + ", ".join([*options, _mesh_that_fits(config, free, quantise, dtypes)])
        + "."
    )


def _mesh_that_fits(config: DecoderConfig, free: int, quantise: str | None, dtypes: Mapping[str, Any] | None) -> str:
    for size in MESHES:
        held = device_bytes(config, mesh=abstract_mesh(tensor=size), quantise=quantise, dtypes=dtypes)
        if held <= free:
            return f"or give a mesh of tensor={size} ({_gb(held)} a device)"
    return "or give a mesh of more devices"


def _gb(count: int) -> str:
    return f"{count / 1e9:.1f} GB"


def _available_memory() -> int | None:
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    except OSError:
        return None
    found = [line.split()[1] for line in lines if line.startswith("MemAvailable:")]
    return int(found[0]) * 1024 if found else None
