"""Qwen1.5-MoE and Qwen2-MoE: Qwen2's attention, many small experts, and a gated one that every token passes.

Sliding windows are refused: which layers have them differs between versions of transformers, and no published model
uses the window that it declares.
"""

from collections.abc import Mapping
from typing import Any

from jaxfw.core.errors import InputError
from jaxfw.models.hub_config import (
    DECODER_ATTRIBUTES,
    ROTARY_BUFFERS,
    WINDOWS,
    attribute,
    check_attributes,
    read_decoder,
    read_windows,
    write_decoder,
)
from jaxfw.models.hub_mixture import SPARSE_LAYERS, mixture, read_sparse_layers, write_sparse_layers
from jaxfw.models.hub_names import Stored, llama_tensors
from jaxfw.nn.config import DecoderConfig, MoEConfig

MODEL_TYPE = "qwen2_moe"
ARCHITECTURE = "Qwen2MoeForCausalLM"
IGNORED_TENSORS = ROTARY_BUFFERS

USED = DECODER_ATTRIBUTES | SPARSE_LAYERS | WINDOWS - {"use_sliding_window"} | {
    "moe_intermediate_size", "norm_topk_prob", "num_experts", "num_experts_per_tok", "qkv_bias",
    "shared_expert_intermediate_size",
}  # fmt: skip
DEFAULTS = {
    "max_position_embeddings": 32768, "moe_intermediate_size": 1408, "norm_topk_prob": False, "num_experts": 60,
    "num_experts_per_tok": 4, "num_key_value_heads": 16, "qkv_bias": True, "shared_expert_intermediate_size": 5632,
}  # fmt: skip


def read_config(attributes: Mapping[str, Any], **dtypes: str) -> DecoderConfig:
    """A published config.json as a `DecoderConfig`; `dtypes` are its param_dtype, dtype and softmax_dtype."""
    check_attributes(attributes, USED)
    attributes = DEFAULTS | dict(attributes)
    moe = MoEConfig(
        experts=attribute(attributes, "num_experts", int),
        per_token=attribute(attributes, "num_experts_per_tok", int),
        ffn=attribute(attributes, "moe_intermediate_size", int),
        shared=attribute(attributes, "shared_expert_intermediate_size", int),
        shared_gate=True,
        renormalize=attribute(attributes, "norm_topk_prob", bool),
        **read_sparse_layers(attributes),
    )
    qkv_bias = attribute(attributes, "qkv_bias", bool)
    return read_decoder(attributes, moe=moe, qkv_bias=qkv_bias, **read_windows(attributes), **dtypes)


def write_config(config: DecoderConfig) -> dict[str, Any]:
    """The attributes of config.json that describe the model, in the v4 and the v5 layout at once."""
    moe = mixture(config, MODEL_TYPE)
    if not moe.shared:
        raise InputError(f"model.moe.shared=0 cannot be written: every {MODEL_TYPE} model has a shared expert.")
    return {
        "architectures": [ARCHITECTURE],
        "model_type": MODEL_TYPE,
        **write_decoder(config),
        **write_sparse_layers(moe),
        "num_experts": moe.experts,
        "num_experts_per_tok": moe.per_token,
        "moe_intermediate_size": moe.ffn,
        "shared_expert_intermediate_size": moe.shared,
        "norm_topk_prob": moe.renormalize,
        "qkv_bias": config.qkv_bias,
        "use_sliding_window": False,
    }


def tensors(config: DecoderConfig) -> dict[str, Stored]:
    """Where each parameter lies in the files."""
    return llama_tensors(config)
