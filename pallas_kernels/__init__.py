"""GPU kernels in Pallas, one file per operation. Imports jax only, never jaxfw.

| operation | what it is for |
|---|---|
| `decode_attention` | attention of one new token a row to a cache: split over keys, any lengths, optional mass |
| `ragged_decode` | the same to pools in which each key head has its own number of slots, in full width or few bits |
| `column_mass` | the attention that keys receive from rows of queries, summed over these: no weights are written |
| `compact` | the slots of a cache that stay, gathered, turned and packed in one pass |
| `highest_mask` | which numbers of long rows are the highest, by counting instead of sorting |

`packing` has the formats of keys and values in few bits.

Attention over a prompt is left to cuDNN, norms and gated units to XLA, which are at the hardware's limit there.
`docs/kernels.md` says how to add a kernel.
"""

from pallas_kernels._dispatch import IMPLS
from pallas_kernels.column_mass import column_mass
from pallas_kernels.compact import compact
from pallas_kernels.decode_attention import Decoded, decode_attention, decode_attention_plan
from pallas_kernels.ragged_decode import ragged_decode
from pallas_kernels.select_highest import highest_mask

__all__ = [
    "IMPLS", "Decoded", "column_mass", "compact", "decode_attention", "decode_attention_plan", "highest_mask",
    "ragged_decode",
]  # fmt: skip
