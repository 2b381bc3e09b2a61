"""The Mixtral family (Jiang et al. 2024, arXiv:2401.04088): Mistral with experts in every layer, two for a token."""

from collections.abc import Mapping
from typing import Any

from jaxfw.models.hub_config import (
    DECODER_ATTRIBUTES,
    ROTARY_BUFFERS,
    attribute,
    check_attributes,
    read_decoder,
    write_decoder,
)
from jaxfw.models.hub_mixture import mixture
from jaxfw.models.hub_names import ExpertNames, Stored, llama_tensors
from jaxfw.nn.config import DecoderConfig, MoEConfig

MODEL_TYPE = "mixtral"
ARCHITECTURE = "MixtralForCausalLM"
IGNORED_TENSORS = ROTARY_BUFFERS

USED = DECODER_ATTRIBUTES | {"num_experts_per_tok", "num_local_experts", "sliding_window"}
DEFAULTS = {
    "max_position_embeddings": 131072, "num_experts_per_tok": 2, "num_key_value_heads": 8, "num_local_experts": 8,
    "rms_norm_eps": 1e-5, "sliding_window": None,
}  # fmt: skip
THETA = {"rope_theta": 1e6}

_NAMES = ExpertNames(
    router="block_sparse_moe.gate",
    expert="block_sparse_moe.experts.{e}",
    projections={"gate": "w1", "up": "w3", "down": "w2"},
)


def read_config(attributes: Mapping[str, Any], **dtypes: str) -> DecoderConfig:
    """A published config.json as a `DecoderConfig`; `dtypes` are its param_dtype, dtype and softmax_dtype."""
    check_attributes(attributes, USED)
    attributes = DEFAULTS | ({} if attributes.get("rope_parameters") else THETA) | dict(attributes)
    moe = MoEConfig(
        experts=attribute(attributes, "num_local_experts", int),
        per_token=attribute(attributes, "num_experts_per_tok", int),
        ffn=attribute(attributes, "intermediate_size", int),
        renormalize=True,
    )
    window = None if attributes["sliding_window"] is None else attribute(attributes, "sliding_window", int)
    return read_decoder(attributes, moe=moe, window=window, **dtypes)


def write_config(config: DecoderConfig) -> dict[str, Any]:
    """The attributes of config.json that describe the model, in the v4 and the v5 layout at once."""
    moe = mixture(config, MODEL_TYPE)
    return {
        "architectures": [ARCHITECTURE],
        "model_type": MODEL_TYPE,
        **write_decoder(config),
        "intermediate_size": moe.ffn,
        "num_local_experts": moe.experts,
        "num_experts_per_tok": moe.per_token,
        "router_jitter_noise": 0.0,
        "sliding_window": config.window,
    }


def tensors(config: DecoderConfig) -> dict[str, Stored]:
    """Where each parameter lies in the files."""
    return llama_tensors(config, _NAMES)
