"""What accelerators can do at most, by their makers' data sheets, and the share of it that a program uses.

Peaks are dense: NVIDIA's sheets print figures with structured sparsity, of which these are half. Sources: the data
sheets of the H100 (SXM and PCIe), H200 (SXM), A100 (40 and 80 GB) and HGX B200, and the Hopper architecture paper for
unrounded figures. A figure is missing where sheets disagree (TF32 and bandwidth of the B200), and so is a card that is
none of these: a share of a guess is worse than none.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jaxfw.core.errors import unknown


@dataclasses.dataclass(frozen=True)
class Card:
    """Peak dense operations a second of matrix products by the format of their factors, and bytes a second of memory.

    `tf32` is what float32 arrays are multiplied in, by jax's default precision; `float32` is without tensor cores.
    """

    bfloat16: float
    tf32: float | None
    float8: float | None
    float32: float | None
    bandwidth: float | None


_HOPPER = Card(bfloat16=989.4e12, tf32=494.7e12, float8=1978.9e12, float32=66.9e12, bandwidth=3.35e12)
_A100 = Card(bfloat16=312e12, tf32=156e12, float8=None, float32=19.5e12, bandwidth=None)
# By the whole name that jax gives a device (`device_kind`): "NVIDIA H100 NVL" is another card than "NVIDIA H100 PCIe".
CARDS = {
    "NVIDIA H100 80GB HBM3": _HOPPER,
    "NVIDIA H100 PCIe": Card(bfloat16=756e12, tf32=378e12, float8=1513e12, float32=51e12, bandwidth=2.0e12),
    "NVIDIA H200": dataclasses.replace(_HOPPER, bandwidth=4.8e12),
    "NVIDIA A100-SXM4-40GB": dataclasses.replace(_A100, bandwidth=1.555e12),
    "NVIDIA A100-PCIE-40GB": dataclasses.replace(_A100, bandwidth=1.555e12),
    "NVIDIA A100-SXM4-80GB": dataclasses.replace(_A100, bandwidth=2.039e12),
    "NVIDIA A100 80GB PCIe": dataclasses.replace(_A100, bandwidth=1.935e12),
    "NVIDIA B200": Card(bfloat16=2250e12, tf32=None, float8=4500e12, float32=None, bandwidth=None),
}
_FORMATS = {
    "bfloat16": "bfloat16", "float16": "bfloat16", "float32": "tf32", "tf32": "tf32", "float8_e4m3fn": "float8",
    "float8_e5m2": "float8",
}  # fmt: skip


def peak_flops(devices: Sequence[Any], dtype: Any) -> float | None:
    """Operations a second that `devices` do together at most on arrays of `dtype`; None where a device is not known.

    float32 means TF32, in which jax multiplies such arrays on these cards unless `jax_default_matmul_precision` says
    otherwise.

    Raises:
        InputError: a dtype that is not multiplied by matrix units.
    """
    name = dtype if dtype == "tf32" else jnp.dtype(dtype).name
    if name not in _FORMATS:
        raise unknown("dtype", name, _FORMATS)
    peaks = [getattr(CARDS.get(device.device_kind), _FORMATS[name], None) for device in devices]
    known = [peak for peak in peaks if peak is not None]
    return sum(known) if known and len(known) == len(peaks) else None


def memory_bandwidth(device: Any) -> float | None:
    """Bytes a second that `device` reads from its memory at most; None where it is not known."""
    card = CARDS.get(device.device_kind)
    return card and card.bandwidth


def mfu(flops_per_second: float, devices: Sequence[Any] | None = None, dtype: Any = "bfloat16") -> float | None:
    """Model FLOP utilisation: the share of their peak that `devices` (all, by default) spend on a model's operations.

    `flops_per_second` are those of the model alone (`jaxfw.models.accounting.train_flops` a step), whatever was
    computed twice or for padding.

    >>> mfu(1e12) is None  # a CPU
    True
    """
    peak = peak_flops(jax.devices() if devices is None else devices, dtype)
    return None if peak is None else flops_per_second / peak
