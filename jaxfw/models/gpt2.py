"""The GPT-2 family: learned positions, LayerNorm, biases everywhere, a plain feed-forward and a tied head.

Kernels are stored as they are used here, [in out], and those of queries, keys and values side by side in one tensor.
The published files name their tensors without the "transformer." that transformers writes.
"""

from collections.abc import Mapping
from typing import Any

from jaxfw.core.errors import unknown
from jaxfw.models.hub_config import attribute, check_attributes
from jaxfw.models.hub_names import Stored
from jaxfw.nn.config import DecoderConfig

MODEL_TYPE = "gpt2"
ARCHITECTURE = "GPT2LMHeadModel"
# Causal masks, which files hold as buffers of the attention.
IGNORED_TENSORS = r"transformer\.h\.\d+\.attn\.(masked_)?bias"
ALIASES = ((r"^((?:wte|wpe|ln_f|h)\..+)$", r"transformer.\1"),)

USED = frozenset(
    "activation_function initializer_range layer_norm_epsilon n_embd n_head n_inner n_layer n_positions "
    "tie_word_embeddings vocab_size".split()
)
# Dropout is of training; the summary is of other heads than a language model's.
IRRELEVANT = frozenset(
    "attn_pdrop embd_pdrop resid_pdrop summary_activation summary_first_dropout summary_proj_to_labels summary_type "
    "summary_use_proj n_ctx n_special predict_special_tokens output_past gradient_checkpointing".split()
)
NEUTRAL = {
    "scale_attn_weights": True,
    "scale_attn_by_inverse_layer_idx": False,
    "reorder_and_upcast_attn": False,
}
_ACTIVATIONS = {"gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh", "gelu": "gelu", "silu": "silu"}


def read_config(attributes: Mapping[str, Any], *, param_dtype: str, dtype: str, softmax_dtype: str) -> DecoderConfig:
    """A published config.json as a `DecoderConfig`; `InputError` for what this family does not know."""
    check_attributes(attributes, USED, irrelevant=IRRELEVANT, neutral=NEUTRAL)
    width, heads = attribute(attributes, "n_embd", int, 768), attribute(attributes, "n_head", int, 12)
    activation = attributes.get("activation_function") or "gelu_new"
    if activation not in _ACTIVATIONS:
        raise unknown("config.json: activation_function", activation, _ACTIVATIONS)
    return DecoderConfig(
        vocab=attribute(attributes, "vocab_size", int, 50257),
        width=width,
        ffn=attribute(attributes, "n_inner", int, 4 * width),
        layers=attribute(attributes, "n_layer", int, 12),
        heads=heads,
        kv_heads=heads,
        head_dim=width // max(heads, 1),
        positions=attribute(attributes, "n_positions", int, 1024),
        rope=None,
        learned_positions=True,
        norm="layer",
        norm_eps=attribute(attributes, "layer_norm_epsilon", float, 1e-5),
        gated=False,
        activation=_ACTIVATIONS[activation],
        tie_embeddings=attribute(attributes, "tie_word_embeddings", bool, True),
        qkv_bias=True,
        out_bias=True,
        mlp_bias=True,
        init_std=attribute(attributes, "initializer_range", float, 0.02),
        param_dtype=param_dtype,
        dtype=dtype,
        softmax_dtype=softmax_dtype,
    )


def write_config(config: DecoderConfig) -> dict[str, Any]:
    """The attributes of config.json that describe the model, in the v4 and the v5 layout at once."""
    names = {ours: theirs for theirs, ours in reversed(_ACTIVATIONS.items())}
    if config.activation not in names:
        raise unknown("model.activation of a GPT-2", config.activation, names)
    return {
        "architectures": [ARCHITECTURE],
        "model_type": MODEL_TYPE,
        "vocab_size": config.vocab,
        "n_embd": config.width,
        "n_inner": None if config.ffn == 4 * config.width else config.ffn,
        "n_layer": config.layers,
        "n_head": config.heads,
        "n_positions": config.positions,
        "activation_function": names[config.activation],
        "layer_norm_epsilon": config.norm_eps,
        "initializer_range": config.init_std,
        "tie_word_embeddings": config.tie_embeddings,
        "attn_pdrop": 0.0,
        "embd_pdrop": 0.0,
        "resid_pdrop": 0.0,
        "torch_dtype": config.param_dtype,
        "dtype": config.param_dtype,
    }


def tensors(config: DecoderConfig) -> dict[str, Stored]:
    """Where each parameter lies in the files."""
    names = {
        "embed/embedding": Stored(("transformer.wte.weight",)),
        "embed/positions": Stored(("transformer.wpe.weight",)),
    }
    if not config.tie_embeddings:
        names["head/lm_head"] = Stored(("lm_head.weight",))
    names |= _pair("head/norm", "transformer.ln_f", "scale")
    for i in range(config.layers):
        ours, theirs = f"layers_{i}", f"transformer.h.{i}"
        names |= _pair(f"{ours}/attn_norm", f"{theirs}.ln_1", "scale")
        names |= _pair(f"{ours}/mlp_norm", f"{theirs}.ln_2", "scale")
        for j, part in enumerate("qkv"):
            columns = (j * config.width, config.width)
            names |= _pair(f"{ours}/attn/{part}", f"{theirs}.attn.c_attn", "kernel", columns)
        names |= _pair(f"{ours}/attn/o", f"{theirs}.attn.c_proj", "kernel")
        names |= _pair(f"{ours}/mlp/up", f"{theirs}.mlp.c_fc", "kernel")
        names |= _pair(f"{ours}/mlp/down", f"{theirs}.mlp.c_proj", "kernel")
    return names


def _pair(ours: str, theirs: str, weight: str, part: tuple[int, int] | None = None) -> dict[str, Stored]:
    return {
        f"{ours}/{weight}": Stored((f"{theirs}.weight",), part=part),
        f"{ours}/bias": Stored((f"{theirs}.bias",), part=part),
    }
