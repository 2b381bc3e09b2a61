"""Reading a published config.json strictly: every attribute is used, known to be irrelevant, or refused.

Two layouts are in use. v4, which most of the Hub holds: `rope_theta` and `rope_scaling` side by side, `torch_dtype`.
v5, which transformers 5 writes: one `rope_parameters`, `dtype`. Both are read; what is written holds the keys of both.
"""

from typing import Any

from jaxfw.core.errors import InputError, unknown
from jaxfw.ops.rope import KINDS, Rope

# Attributes that change neither parameters nor results of a decoder here.
IRRELEVANT = frozenset(
    "_name_or_path architectures auto_map bos_token_id eos_token_id pad_token_id transformers_version "
    "transformers_js_config use_cache dtype torch_dtype pretraining_tp model_type unsloth_version unsloth_fixed "
    "return_dict output_hidden_states output_attentions id2label label2id problem_type task_specific_params "
    "chunk_size_feed_forward is_encoder_decoder use_bidirectional_attention max_window_layers "
    "_attn_implementation_autoset tokenizer_class".split()
)

# Attributes that do nothing at this value; at any other they would change results, and are refused.
NEUTRAL = {
    "attention_dropout": 0.0,
    "hidden_act": "silu",
    "add_cross_attention": False,
    "is_decoder": (False, True),
    "partial_rotary_factor": 1.0,
    "tie_encoder_decoder": False,
    "torchscript": False,
    "use_sliding_window": False,
    "use_qk_norm": False,
    "residual_multiplier": 1.0,
    "embedding_multiplier": 1.0,
    "logits_scaling": 1.0,
}

REMEDIES = {
    "quantization_config": "Load the unquantised checkpoint, or dequantise it once with the library that wrote it.",
    "sliding_window": "Families with sliding windows are not built yet.",
}

_ROPE_KEYS = {
    "factor": "factor",
    "original_max_position_embeddings": "original_positions",
    "low_freq_factor": "low_freq_factor",
    "high_freq_factor": "high_freq_factor",
    "attention_factor": "attention_factor",
    "beta_fast": "beta_fast",
    "beta_slow": "beta_slow",
    "mscale": "mscale",
    "mscale_all_dim": "mscale_all_dim",
    "truncate": "truncate",
}
_ROPE_READS = {
    "default": (),
    "linear": ("factor",),
    "dynamic": ("factor",),
    "llama3": ("factor", "original_max_position_embeddings", "low_freq_factor", "high_freq_factor"),
    "yarn": (
        "factor", "original_max_position_embeddings", "attention_factor", "beta_fast", "beta_slow", "mscale",
        "mscale_all_dim", "truncate",
    ),
}  # fmt: skip


def check_attributes(attributes: dict[str, Any], used: set[str]) -> None:
    """Raise one `InputError` that lists every attribute which is neither used nor known to change nothing."""
    refused = []
    for name, value in sorted(attributes.items()):
        if name in used or name in IRRELEVANT or value is None:
            continue
        if name in NEUTRAL:
            neutral = NEUTRAL[name] if isinstance(NEUTRAL[name], tuple) else (NEUTRAL[name],)
            if value in neutral:
                continue
            refused.append(f"{name}={value!r} (only {neutral[0]!r} is supported)")
        else:
            refused.append(f"{name}={value!r}" + (f" ({REMEDIES[name]})" if name in REMEDIES else ""))
    if refused:
        raise InputError(
            f"config.json has attributes that this family does not read: {'; '.join(refused)}. They may change what "
            "the model computes. If they do not, remove them from config.json."
        )


def required(attributes: dict[str, Any], name: str) -> Any:
    """The attribute's value, or an error that names it."""
    if attributes.get(name) is None:
        raise InputError(f"config.json lacks {name!r}, which has no safe default. Is the file complete?")
    return attributes[name]


def read_rope(attributes: dict[str, Any], positions: int) -> Rope:
    """The rotary embedding from either layout; `rope_parameters` (v5) wins where both are present."""
    scaling = dict(attributes.get("rope_parameters") or attributes.get("rope_scaling") or {})
    kind = scaling.pop("rope_type", None) or scaling.pop("type", None) or "default"
    scaling.pop("type", None)
    theta = scaling.pop("rope_theta", None) or attributes.get("rope_theta") or 10000.0
    if scaling.pop("partial_rotary_factor", None) not in (None, 1.0):
        raise InputError("config.json: rope_parameters.partial_rotary_factor must be 1.0 in this family.")
    if kind not in KINDS:
        raise unknown("config.json: rope_scaling.rope_type", kind, KINDS)
    reads = _ROPE_READS[kind]
    # `dynamic` stretches from max_position_embeddings; writers put the original length beside it all the same.
    scaling = {name: value for name, value in scaling.items() if value is not None}
    for name in sorted(set(scaling) - set(reads) - {"original_max_position_embeddings"}):
        raise unknown(f"config.json: rope_scaling of type {kind!r}: attribute", name, reads)
    fields = {_ROPE_KEYS[name]: scaling[name] for name in reads if name in scaling}
    if kind != "default" and "factor" not in fields:
        raise InputError(f"config.json: rope_scaling of type {kind!r} lacks 'factor'.")
    if kind == "dynamic":
        fields["original_positions"] = positions
    elif kind in ("yarn", "llama3"):
        fields.setdefault("original_positions", positions)
    for name in ("low_freq_factor", "high_freq_factor"):
        if kind == "llama3" and name not in fields:
            raise InputError(f"config.json: rope_scaling of type 'llama3' lacks {name!r}.")
    return Rope(theta=float(theta), kind=kind, **fields)


def write_rope(rope: Rope) -> dict[str, Any]:
    """The same in both layouts: `rope_theta` and `rope_scaling` (v4), `rope_parameters` (v5)."""
    scaling: dict[str, Any] = {"rope_type": rope.kind}
    for name in _ROPE_READS[rope.kind]:
        value = getattr(rope, _ROPE_KEYS[name])
        if value is not None:
            scaling[name] = value
    return {
        "rope_theta": rope.theta,
        "rope_scaling": None if rope.kind == "default" else scaling,
        "rope_parameters": {"rope_theta": rope.theta, **scaling},
    }
