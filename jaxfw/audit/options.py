"""XLA's options by the names of what they are for, in the versions of jax that have them."""

from collections.abc import Mapping
from typing import Any

import jax

from jaxfw.core.errors import InputError, unknown

_OVERLAP = {
    "xla_gpu_all_gather_combine_threshold_bytes": 0,
    "xla_gpu_reduce_scatter_combine_threshold_bytes": 0,
    "xla_gpu_all_reduce_combine_threshold_bytes": 0,
    "xla_gpu_dot_merger_threshold_mb": 0,
    "xla_gpu_enable_latency_hiding_scheduler": True,
    "xla_gpu_experimental_parallel_collective_overlap_limit": 2,
    "xla_gpu_experimental_enable_collective_multi_streaming": True,
    "xla_gpu_enable_analytical_sol_latency_estimator": True,
}
# What each is for: name -> (the first jax that has all of it, options).
SETS: Mapping[str, tuple[tuple[int, ...], Mapping[str, Any]]] = {
    "none": ((0,), {}),
    "schedule": ((0, 10), {"xla_gpu_enable_latency_hiding_scheduler": True}),
    "overlap": ((0, 10), _OVERLAP),
    "overlap-links": (
        (0, 11),
        {**_OVERLAP, "xla_gpu_experimental_parallel_scale_up_collective_overlap_limit": 2},
    ),
}


def parse_options(text: str) -> dict[str, Any]:
    """A set by its name, or `option=value` with semicolons between.

    Raises:
        InputError: an unknown set, one that this jax lacks, or no value.
    """
    if "=" not in text:
        if text not in SETS:
            raise unknown("--options", text, SETS)
        least, options = SETS[text]
        if jax.__version_info__ < least:
            raise InputError(
                f"--options={text} needs jax {'.'.join(map(str, least))} or newer, this is {jax.__version__}: "
                f"--options={'overlap'} is what it has."
            )
        return dict(options)
    found: dict[str, Any] = {}
    for part in text.split(";"):
        name, _, value = part.strip().partition("=")
        if not name or not value:
            raise InputError(f"--options: {part!r} is not option=value.")
        found[name] = {"true": True, "false": False}.get(value.lower(), int(value) if value.isdecimal() else value)
    return found
