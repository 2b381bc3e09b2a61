"""GPU kernels in Pallas, one file per operation. Imports jax only, never jaxfw.

| operation | what it is for |
|---|---|
| `decode_attention` | attention of one new token a row to a cache: split over keys, any lengths, optional mass |

Attention over a prompt is left to cuDNN, norms and gated units to XLA, which are at the hardware's limit there.
`docs/kernels.md` says how to add a kernel.
"""

from pallas_kernels._dispatch import IMPLS
from pallas_kernels.decode_attention import Decoded, decode_attention, decode_attention_plan

__all__ = ["IMPLS", "Decoded", "decode_attention", "decode_attention_plan"]
