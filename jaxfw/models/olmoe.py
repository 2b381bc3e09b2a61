"""The OLMoE family (Muennighoff et al. 2024, arXiv:2409.02060): small experts in every layer, and queries and keys
normalised over all heads together.
"""

from collections.abc import Mapping
from typing import Any

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
from jaxfw.models.hub_mixture import mixture
from jaxfw.models.hub_names import Stored, llama_tensors
from jaxfw.nn.config import DecoderConfig, MoEConfig

MODEL_TYPE = "olmoe"
ARCHITECTURE = "OlmoeForCausalLM"
IGNORED_TENSORS = ROTARY_BUFFERS

USED = DECODER_ATTRIBUTES | {"attention_bias", "norm_topk_prob", "num_experts", "num_experts_per_tok"}
DEFAULTS = {
    "max_position_embeddings": 4096, "norm_topk_prob": False, "num_experts": 64, "num_experts_per_tok": 8,
    "rms_norm_eps": 1e-5,
}  # fmt: skip


def read_config(attributes: Mapping[str, Any], **dtypes: str) -> DecoderConfig:
    """A published config.json as a `DecoderConfig`; `dtypes` are its param_dtype, dtype and softmax_dtype.

    Values of attention that are cut off (`clip_qkv`) are refused.
    """
    check_attributes(attributes, USED)
    attributes = DEFAULTS | dict(attributes)
    moe = MoEConfig(
        experts=attribute(attributes, "num_experts", int),
        per_token=attribute(attributes, "num_experts_per_tok", int),
        ffn=attribute(attributes, "intermediate_size", int),
        renormalize=attribute(attributes, "norm_topk_prob", bool),
    )
    return read_decoder(attributes, moe=moe, qk_norm="projection", **read_attention_bias(attributes), **dtypes)


def write_config(config: DecoderConfig) -> dict[str, Any]:
    """The attributes of config.json that describe the model, in the v4 and the v5 layout at once."""
    moe = mixture(config, MODEL_TYPE)
    return {
        "architectures": [ARCHITECTURE],
        "model_type": MODEL_TYPE,
        **write_decoder(config),
        **write_attention_bias(config),
        "intermediate_size": moe.ffn,
        "num_experts": moe.experts,
        "num_experts_per_tok": moe.per_token,
        "norm_topk_prob": moe.renormalize,
        "clip_qkv": None,
    }


def tensors(config: DecoderConfig) -> dict[str, Stored]:
    """Where each parameter lies in the files."""
    return llama_tensors(config)
