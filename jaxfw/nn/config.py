"""The static description of a decoder transformer: what the shells need to declare its parameters."""

import dataclasses

from jaxfw.core.errors import InputError, unknown
from jaxfw.ops.activations import ACTIVATIONS
from jaxfw.ops.rope import Rope

DTYPES = ("float32", "bfloat16", "float16")
NORMS = ("rms", "layer")
QK_NORMS = ("head", "projection")


@dataclasses.dataclass(frozen=True)
class MoEConfig:
    """Mixture of experts in place of a feed-forward: in layer `first` and every `every`-th from there on, but `dense`.

    Each of the `experts` is a feed-forward of width `ffn`; the router sends a token to `per_token` of them, by
    `scores` ("softmax" or "sigmoid"), divided by their sum over the chosen ones if `renormalize`; None does so where
    there are several. A feed-forward of width `shared` (0 is none) takes every token; with a `shared_gate` its answer
    is multiplied by sigmoid(x @ w). Another router may be given to each function; one that looks at later tokens
    (expert choice, soft) is refused unless `allow_noncausal`.
    """

    experts: int
    per_token: int
    ffn: int
    first: int = 0
    every: int = 1
    dense: tuple[int, ...] = ()
    shared: int = 0
    shared_gate: bool = False
    scores: str = "softmax"
    renormalize: bool | None = None
    allow_noncausal: bool = False

    def __post_init__(self):
        at_least = {"experts": 1, "per_token": 1, "ffn": 1, "first": 0, "every": 1, "shared": 0}
        for name, least in at_least.items():
            value = getattr(self, name)
            if not isinstance(value, int) or value < least:
                raise InputError(f"model.moe.{name}={value!r} must be a whole number from {least} on.")
        if self.scores not in ("softmax", "sigmoid"):
            raise unknown("model.moe.scores", self.scores, ("softmax", "sigmoid"))
        if self.per_token > self.experts:
            raise InputError(f"model.moe.per_token={self.per_token} exceeds model.moe.experts={self.experts}.")
        if self.shared_gate and not self.shared:
            raise InputError("model.moe.shared_gate=True gates nothing while model.moe.shared=0: give its width.")

    def is_in(self, layer: int) -> bool:
        """Whether that layer has experts."""
        return layer >= self.first and (layer - self.first) % self.every == 0 and layer not in self.dense


@dataclasses.dataclass(frozen=True)
class DecoderConfig:
    """A decoder with norms in front: as it stands LLaMA's, by its switches the other families'.

    Frozen and hashable: a static argument of every jitted function. The switches:

    | | |
    |---|---|
    | `norm` | "rms", or "layer": mean subtracted, scale and bias |
    | `qk_norm` | RMS norms of queries and keys before rotation, of each "head" or of the whole "projection" |
    | `rope`, `learned_positions` | rotation, None for none; a table that is added to the embedding |
    | `window` | positions that a token attends to, its own among them; None is all |
    | `full_attention` | layers that attend to all although there is a window |
    | `gated`, `activation` | down(act(gate(x)) * up(x)), or down(act(up(x))) |
    | `moe` | experts in place of feed-forwards |

    `param_dtype` is what parameters are stored in, `dtype` what they are multiplied in, `softmax_dtype` what attention
    weights are computed in. `positions` is the context length that the checkpoint declares.
    """

    vocab: int
    width: int
    ffn: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    positions: int
    rope: Rope | None = Rope()
    learned_positions: bool = False
    norm: str = "rms"
    norm_eps: float = 1e-6
    qk_norm: str | None = None
    activation: str = "silu"
    gated: bool = True
    tie_embeddings: bool = False
    qkv_bias: bool = False
    out_bias: bool = False
    mlp_bias: bool = False
    init_std: float = 0.02
    window: int | None = None
    full_attention: tuple[int, ...] = ()
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
        self._check_moe()
        if self.heads % self.kv_heads:
            raise InputError(
                f"model.heads={self.heads} must be a multiple of model.kv_heads={self.kv_heads}: "
                "each key head serves the same number of query heads."
            )
        if self.rope and self.head_dim % 2:
            raise InputError(f"model.head_dim={self.head_dim} must be even: rotary embedding turns pairs.")
        known = dict.fromkeys(("param_dtype", "dtype", "softmax_dtype"), DTYPES) | {
            "norm": NORMS, "activation": ACTIVATIONS, "qk_norm": (None, *QK_NORMS),
        }  # fmt: skip
        for name, values in known.items():
            if getattr(self, name) not in values:
                raise unknown(f"model.{name}", getattr(self, name), map(str, values))
        for name in ("norm_eps", "init_std"):
            if not getattr(self, name) > 0:
                raise InputError(f"model.{name}={getattr(self, name)} must be above 0.")

    def _check_moe(self) -> None:
        if self.moe is None:
            return
        if self.moe.first >= self.layers:
            raise InputError(f"model.moe.first={self.moe.first} is beyond the last of {self.layers} layers.")
        if (self.gated, self.activation) not in ((True, "silu"), (False, "gelu_tanh")):
            raise InputError(
                f"model.gated={self.gated} with model.activation={self.activation!r} is not built for experts: give "
                "them gated=True with silu, or gated=False with gelu_tanh."
            )

    def at(self, layer: int) -> "DecoderConfig":
        """The configuration as that layer sees it; equal for layers of one kind, which share a compiled program.

        >>> tiny = DecoderConfig(vocab=8, width=4, ffn=8, layers=2, heads=2, kv_heads=1, head_dim=2, positions=8,
        ...                      window=4, full_attention=(0,))
        >>> tiny.at(0).window, tiny.at(1).window
        (None, 4)
        """
        if not self.full_attention:
            return self
        window = None if layer in self.full_attention else self.window
        return dataclasses.replace(self, window=window, full_attention=())

    @property
    def context(self) -> int:
        """Positions that can be used: the declared ones, or what the rotary embedding was stretched to.

        `dynamic` and `yarn` checkpoints may declare the length before stretching. AMBIGUOUS: `linear` ones do either
        (Vicuna the one, DeepSeek-Coder the other); what is declared is taken. `llama3` declares the length after it.
        """
        rope = self.rope
        if rope is None or self.learned_positions or rope.kind not in ("dynamic", "yarn"):
            return self.positions
        return max(self.positions, int(rope.factor * (rope.original_positions or self.positions)))
