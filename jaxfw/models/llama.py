"""The LLaMA family (2, 3, 3.1, 3.2, 3.3): its config.json and the names of its tensors on the Hub."""

from typing import Any

from jaxfw.core.errors import InputError
from jaxfw.models.hub_config import attribute, check_attributes, read_rope, write_rope
from jaxfw.models.hub_names import Stored, llama_tensors
from jaxfw.nn.config import DecoderConfig

MODEL_TYPE = "llama"
ARCHITECTURE = "LlamaForCausalLM"

_USED = {
    "attention_bias", "head_dim", "hidden_size", "initializer_range", "intermediate_size", "max_position_embeddings",
    "mlp_bias", "num_attention_heads", "num_hidden_layers", "num_key_value_heads", "rms_norm_eps", "rope_parameters",
    "rope_scaling", "rope_theta", "tie_word_embeddings", "vocab_size",
}  # fmt: skip

# Buffers that old checkpoints hold beside the parameters; they are computed from config.json here.
IGNORED_TENSORS = r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq"


def read_config(attributes: dict[str, Any], *, param_dtype: str, dtype: str, softmax_dtype: str) -> DecoderConfig:
    """A published config.json as a `DecoderConfig`; `InputError` for what this family does not know."""
    check_attributes(attributes, _USED)
    width, heads = attribute(attributes, "hidden_size", int), attribute(attributes, "num_attention_heads", int)
    positions = attribute(attributes, "max_position_embeddings", int, 2048)
    has_bias = attribute(attributes, "attention_bias", bool, False)
    return DecoderConfig(
        vocab=attribute(attributes, "vocab_size", int),
        width=width,
        ffn=attribute(attributes, "intermediate_size", int),
        layers=attribute(attributes, "num_hidden_layers", int),
        heads=heads,
        kv_heads=attribute(attributes, "num_key_value_heads", int, heads),
        head_dim=attribute(attributes, "head_dim", int, width // max(heads, 1)),
        positions=positions,
        rope=read_rope(attributes, positions),
        norm_eps=attribute(attributes, "rms_norm_eps", float, 1e-6),
        tie_embeddings=attribute(attributes, "tie_word_embeddings", bool, False),
        qkv_bias=has_bias,
        out_bias=has_bias,
        mlp_bias=attribute(attributes, "mlp_bias", bool, False),
        init_std=attribute(attributes, "initializer_range", float, 0.02),
        param_dtype=param_dtype,
        dtype=dtype,
        softmax_dtype=softmax_dtype,
    )


def write_config(config: DecoderConfig) -> dict[str, Any]:
    """The attributes of config.json that describe the model, in the v4 and the v5 layout at once."""
    if config.qkv_bias != config.out_bias:
        raise InputError(
            f"model.qkv_bias={config.qkv_bias} and model.out_bias={config.out_bias} differ, but a LLaMA config.json "
            "has one attention_bias for all four projections: set both alike."
        )
    return {
        "architectures": [ARCHITECTURE],
        "model_type": MODEL_TYPE,
        "vocab_size": config.vocab,
        "hidden_size": config.width,
        "intermediate_size": config.ffn,
        "num_hidden_layers": config.layers,
        "num_attention_heads": config.heads,
        "num_key_value_heads": config.kv_heads,
        "head_dim": config.head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": config.positions,
        "initializer_range": config.init_std,
        "rms_norm_eps": config.norm_eps,
        "tie_word_embeddings": config.tie_embeddings,
        "attention_bias": config.qkv_bias,
        "attention_dropout": 0.0,
        "mlp_bias": config.mlp_bias,
        **write_rope(config.rope),
        "torch_dtype": config.param_dtype,
        "dtype": config.param_dtype,
    }


def tensors(config: DecoderConfig) -> dict[str, Stored]:
    """Where each parameter lies in the files."""
    return llama_tensors(config)
