"""Mistral, Qwen 2, Qwen 3 and GPT-2: windows, biases, norms of queries and keys, learned positions.

Not planted, because it cannot show:
- the bias of GPT-2's keys dropped: one vector added to all keys moves every logit of a query alike;
- eps of the norms of queries and keys: sharp attention needs queries and keys of about unit size, beside which 1e-5 is
  lost;
- a width of heads that is not the file's: the parameters would not fit, and the loader says so.
"""

from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict

from experiments.parity.case import Case, decoder_case
from experiments.parity.fault import (
    Fault,
    ParamsEdit,
    config_with,
    in_turn,
    params_where,
    params_with,
    params_without,
    scaled_by,
    swapped,
)
from jaxfw.models import decoder, whole
from jaxfw.nn import layers
from jaxfw.ops.rope import Rope

_YARN = {"rope_type": "yarn", "rope_theta": 500.0, "factor": 4.0, "original_max_position_embeddings": 36}
_ALTERNATING = ["sliding_attention", "full_attention", "sliding_attention"]


# The two forms of gelu differ by 5e-4 at most: into that bend, and little beside what comes out of it.
_BENT = ((r"c_fc\.weight", 5.0), (r"c_fc\.bias", 0.2), (r"mlp\.c_proj\.weight", 20.0), (r"c_proj\.bias", 0.1))


def _gpt2(name: str, **attributes: Any) -> Case:
    shared = {
        "vocab_size": 96, "n_embd": 64, "n_head": 4, "n_layer": 2, "n_positions": 144, "tie_word_embeddings": True,
        "bos_token_id": 1, "eos_token_id": 2,
    }  # fmt: skip
    return Case(name, "gpt2", shared | attributes, scales=_BENT)


CASES = (
    decoder_case("mistral", "mistral", heads=8, kv_heads=2, width=64, sliding_window=32),
    decoder_case("mistral, no window", "mistral", heads=4, kv_heads=2, width=56, head_dim=24, tied=True,
                 sliding_window=None),
    decoder_case("qwen2", "qwen2", heads=14, kv_heads=2, width=56, tied=True, rope=_YARN),
    decoder_case("qwen2, windows", "qwen2", heads=8, kv_heads=2, width=64, layers=3, use_sliding_window=True,
                 sliding_window=24, max_window_layers=1),
    decoder_case("qwen3", "qwen3", heads=4, kv_heads=2, width=40, tied=True),
    decoder_case("qwen3, windows", "qwen3", heads=6, kv_heads=2, width=48, layers=3, attention_bias=True,
                 use_sliding_window=True, sliding_window=24, layer_types=_ALTERNATING),
    _gpt2("gpt2"),
    _gpt2("gpt2, untied", n_embd=60, n_inner=72, activation_function="gelu", tie_word_embeddings=False),
)  # fmt: skip


def _norm_after_rotation(real):
    """Of normalised and scaled queries and keys: the scale taken off, and put on behind the rotation."""

    def attend(self, hidden, mix):
        scales = {n: getattr(self, f"{x}_norm").variables["params"]["scale"] for x, n in (("q", 4), ("k", 2))}
        rotate = decoder.rotate

        def late(x, cos, sin):
            scale = scales[x.shape[2]]
            return rotate(x / scale, cos, sin) * scale

        def mix_late(*arrays):
            with mock.patch.object(decoder, "rotate", late):
                return mix(*arrays)

        return real(self, hidden, mix_late)

    return attend


def _repeated(counts: dict[str, int]) -> ParamsEdit:
    edits = (params_where(rf"\w+/attn/{x}_norm/scale", lambda s, n=n: jnp.tile(s, n)) for x, n in counts.items())
    return in_turn(*edits)


def _by_head(params: Any) -> Any:
    """What is read if the fused kernel is taken for [D, H, 3, d], as GPT-NeoX has it."""
    flat: dict[str, Any] = dict(flatten_dict(params, sep="/"))
    for i, kind in ((i, kind) for i in range(2) for kind in ("kernel", "bias")):
        paths = [f"layers_{i}/attn/{x}/{kind}" for x in "qkv"]
        fused = jnp.concatenate([flat[path] for path in paths], axis=-1)
        apart = fused.reshape(*fused.shape[:-1], 4, 3, -1)
        flat |= {path: apart[..., j, :].reshape(flat[path].shape) for j, path in enumerate(paths)}
    return unflatten_dict(flat, sep="/")


def _without_mean(real):
    def norm(x, scale, bias, *, eps):
        return x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + eps) * scale + bias

    return norm


def _detached_layer_norm(real):
    def norm(x, scale, bias, *, eps):
        shift = jax.lax.stop_gradient(x.mean(axis=-1, keepdims=True))
        return (x - shift) * jax.lax.stop_gradient(jax.lax.rsqrt(x.var(axis=-1, keepdims=True) + eps)) * scale + bias

    return norm


def _detached_head_norm(real):
    def norm(x, scale, *, eps):
        if x.ndim < 4:
            return real(x, scale, eps=eps)
        return x * jax.lax.stop_gradient(jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + eps)) * scale

    return norm


def _detached_positions(real):
    def embed(config, params, tokens, **options):
        table = jax.lax.stop_gradient(params["embed"]["positions"])
        return real(config, {**params, "embed": {**params["embed"], "positions": table}}, tokens, **options)

    return embed


def _dropped(case: str, part: str, names: tuple[str, ...] | str) -> tuple[Fault, ...]:
    return tuple(
        Fault(f"{case}: bias dropped: {name}", case, params=params_where(rf"\w+/{part}/{name}/bias", jnp.zeros_like))
        for name in names
    )


