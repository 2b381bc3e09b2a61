"""One decoder body, its caches, and the model families as thin translations of published configurations."""

from jaxfw.models.decoder import (
    Output,
    attend_half,
    attention_spec,
    embed,
    first_step,
    forward,
    head,
    init,
    layer,
    mlp_half,
    trunk,
)
from jaxfw.nn.config import DecoderConfig
from jaxfw.ops.rope import Rope

__all__ = [
    "DecoderConfig", "Output", "Rope", "attend_half", "attention_spec", "embed", "first_step", "forward", "head",
    "init", "layer", "mlp_half", "trunk",
]  # fmt: skip
