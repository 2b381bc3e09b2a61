"""The LLaMA family (2, 3, 3.1, 3.2, 3.3): its config.json and the names of its tensors on the Hub."""

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
from jaxfw.models.hub_names import Stored, llama_tensors
from jaxfw.nn.config import DecoderConfig

MODEL_TYPE = "llama"
ARCHITECTURE = "LlamaForCausalLM"
IGNORED_TENSORS = ROTARY_BUFFERS

USED = DECODER_ATTRIBUTES | {"attention_bias", "mlp_bias"}


def read_config(attributes: Mapping[str, Any], **dtypes: str) -> DecoderConfig:
    """A published config.json as a `DecoderConfig`; `dtypes` are its param_dtype, dtype and softmax_dtype."""
    check_attributes(attributes, USED)
    biases = read_attention_bias(attributes) | {"mlp_bias": attribute(attributes, "mlp_bias", bool, False)}
    return read_decoder(attributes, **biases, **dtypes)


def write_config(config: DecoderConfig) -> dict[str, Any]:
    """The attributes of config.json that describe the model, in the v4 and the v5 layout at once."""
    return {
        "architectures": [ARCHITECTURE],
        "model_type": MODEL_TYPE,
        **write_decoder(config),
        **write_attention_bias(config),
        "mlp_bias": config.mlp_bias,
    }


def tensors(config: DecoderConfig) -> dict[str, Stored]:
    """Where each parameter lies in the files."""
    return llama_tensors(config)
