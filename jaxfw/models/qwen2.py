"""The Qwen 1.5, 2 and 2.5 families: LLaMA with biases of queries, keys and values, and windows in some layers.

Published models declare a window and do not use it (`use_sliding_window` false).
"""

from collections.abc import Mapping
from typing import Any

from jaxfw.models.hub_config import (
    DECODER_ATTRIBUTES,
    ROTARY_BUFFERS,
    WINDOWS,
    check_attributes,
    read_decoder,
    read_windows,
    write_decoder,
    write_windows,
)
from jaxfw.models.hub_names import Stored, llama_tensors
from jaxfw.nn.config import DecoderConfig

MODEL_TYPE = "qwen2"
ARCHITECTURE = "Qwen2ForCausalLM"
IGNORED_TENSORS = ROTARY_BUFFERS

USED = DECODER_ATTRIBUTES | WINDOWS
DEFAULTS = {"max_position_embeddings": 32768, "num_key_value_heads": 32}


def read_config(attributes: Mapping[str, Any], **dtypes: str) -> DecoderConfig:
    """A published config.json as a `DecoderConfig`; `dtypes` are its param_dtype, dtype and softmax_dtype."""
    check_attributes(attributes, USED)
    attributes = DEFAULTS | dict(attributes)
    return read_decoder(attributes, qkv_bias=True, **read_windows(attributes), **dtypes)


def write_config(config: DecoderConfig) -> dict[str, Any]:
    """The attributes of config.json that describe the model, in the v4 and the v5 layout at once."""
    return {
        "architectures": [ARCHITECTURE],
        "model_type": MODEL_TYPE,
        **write_decoder(config),
        **write_windows(config),
    }


def tensors(config: DecoderConfig) -> dict[str, Stored]:
    """Where each parameter lies in the files."""
    return llama_tensors(config)
