"""What differs between the versions of jax that this package runs on, 0.10.2 to 0.12: the only file that knows.

- Without `compiler_params`, 0.10.2 lowers a kernel by Mosaic GPU and later versions by Triton: ours are always given.
- From 0.11 on, every lowering by Triton warns that the backend will go, to people who cannot do anything about it.
"""

import warnings
from collections.abc import Callable
from typing import Any

from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

warnings.filterwarnings("ignore", message="The Pallas Triton backend", category=DeprecationWarning)


def triton_call(body: Callable[..., None], *, warps: int, stages: int, interpret: bool, **options: Any) -> Any:
    """`pallas_call` of a Triton body; with `interpret`, XLA carries the body out on any platform."""
    if interpret:
        return pl.pallas_call(body, interpret=True, **options)
    return pl.pallas_call(body, compiler_params=plt.CompilerParams(num_warps=warps, num_stages=stages), **options)
