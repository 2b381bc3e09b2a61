"""The LLaMA family: every kind of rotary embedding and grouping, and what can go wrong in any decoder.

Not planted, because it cannot show: positions that start at 1 (rotary embedding is relative).
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.parity.case import Case, decoder_case
from experiments.parity.fault import Fault, Patch, config_with, params_where, rope_with, scaled_by, swapped
from jaxfw.models import decoder, whole
from jaxfw.nn import layers
from jaxfw.ops import attention, rope

_YARN = {"rope_type": "yarn", "rope_theta": 100.0, "factor": 6.0, "original_max_position_embeddings": 32,
         "beta_fast": 2.0, "beta_slow": 0.75}  # fmt: skip
_LLAMA3 = {"rope_type": "llama3", "rope_theta": 500.0, "factor": 8.0, "original_max_position_embeddings": 32,
           "low_freq_factor": 1.0, "high_freq_factor": 4.0}  # fmt: skip
_DYNAMIC = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0}
_DEFAULT = {"rope_type": "default", "rope_theta": 10000.0}
_BIASED: dict[str, Any] = {"attention_bias": True, "mlp_bias": True}


def _case(name: str, rope: dict[str, Any], heads: int, kv_heads: int, width: int, **options: Any) -> Case:
    shape: dict[str, Any] = {"heads": heads, "kv_heads": kv_heads, "width": width}
    return decoder_case(name, "llama", rope=rope, **shape, **options)


CASES = (
    _case("default", _DEFAULT, 4, 4, 64),
    _case("default, biased", {"rope_type": "default", "rope_theta": 500.0}, 8, 2, 64, tied=True,
          **_BIASED),
    _case("linear", {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}, 6, 2, 48,
          attention_bias=True),
    _case("dynamic", _DYNAMIC, 8, 2, 64, tied=True, max_position_embeddings=32),
    _case("dynamic, biased", _DYNAMIC, 14, 2, 56, max_position_embeddings=32, **_BIASED),
    _case("yarn", _YARN, 14, 2, 56, mlp_bias=True),
    _case("yarn, attention_factor", {**_YARN, "attention_factor": 0.8}, 6, 2, 48, tied=True),
    _case("yarn, mscale", {**_YARN, "mscale": 2.0, "mscale_all_dim": 0.5}, 4, 4, 64, **_BIASED),
    _case("yarn, no truncate", {**_YARN, "truncate": False}, 8, 2, 64),
    _case("llama3", _LLAMA3, 8, 2, 64, tied=True),
    _case("llama3, biased", _LLAMA3, 7, 1, 56, **_BIASED),
    _case("llama3, long", {**_LLAMA3, "original_max_position_embeddings": 128}, 14, 2, 56, head_dim=8,
          max_position_embeddings=1024, lengths=(600, 523)),
)  # fmt: skip


def _wrong_grouping(real):
    def attend(q, k, v, **options):
        order = np.argsort(np.arange(q.shape[2]) % k.shape[1], kind="stable")
        return real(q[:, :, order], k, v, **options)[:, :, np.argsort(order)]

    return attend


def _queries_one_later(real):
    def rotate(x, cos, sin):  # "default, biased" has eight query heads and two key heads
        is_query = x.shape[2] == 8
        return real(x, *(jnp.roll(t, -1, axis=1) if is_query else t for t in (cos, sin)))

    return rotate


def _interleaved(real):
    def rotate(x, cos, sin):
        pairs = x.reshape(*x.shape[:-1], -1, 2).swapaxes(-1, -2).reshape(x.shape)
        turned = real(pairs, cos, sin)
        return turned.reshape(*x.shape[:-1], 2, -1).swapaxes(-1, -2).reshape(x.shape)

    return rotate


def _hard_switch(real):
    def frequencies(r, plain):
        return np.where(2 * np.pi / plain > r.original_positions / r.low_freq_factor, plain / r.factor, plain)

    return frequencies


def _longest_row(real):
    return lambda r, positions, *, width, seq_len: real(
        r, positions, width=width, seq_len=jnp.full_like(seq_len, seq_len.max())
    )


def _mask_shifted(by: int) -> Patch:
    def spoil(real):
        return lambda q, k, v, positions, *rest: real(q, k, v, positions + by, *rest)

    return attention, "_attend_block", spoil


def _norm(wrong: Callable[..., Any]) -> Patch:
    return layers, "rms_norm", lambda real: wrong


def _detached_statistics(x, scale, *, eps):
    return x * jax.lax.stop_gradient(jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + eps)) * scale


_unscaled_frequencies = rope_with(kind="default")
_B = "default, biased"
FAULTS = (
    Fault("rotation left out", "default", patch=(decoder, "rotate", lambda real: lambda x, cos, sin: x)),
    Fault("rotation interleaved, not half-split", "default", patch=(decoder, "rotate", _interleaved)),
    Fault("rotation the other way", "default",
          patch=(decoder, "rotate", lambda real: lambda x, cos, sin: real(x, cos, -sin))),
    Fault("positions of queries one too high", _B, patch=(decoder, "rotate", _queries_one_later)),
    Fault("theta 1 % too high", "default", config=rope_with(theta=10100.0)),
    Fault("theta at its default", _B, config=rope_with(theta=10000.0)),
    Fault("linear ignored", "linear", config=_unscaled_frequencies),
    Fault("dynamic ignored", "dynamic", config=_unscaled_frequencies),
    Fault("dynamic by the longest row's length", "dynamic", patch=(decoder, "rotation", _longest_row)),
    Fault("yarn ignored", "yarn", config=_unscaled_frequencies),
    Fault("yarn: default attention factor dropped", "yarn", config=rope_with(attention_factor=1.0)),
    Fault("yarn: given attention_factor dropped", "yarn, attention_factor",
          config=rope_with(attention_factor=None)),
    Fault("yarn: mscale ignored", "yarn, mscale", config=rope_with(mscale=None)),
    Fault("yarn: truncate=false ignored", "yarn, no truncate", config=rope_with(truncate=True)),
    Fault("yarn: beta_fast at its default", "yarn", config=rope_with(beta_fast=32.0)),
    Fault("yarn: beta_slow at its default", "yarn", config=rope_with(beta_slow=1.0)),
    Fault("llama3 ignored", "llama3", config=_unscaled_frequencies),
    Fault("llama3: hard switch for the smooth band", "llama3", patch=(rope, "_llama3", _hard_switch)),
    Fault("llama3: original positions doubled", "llama3", config=rope_with(original_positions=64)),
    Fault("norm eps 1e-5 for 1e-6", "default", config=config_with(norm_eps=1e-5)),
    Fault("norm skipped, scale kept", "default", patch=_norm(lambda x, scale, *, eps: x * scale)),
    Fault("norm subtracts the mean", "default",
          patch=(layers, "rms_norm", lambda real: lambda x, scale, *, eps: real(
              x - x.mean(axis=-1, keepdims=True), scale, eps=eps))),
    Fault("norm scale dropped: attention", "default", params=params_where(r"\w+/attn_norm/scale", jnp.ones_like)),
    Fault("norm scale dropped: feed-forward", "default",
          params=params_where(r"\w+/mlp_norm/scale", jnp.ones_like)),
    Fault("norm scale dropped: last", "default", params=params_where("head/norm/scale", jnp.ones_like)),
    Fault("norms of a layer swapped", "default", params=swapped("attn_norm", "mlp_norm")),
    *(Fault(f"bias dropped: {name}", _B, params=params_where(rf"\w+/{part}/{name}/bias", jnp.zeros_like))
      for part, names in (("attn", "qkvo"), ("mlp", ("gate", "up", "down"))) for name in names),
    Fault("attention scale 1/d", "default", patch=scaled_by(lambda c: 1 / c.head_dim)),
    Fault("attention scale 1/sqrt(D)", "default", patch=scaled_by(lambda c: c.width**-0.5)),
    Fault("query head h reads key head h % K", "yarn", patch=(decoder, "attend", _wrong_grouping)),
    Fault("causal mask sees the next token", "default", patch=_mask_shifted(1)),
    Fault("causal mask hides the token itself", "default", patch=_mask_shifted(-1)),
    Fault("o projection not transposed", "default", params=params_where(r"\w+/attn/o/kernel", jnp.transpose)),
    Fault("gate and up swapped", "default", params=swapped("gate", "up")),
    Fault("gelu for silu", "default", config=config_with(activation="gelu")),
    Fault("layers in reverse", "default", params=swapped("layers_0", "layers_1")),
    Fault("untied head read as tied", "default", config=config_with(tie_embeddings=True)),
    Fault("tied head reads another table", "llama3", config=config_with(tie_embeddings=False),
          params=lambda params: {**params, "head": {
              **params["head"], "lm_head": jnp.roll(params["embed"]["embedding"], 1, axis=0)}}),
    Fault("softmax in bfloat16", "default", config=config_with(softmax_dtype="bfloat16")),
    Fault("everything in bfloat16", "default", config=config_with(dtype="bfloat16")),
    Fault("gradient: keys detached", "default", shows_in="gradients",
          patch=(decoder, "attend", lambda real: lambda q, k, v, **options: real(
              q, jax.lax.stop_gradient(k), v, **options))),
    Fault("gradient: norm statistics detached", "default", shows_in="gradients",
          patch=_norm(_detached_statistics)),
    Fault("gradient: tied table learns from the head only", "llama3", shows_in="gradients",
          patch=(whole, "embed", lambda real: lambda config, params, tokens, **sites: jax.lax.stop_gradient(
              real(config, params, tokens)))),
)  # fmt: skip
