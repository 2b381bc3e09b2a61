"""The Mistral family (7B, Nemo, Small 3): LLaMA without biases and with a sliding window in every layer."""

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
from jaxfw.models.hub_names import Stored, llama_tensors
from jaxfw.nn.config import DecoderConfig

MODEL_TYPE = "mistral"
ARCHITECTURE = "MistralForCausalLM"
IGNORED_TENSORS = ROTARY_BUFFERS

USED = DECODER_ATTRIBUTES | {"sliding_window"}
# Absent is a window of 4096 in transformers; null, as from version 0.2 of the 7B on, is none.
DEFAULTS = {"max_position_embeddings": 131072, "num_key_value_heads": 8, "sliding_window": 4096}


def read_config(attributes: Mapping[str, Any], **dtypes: str) -> DecoderConfig:
    """A published config.json as a `DecoderConfig`; `dtypes` are its param_dtype, dtype and softmax_dtype."""
    check_attributes(attributes, USED)
    attributes = DEFAULTS | dict(attributes)
    window = None if attributes["sliding_window"] is None else attribute(attributes, "sliding_window", int)
    return read_decoder(attributes, window=window, **dtypes)


def write_config(config: DecoderConfig) -> dict[str, Any]:
    """The attributes of config.json that describe the model, in the v4 and the v5 layout at once."""
    return {
        "architectures": [ARCHITECTURE],
        "model_type": MODEL_TYPE,
        **write_decoder(config),
        "sliding_window": config.window,
    }


def tensors(config: DecoderConfig) -> dict[str, Stored]:
    """Where each parameter lies in the files."""
    return llama_tensors(config)
