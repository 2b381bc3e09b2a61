"""What GPUs can do at their best, for the share that a run uses of it.

Dense figures of NVIDIA's datasheets (A100, H100, H200, HGX B200), which print those with sparsity, twice as high. A
float32 product runs in TF32 on these GPUs unless another precision is asked for.
"""

import jax.numpy as jnp

_TERA = 10**12
# Beginning of jax's `device_kind` -> FLOP/s of products of bfloat16 or float16, and of float32 in TF32; the first that
# fits counts.
_PEAKS = {
    "NVIDIA A100": (312 * _TERA, 156 * _TERA),
    "NVIDIA H100 PCIe": (756 * _TERA, 378 * _TERA),
    "NVIDIA H100 80GB": (989 * _TERA, 494 * _TERA),
    "NVIDIA H200 NVL": (835 * _TERA, 417 * _TERA),
    "NVIDIA H200": (989 * _TERA, 494 * _TERA),
    "NVIDIA B200": (2250 * _TERA, 1125 * _TERA),
}


def peak_flops(device_kind: str, dtype: str) -> int | None:
    """FLOP/s of matrix products on one device; None where it is not known (other devices, CPUs, other dtypes).

    >>> peak_flops("NVIDIA H200", "bfloat16"), peak_flops("cpu", "float32")
    (989000000000000, None)
    """
    peaks = next((peaks for name, peaks in _PEAKS.items() if device_kind.startswith(name)), None)
    if peaks is None or jnp.dtype(dtype).name not in ("bfloat16", "float16", "float32"):
        return None
    return peaks[jnp.dtype(dtype).name == "float32"]