def _o_bias(params: Any) -> Any:
    bias = jnp.full(64, 0.02)
    return in_turn(*(params_with(f"layers_{i}/attn/o/bias", lambda _: bias) for i in range(3)))(params)


def _other_head(params: Any) -> Any:
    return jnp.roll(params["embed"]["embedding"], 1, axis=0)


_NO_QK_NORM = params_without(r"\w+/attn/[qk]_norm/scale")
_MISTRAL = (
    Fault("window one too short", "mistral", config=config_with(window=31)),
    Fault("window one too long", "mistral", config=config_with(window=33)),
    Fault("window ignored", "mistral", config=config_with(window=None)),
    Fault("window invented", "mistral, no window", config=config_with(window=128)),
    Fault("attention scale by the width over heads", "mistral, no window",
          patch=scaled_by(lambda c: (c.width / c.heads) ** -0.5)),
)  # fmt: skip
_QWEN2 = (
    *_dropped("qwen2", "attn", "qkv"),
    Fault("qwen2: o bias invented", "qwen2, windows", config=config_with(out_bias=True), params=_o_bias),
    Fault("windows in every layer", "qwen2, windows", config=config_with(full_attention=())),
    Fault("windows in the first layers, not the last", "qwen2, windows", config=config_with(full_attention=(1, 2))),
    Fault("max_window_layers one too high", "qwen2, windows", config=config_with(full_attention=(0, 1))),
    Fault("use_sliding_window ignored", "qwen2, windows", config=config_with(window=None, full_attention=())),
    Fault("qwen2: yarn ignored", "qwen2", config=config_with(rope=Rope(theta=500.0))),
    Fault("qwen2: tied head reads another table", "qwen2", config=config_with(tie_embeddings=False),
          params=params_with("head/lm_head", _other_head)),
)  # fmt: skip
_QWEN3 = (
    Fault("qk-norm left out", "qwen3", config=config_with(qk_norm=None), params=_NO_QK_NORM),
    Fault("qk-norm after rotation", "qwen3", patch=(layers.Attention, "__call__", _norm_after_rotation)),
    Fault("qk-norm over the projection, not the head", "qwen3", config=config_with(qk_norm="projection"),
          params=_repeated({"q": 4, "k": 2})),
    Fault("qk-norm scale dropped: q", "qwen3", params=params_where(r"\w+/attn/q_norm/scale", jnp.ones_like)),
    Fault("qk-norm scale dropped: k", "qwen3", params=params_where(r"\w+/attn/k_norm/scale", jnp.ones_like)),
    Fault("norms of queries and keys swapped", "qwen3", params=swapped("q_norm", "k_norm")),
    *_dropped("qwen3, windows", "attn", "qkvo"),
    Fault("layer_types the other way round", "qwen3, windows", config=config_with(full_attention=(0, 2))),
    Fault("layer_types ignored", "qwen3, windows", config=config_with(full_attention=())),
    Fault("gradient: statistics of qk-norm detached", "qwen3", shows_in="gradients",
          patch=(layers, "rms_norm", _detached_head_norm)),
)  # fmt: skip
_GPT2 = (
    Fault("learned positions one too high", "gpt2",
          params=params_where("embed/positions", lambda table: jnp.roll(table, -1, axis=0))),
    Fault("learned positions left out", "gpt2", params=params_where("embed/positions", jnp.zeros_like)),
    Fault("gpt2: rotation added", "gpt2", config=config_with(rope=Rope())),
    Fault("Conv1D transposed", "gpt2", params=params_where(r"\w+/attn/[qkvo]/kernel", jnp.transpose)),
    Fault("fused kernel read as k, q, v", "gpt2", params=swapped("attn/q/", "attn/k/")),
    Fault("fused kernel read as q, v, k", "gpt2", params=swapped("attn/k/", "attn/v/")),
    Fault("fused kernel read by head", "gpt2", params=_by_head),
    Fault("LayerNorm: mean not subtracted", "gpt2", patch=(layers, "layer_norm", _without_mean)),
    Fault("LayerNorm: eps 1e-6 for 1e-5", "gpt2", config=config_with(norm_eps=1e-6)),
    *(Fault(f"LayerNorm: bias dropped: {name}", "gpt2", params=params_where(pattern, jnp.zeros_like))
      for name, pattern in (("attention", r"\w+/attn_norm/bias"), ("feed-forward", r"\w+/mlp_norm/bias"),
                            ("last", "head/norm/bias"))),
    Fault("LayerNorm: scale dropped", "gpt2", params=params_where(r"\w+/(attn|mlp)_norm/scale", jnp.ones_like)),
    *_dropped("gpt2", "attn", "qvo"),
    *_dropped("gpt2", "mlp", ("up", "down")),
    Fault("gelu: exact for tanh", "gpt2", config=config_with(activation="gelu")),
    Fault("gelu: tanh for exact", "gpt2, untied", config=config_with(activation="gelu_tanh")),
    Fault("gpt2: silu for gelu", "gpt2", config=config_with(activation="silu")),
    Fault("gpt2: untied head read as tied", "gpt2, untied", config=config_with(tie_embeddings=True)),
    Fault("gpt2: tied head reads another table", "gpt2", config=config_with(tie_embeddings=False),
          params=params_with("head/lm_head", _other_head)),
    Fault("gradient: statistics of LayerNorm detached", "gpt2", shows_in="gradients",
          patch=(layers, "layer_norm", _detached_layer_norm)),
    Fault("gradient: learned positions detached", "gpt2", shows_in="gradients",
          patch=(whole, "embed", _detached_positions)),
)  # fmt: skip
FAULTS = (*_MISTRAL, *_QWEN2, *_QWEN3, *_GPT2)
