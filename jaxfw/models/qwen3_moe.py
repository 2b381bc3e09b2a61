"""Qwen3-MoE: Qwen3's attention, whose queries and keys are normalised head by head, and many small experts.

A window, which no published model has, is one of all layers here.
"""

from collections.abc import Mapping
from typing import Any

from jaxfw.core.errors import InputError
from jaxfw.models.hub_config import (
    DECODER_ATTRIBUTES,
    ROTARY_BUFFERS,
    attribute,
    check_attributes,
    read_attention_bias,
    read_decoder,
    write_attention_bias,
    write_decoder,
)
from jaxfw.models.hub_mixture import SPARSE_LAYERS, mixture, read_sparse_layers, write_sparse_layers
from jaxfw.models.hub_names import Stored, llama_tensors
from jaxfw.nn.config import DecoderConfig, MoEConfig

MODEL_TYPE = "qwen3_moe"
ARCHITECTURE = "Qwen3MoeForCausalLM"
IGNORED_TENSORS = ROTARY_BUFFERS

USED = DECODER_ATTRIBUTES | SPARSE_LAYERS | {
    "attention_bias", "moe_intermediate_size", "norm_topk_prob", "num_experts", "num_experts_per_tok",
    "num_local_experts", "sliding_window", "use_sliding_window",
}  # fmt: skip
DEFAULTS = {
    "max_position_embeddings": 32768, "moe_intermediate_size": 768, "norm_topk_prob": False,
    "num_experts_per_tok": 8, "num_key_value_heads": 4, "sliding_window": 4096,
}  # fmt: skip


def read_config(attributes: Mapping[str, Any], **dtypes: str) -> DecoderConfig:
    """A published config.json as a `DecoderConfig`; `dtypes` are its param_dtype, dtype and softmax_dtype."""
    check_attributes(attributes, USED, irrelevant=("max_window_layers",))
    attributes = DEFAULTS | dict(attributes)
    moe = MoEConfig(
        experts=_experts(attributes),
        per_token=attribute(attributes, "num_experts_per_tok", int),
        ffn=attribute(attributes, "moe_intermediate_size", int),
        renormalize=attribute(attributes, "norm_topk_prob", bool),
        **read_sparse_layers(attributes),
    )
    window = None
    if attribute(attributes, "use_sliding_window", bool, False) and attributes["sliding_window"] is not None:
        window = attribute(attributes, "sliding_window", int)
    biases = read_attention_bias(attributes)
    return read_decoder(attributes, moe=moe, qk_norm="head", window=window, **biases, **dtypes)


def _experts(attributes: Mapping[str, Any]) -> int:
    """How many: `num_experts` (v4), or what transformers 5 writes in its place."""
    names = ("num_experts", "num_local_experts")
    counts = {name: attribute(attributes, name, int) for name in names if attributes.get(name) is not None}
    if len(set(counts.values())) > 1:
        raise InputError(f"config.json: {counts} disagree: keep the one that the weights have.")
    return next(iter(counts.values()), 128)


def write_config(config: DecoderConfig) -> dict[str, Any]:
    """The attributes of config.json that describe the model, in the v4 and the v5 layout at once."""
    moe = mixture(config, MODEL_TYPE)
    return {
        "architectures": [ARCHITECTURE],
        "model_type": MODEL_TYPE,
        **write_decoder(config),
        **write_attention_bias(config),
        **write_sparse_layers(moe),
        "num_experts": moe.experts,
        "num_experts_per_tok": moe.per_token,
        "moe_intermediate_size": moe.ffn,
        "norm_topk_prob": moe.renormalize,
        "use_sliding_window": config.window is not None,
        "sliding_window": config.window,
    }


def tensors(config: DecoderConfig) -> dict[str, Stored]:
    """Where each parameter lies in the files."""
    return llama_tensors(config)
