"""Mixtral, Qwen2-MoE, Qwen3-MoE and OLMoE: who is chosen, with which weight, and what all tokens pass.

An expert that is chosen on one side only would be no error but a tie: `margin` says how far the nearest one is.

Not planted:
- layers with experts taken for dense ones, or the other way round (steps, `mlp_only_layers`): the parameters would not
  fit, and the loader says so;
- softmax behind the choice instead of before it: that is renormalisation, which is planted both ways;
- norms of OLMoE's queries and keys behind rotation, which leaves a root mean square over all heads as it is.
"""

from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np

from experiments.parity.case import Case, Oracle, decoder_case
from experiments.parity.fault import (
    Fault,
    config_with,
    in_turn,
    moe_with,
    params_where,
    params_without,
    swapped,
)
from jaxfw.models import Collect, forward
from jaxfw.models.routing import feed_forward
from jaxfw.nn import layers
from jaxfw.ops import routing

MARGIN = 5e-4  # of log probabilities, which rounding moves by some 1e-6


def _moe_case(name: str, model_type: str, *, per_token: int, **attributes: Any) -> Case:
    # Probabilities that differ from expert to expert, and answers that count beside the residual.
    scales = ((r"gate\.weight$", 4.0), (r"(gate|up|gate_up|down)_proj", 2.0))
    return decoder_case(name, model_type, kv_heads=2, num_experts_per_tok=per_token, scales=scales, **attributes)


CASES = (
    _moe_case("mixtral", "mixtral", heads=8, width=64, num_local_experts=4, per_token=2, sliding_window=None),
    _moe_case("mixtral, window", "mixtral", heads=4, width=48, num_local_experts=4, per_token=3, tied=True,
              sliding_window=32),
    _moe_case("qwen2_moe", "qwen2_moe", heads=4, width=64, num_experts=6, per_token=2, moe_intermediate_size=40,
              shared_expert_intermediate_size=56, norm_topk_prob=False),
    _moe_case("qwen2_moe, some layers", "qwen2_moe", heads=4, width=64, layers=4, num_experts=4, per_token=3,
              moe_intermediate_size=40, shared_expert_intermediate_size=24, norm_topk_prob=True,
              decoder_sparse_step=2, mlp_only_layers=[3]),
    _moe_case("qwen3_moe", "qwen3_moe", heads=4, width=40, layers=3, num_experts=12, per_token=3,
              moe_intermediate_size=24, norm_topk_prob=True, mlp_only_layers=[1], seed=2),
    _moe_case("qwen3_moe, window", "qwen3_moe", heads=6, width=48, tied=True, num_experts=3, per_token=2,
              moe_intermediate_size=40, norm_topk_prob=False, use_sliding_window=True, sliding_window=24,
              decoder_sparse_step=2),
    _moe_case("olmoe", "olmoe", heads=4, width=64, intermediate_size=40, num_experts=8, per_token=3,
              norm_topk_prob=False, seed=2),
    _moe_case("olmoe, biased", "olmoe", heads=8, width=128, intermediate_size=40, num_experts=4, per_token=3,
              norm_topk_prob=True, attention_bias=True, tied=True),
)  # fmt: skip


def margin(oracle: Oracle) -> float:
    """The smallest lead, in log probability, of an expert that is chosen over one that is not."""
    config, moe = oracle.config, oracle.config.moe
    assert moe is not None
    taps, tokens, lengths = (Collect("moe/probs"),), jnp.asarray(oracle.tokens), jnp.asarray(oracle.lengths)
    out = jax.jit(lambda params: forward(config, params, tokens, lengths=lengths, taps=taps).taps[0])
    sparse = [i for i in range(config.layers) if moe.is_in(i)]
    probs = np.asarray(out(oracle.params), np.float64)[sparse][:, oracle.valid]
    ordered = np.sort(np.log(probs), axis=-1)[..., ::-1]
    return float((ordered[..., moe.per_token - 1] - ordered[..., moe.per_token]).min())


def _norm_by_head(real):
    """Root mean squares of each head instead of all, scales as they are."""

    def queries_and_keys(self, hidden):
        norm, d = layers.rms_norm, self.config.head_dim

        def by_head(x, scale, *, eps):
            heads = norm(x.reshape(*x.shape[:-1], -1, d), jnp.ones(d), eps=eps)
            return heads.reshape(x.shape) * scale

        with mock.patch.object(layers, "rms_norm", by_head):
            return real(self, hidden)

    return queries_and_keys


def _rolled(kernels):
    return jnp.roll(kernels, 1, axis=0)


def _by_name(kernels):
    """Experts in the order of their numbers as text: 0, 1, 10, 11, 2."""
    return kernels[np.array(sorted(range(kernels.shape[0]), key=str))]


