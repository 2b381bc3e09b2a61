"""The static description of a decoder transformer: what the shells need to declare its parameters."""

import dataclasses

from jaxfw.core.errors import InputError, unknown
from jaxfw.ops.rope import Rope

DTYPES = ("float32", "bfloat16", "float16")


@dataclasses.dataclass(frozen=True)
class MoEConfig:
    """Mixture of experts in place of a feed-forward: in layer `first` and every `every`-th from there on.

    Each of the `experts` is a gated feed-forward of width `ffn`; the router sends a token to `per_token` of them, by
    `scores` ("softmax" or "sigmoid"), divided by their sum over the chosen ones if `renormalize`; None does so where
    there are several. Another router may be given to each function; one that looks at later tokens (expert choice,
    soft) is refused unless `allow_noncausal`.
    """

    experts: int
    per_token: int
    ffn: int
    first: int = 0
    every: int = 1
    scores: str = "softmax"
    renormalize: bool | None = None
    allow_noncausal: bool = False

    def __post_init__(self):
        for name, least in (("experts", 1), ("per_token", 1), ("ffn", 1), ("first", 0), ("every", 1)):
            value = getattr(self, name)
            if not isinstance(value, int) or value < least:
                raise InputError(f"model.moe.{name}={value!r} must be a whole number from {least} on.")
        if self.scores not in ("softmax", "sigmoid"):
            raise unknown("model.moe.scores", self.scores, ("softmax", "sigmoid"))
        if self.per_token > self.experts:
            raise InputError(f"model.moe.per_token={self.per_token} exceeds model.moe.experts={self.experts}.")

    def is_in(self, layer: int) -> bool:
        """Whether that layer has experts."""
        return layer >= self.first and (layer - self.first) % self.every == 0


@dataclasses.dataclass(frozen=True)
class DecoderConfig:
    """A LLaMA-like decoder: RMSNorm, rotary attention with grouped heads, gated SiLU feed-forward or experts.

    A token attends to the last `window` positions, its own among them; None is all. `param_dtype` is what parameters
    are stored in, `dtype` what they are multiplied in, `softmax_dtype` what attention weights are computed in.
    `positions` is the context length that the checkpoint declares. Frozen and hashable: a static argument of every
    jitted function.
    """

    vocab: int
    width: int
    ffn: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    positions: int
    rope: Rope = Rope()
    norm_eps: float = 1e-6
    tie_embeddings: bool = False
    qkv_bias: bool = False
    out_bias: bool = False
    mlp_bias: bool = False
    init_std: float = 0.02
    window: int | None = None
    moe: MoEConfig | None = None
    param_dtype: str = "float32"
    dtype: str = "float32"
    softmax_dtype: str = "float32"

    def __post_init__(self):
        for name in ("vocab", "width", "ffn", "layers", "heads", "kv_heads", "head_dim", "positions"):
            value = getattr(self, name)
            if not isinstance(value, int) or value < 1:
                raise InputError(f"model.{name}={value!r} must be a whole number from 1 on.")
        if self.window is not None and (not isinstance(self.window, int) or self.window < 1):
            raise InputError(f"model.window={self.window!r} must be a whole number from 1 on, or None for no window.")
        if self.moe is not None and self.moe.first >= self.layers:
            raise InputError(f"model.moe.first={self.moe.first} is beyond the last of {self.layers} layers.")
        if self.heads % self.kv_heads:
            raise InputError(
                f"model.heads={self.heads} must be a multiple of model.kv_heads={self.kv_heads}: "
                "each key head serves the same number of query heads."
            )
        if self.head_dim % 2:
            raise InputError(f"model.head_dim={self.head_dim} must be even: rotary embedding turns pairs.")
        for name in ("param_dtype", "dtype", "softmax_dtype"):
            if getattr(self, name) not in DTYPES:
                raise unknown(f"model.{name}", getattr(self, name), DTYPES)

        for name in ("norm_eps", "init_std"):
            if not getattr(self, name) > 0:
                raise InputError(f"model.{name}={getattr(self, name)} must be above 0.")

    @property
    def context(self) -> int:
        """Positions that can be used: the declared ones, or what the rotary embedding was stretched to.

        `dynamic` and `yarn` checkpoints may declare the length before stretching. AMBIGUOUS: `linear` ones do either
        (Vicuna the one, DeepSeek-Coder the other); what is declared is taken. `llama3` declares the length after it.
        """
        stretched = self.rope.factor * (self.rope.original_positions or self.positions)
        return max(self.positions, int(stretched)) if self.rope.kind in ("dynamic", "yarn") else self.positions
