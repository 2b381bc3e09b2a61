"""DeepSeekMoE, the first version (Dai et al. 2024, arXiv:2401.06066): a dense first layer, then small experts beside
shared ones that every token passes.

transformers does not have it. What counts is the code that the weights were published with.
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
from jaxfw.models.hub_mixture import mixture
from jaxfw.models.hub_names import ExpertNames, Stored, llama_tensors
from jaxfw.nn.config import DecoderConfig, MoEConfig

MODEL_TYPE = "deepseek"
ARCHITECTURE = "DeepseekForCausalLM"
IGNORED_TENSORS = ROTARY_BUFFERS

USED = DECODER_ATTRIBUTES | {
    "attention_bias", "first_k_dense_replace", "moe_intermediate_size", "moe_layer_freq", "n_routed_experts",
    "n_shared_experts", "norm_topk_prob", "num_experts_per_tok",
}  # fmt: skip

_NAMES = ExpertNames(shared="mlp.shared_experts")


def read_config(attributes: Mapping[str, Any], **dtypes: str) -> DecoderConfig:
    """A published config.json as a `DecoderConfig`; `dtypes` are its param_dtype, dtype and softmax_dtype.

    Its shared experts, each as wide as a routed one, are one feed-forward of their widths together.
    """
    check_attributes(attributes, USED, neutral={"scoring_func": "softmax"})
    ffn = attribute(attributes, "moe_intermediate_size", int)
    per_token = attribute(attributes, "num_experts_per_tok", int)
    moe = MoEConfig(
        experts=attribute(attributes, "n_routed_experts", int),
        per_token=per_token,
        ffn=ffn,
        shared=ffn * attribute(attributes, "n_shared_experts", int, 0),
        # The published code divides by the sum only where several are chosen.
        renormalize=per_token > 1 and attribute(attributes, "norm_topk_prob", bool, False),
        **_read_sparse_layers(attributes),
    )
    return read_decoder(attributes, moe=moe, **read_attention_bias(attributes), **dtypes)


def _read_sparse_layers(attributes: Mapping[str, Any]) -> dict[str, Any]:
    """Experts are in every layer whose number is a multiple of moe_layer_freq, from first_k_dense_replace on."""
    every = attribute(attributes, "moe_layer_freq", int, 1)
    dense = attribute(attributes, "first_k_dense_replace", int, 0)
    if every < 1:
        raise InputError(f"config.json: moe_layer_freq={every} must be from 1 on: every how many layers has experts.")
    return {"first": -(-dense // every) * every, "every": every}


def write_config(config: DecoderConfig) -> dict[str, Any]:
    """The attributes of config.json that describe the model, in the v4 layout and, of the rotation, the v5 layout."""
    moe = mixture(config, MODEL_TYPE)
    for name, of in (("shared", "ffn"), ("first", "every")):
        value, unit = getattr(moe, name), getattr(moe, of)
        if value % unit:
            raise InputError(
                f"model.moe.{name}={value} must be a multiple of model.moe.{of}={unit} in a config.json of model_type "
                f"{MODEL_TYPE!r}, which counts in these."
            )
    return {
        "architectures": [ARCHITECTURE],
        "model_type": MODEL_TYPE,
        **write_decoder(config),
        **write_attention_bias(config),
        "n_routed_experts": moe.experts,
        "n_shared_experts": moe.shared // moe.ffn or None,
        "num_experts_per_tok": moe.per_token,
        "moe_intermediate_size": moe.ffn,
        "first_k_dense_replace": moe.first,
        "moe_layer_freq": moe.every,
        "norm_topk_prob": moe.renormalize,
        "scoring_func": "softmax",
    }


def tensors(config: DecoderConfig) -> dict[str, Stored]:
    """Where each parameter lies in the files."""
    return llama_tensors(config, _NAMES)