_EXPERTS = r"\w+/moe/experts/\w+"
_NO_QK_NORM = params_without(r"\w+/attn/[qk]_norm/scale")
_SOME = "qwen2_moe, some layers"
_MIXTRAL = (
    Fault("mixtral: not renormalised", "mixtral", config=moe_with(renormalize=False)),
    Fault("mixtral: sigmoid for softmax", "mixtral", config=moe_with(scores="sigmoid")),
    Fault("mixtral: w1 and w3 swapped", "mixtral", params=swapped("experts/gate", "experts/up")),
    Fault("mixtral: experts one further", "mixtral", params=params_where(_EXPERTS, _rolled)),
    Fault("mixtral: w2 of another expert", "mixtral", params=params_where(r"\w+/moe/experts/down", _rolled)),
    Fault("mixtral: router's experts one further", "mixtral",
          params=params_where(r"\w+/moe/router/kernel", lambda kernel: jnp.roll(kernel, 1, axis=1))),
    Fault("mixtral: one expert fewer a token", "mixtral, window", config=moe_with(per_token=2)),
    Fault("mixtral: one expert more a token", "mixtral, window", config=moe_with(per_token=4)),
    Fault("mixtral: window one too short", "mixtral, window", config=config_with(window=31)),
    Fault("mixtral: window one too long", "mixtral, window", config=config_with(window=33)),
    Fault("mixtral: window ignored", "mixtral, window", config=config_with(window=None)),
    Fault("mixtral: gelu for silu in experts", "mixtral, window",
          patch=(feed_forward.jax.nn, "silu", lambda real: jax.nn.gelu)),
)  # fmt: skip
_QWEN2_MOE = (
    Fault("qwen2_moe: norm_topk_prob invented", "qwen2_moe", config=moe_with(renormalize=True)),
    Fault("qwen2_moe: norm_topk_prob ignored", _SOME, config=moe_with(renormalize=False)),
    Fault("qwen2_moe: shared expert left out", _SOME, config=moe_with(shared=0, shared_gate=False)),
    Fault("qwen2_moe: gate of the shared expert left out", _SOME, config=moe_with(shared_gate=False)),
    Fault("qwen2_moe: gate of the shared expert not squashed", _SOME,
          patch=(layers.nn, "sigmoid", lambda real: lambda x: x)),
    Fault("qwen2_moe: shared gate and up swapped", _SOME, params=swapped("shared/gate/", "shared/up/")),
    Fault("qwen2_moe: one expert fewer a token", _SOME, config=moe_with(per_token=2)),
    Fault("qwen2_moe: bias of values dropped", _SOME, params=params_where(r"\w+/attn/v/bias", jnp.zeros_like)),
    Fault("gradient: gate of the shared expert detached", _SOME, shows_in="gradients",
          patch=(layers.nn, "sigmoid", lambda real: lambda x: jax.lax.stop_gradient(real(x)))),
)  # fmt: skip
_QWEN3_MOE = (
    Fault("qwen3_moe: norm_topk_prob ignored", "qwen3_moe", config=moe_with(renormalize=False)),
    Fault("qwen3_moe: norm_topk_prob invented", "qwen3_moe, window", config=moe_with(renormalize=True)),
    Fault("qwen3_moe: experts in the order of their names", "qwen3_moe", params=params_where(_EXPERTS, _by_name)),
    Fault("qwen3_moe: one expert fewer a token", "qwen3_moe", config=moe_with(per_token=2)),
    Fault("qwen3_moe: qk-norm left out", "qwen3_moe, window", config=config_with(qk_norm=None), params=_NO_QK_NORM),
    Fault("qwen3_moe: window one too long", "qwen3_moe, window", config=config_with(window=25)),
    Fault("qwen3_moe: use_sliding_window ignored", "qwen3_moe, window", config=config_with(window=None)),
    Fault("gradient: router detached", "qwen3_moe, window", shows_in="gradients",
          patch=(routing, "router_logits", lambda real: lambda x, kernel: jax.lax.stop_gradient(real(x, kernel)))),
)  # fmt: skip
_OLMOE = (
    Fault("olmoe: qk-norm over the head, not the projection", "olmoe, biased",
          patch=(layers.Attention, "_queries_and_keys", _norm_by_head)),
    Fault("olmoe: qk-norm left out", "olmoe, biased", config=config_with(qk_norm=None), params=_NO_QK_NORM),
    Fault("olmoe: scales of qk-norm dropped", "olmoe, biased",
          params=params_where(r"\w+/attn/[qk]_norm/scale", jnp.ones_like)),
    Fault("olmoe: norm_topk_prob invented", "olmoe", config=moe_with(renormalize=True)),
    Fault("olmoe: norm_topk_prob ignored", "olmoe, biased", config=moe_with(renormalize=False)),
    Fault("olmoe: one expert fewer a token", "olmoe, biased", config=moe_with(per_token=2)),
    Fault("olmoe: gate and up swapped, experts too", "olmoe, biased",
          params=in_turn(swapped("experts/gate", "experts/up"), params_where(_EXPERTS, _rolled))),
    Fault("gradient: router's input detached", "olmoe, biased", shows_in="gradients",
          patch=(routing, "router_logits", lambda real: lambda x, kernel: real(jax.lax.stop_gradient(x), kernel))),
)  # fmt: skip
FAULTS = (*_MIXTRAL, *_QWEN2_MOE, *_QWEN3_MOE, *_OLMOE)
