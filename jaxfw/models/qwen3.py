"""The Qwen 3 family: LLaMA with RMS norms of each query and key head before rotation, and windows in some layers.

Published models have no window, no biases, and heads of 128 whatever the width.
"""

from collections.abc import Mapping
from typing import Any

from jaxfw.models.hub_config import (
    DECODER_ATTRIBUTES,
    ROTARY_BUFFERS,
    WINDOWS,
    check_attributes,
    read_attention_bias,
    read_decoder,
    read_windows,
    write_attention_bias,
    write_decoder,
    write_windows,
)
from jaxfw.models.hub_names import Stored, llama_tensors
from jaxfw.nn.config import DecoderConfig

MODEL_TYPE = "qwen3"
ARCHITECTURE = "Qwen3ForCausalLM"
IGNORED_TENSORS = ROTARY_BUFFERS

USED = DECODER_ATTRIBUTES | WINDOWS | {"attention_bias"}
DEFAULTS = {"head_dim": 128, "max_position_embeddings": 32768, "num_key_value_heads": 32}


def read_config(attributes: Mapping[str, Any], **dtypes: str) -> DecoderConfig:
    """A published config.json as a `DecoderConfig`; `dtypes` are its param_dtype, dtype and softmax_dtype."""
    check_attributes(attributes, USED)
    attributes = DEFAULTS | dict(attributes)
    own = read_windows(attributes) | read_attention_bias(attributes)
    return read_decoder(attributes, qk_norm="head", **own, **dtypes)


def write_config(config: DecoderConfig) -> dict[str, Any]:
    """The attributes of config.json that describe the model, in the v4 and the v5 layout at once."""
    return {
        "architectures": [ARCHITECTURE],
        "model_type": MODEL_TYPE,
        **write_decoder(config),
        **write_windows(config),
        **write_attention_bias(config),
    }


def tensors(config: DecoderConfig) -> dict[str, Stored]:
    """Where each parameter lies in the files."""
    return llama_tensors(config)
