"""Reading a published config.json strictly: every attribute is used, known to be irrelevant, or refused.

Two layouts are in use. v4, which most of the Hub holds: `rope_theta` and `rope_scaling` side by side, `torch_dtype`.
v5, which transformers 5 writes: one `rope_parameters`, `dtype`. Both are read; what is written holds the keys of both.
"""

from collections.abc import Mapping
from typing import Any, TypeVar

from jaxfw.core.errors import InputError, unknown
from jaxfw.ops.rope import KINDS, Rope

# Attributes that change neither parameters nor results of a decoder here.
IRRELEVANT = frozenset(
    "_name_or_path architectures auto_map bos_token_id eos_token_id pad_token_id transformers_version "
    "transformers_js_config use_cache dtype torch_dtype pretraining_tp model_type unsloth_version unsloth_fixed "
    "return_dict output_hidden_states output_attentions id2label label2id problem_type task_specific_params "
    "chunk_size_feed_forward is_encoder_decoder max_window_layers _attn_implementation_autoset tokenizer_class "
    "is_llama_config max_sequence_length transformers.js_config finetuning_task prefix sep_token_id use_bfloat16 "
    "decoder_start_token_id tf_legacy_loss "
    # How to decode, which older libraries wrote here and generation_config.json holds today.
    "max_length max_new_tokens min_length do_sample early_stopping num_beams num_beam_groups diversity_penalty "
    "temperature top_k top_p typical_p repetition_penalty length_penalty no_repeat_ngram_size "
    "encoder_no_repeat_ngram_size bad_words_ids num_return_sequences output_scores return_dict_in_generate "
    "forced_bos_token_id forced_eos_token_id remove_invalid_values exponential_decay_length_penalty suppress_tokens "
    "begin_suppress_tokens".split()
)

# Attributes that do nothing at this value; at any other they would change results, and are refused.
NEUTRAL = {
    "attention_dropout": 0.0,
    "hidden_act": "silu",
    "activation": "swiglu",
    "add_cross_attention": False,
    "is_decoder": (False, True),
    "partial_rotary_factor": 1.0,
    "pruned_heads": {},
    "rope_interleaved": False,
    "tie_encoder_decoder": False,
    "torchscript": False,
    "use_bidirectional_attention": False,
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

# Attribute of rope_scaling -> (field of `Rope`, its type).
_ROPE_KEYS = {
    "factor": ("factor", float),
    "original_max_position_embeddings": ("original_positions", int),
    "low_freq_factor": ("low_freq_factor", float),
    "high_freq_factor": ("high_freq_factor", float),
    "attention_factor": ("attention_factor", float),
    "beta_fast": ("beta_fast", float),
    "beta_slow": ("beta_slow", float),
    "mscale": ("mscale", float),
    "mscale_all_dim": ("mscale_all_dim", float),
    "truncate": ("truncate", bool),
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
# `dynamic` stretches from max_position_embeddings; writers put the original length beside it all the same. `finetuned`
# switched between two forms of a kind ("dynamic-yarn") that is not read here.
_ROPE_IRRELEVANT = frozenset(("original_max_position_embeddings", "finetuned"))

_WANTED = {int: "a whole number", float: "a number", bool: "true or false"}
Value = TypeVar("Value", int, float, bool)


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


def attribute(
    attributes: Mapping[str, Any],
    name: str,
    kind: type[Value],
    default: Value | None = None,
    *,
    where: str = "config.json",
) -> Value:
    """The attribute as an `int`, a `float` or a `bool`; absent or null, the default, or an error where there is none.

    >>> attribute({"hidden_size": 4096.0}, "hidden_size", int)
    4096
    """
    value = attributes.get(name)
    if value is None:
        if default is None:
            raise InputError(f"{where} lacks {name!r}, which has no safe default. Is the file complete?")
        return default
    if not _is_a(value, kind):
        remedy = "write it without quotes" if isinstance(value, str) else "correct it, or download the file again"
        raise InputError(f"{where}: {name}={value!r:.80} must be {_WANTED[kind]}: {remedy}.")
    return kind(value)


def _is_a(value: Any, kind: type) -> bool:
    if kind is bool or isinstance(value, bool):
        return kind is bool and isinstance(value, bool)
    # JSON as Python reads it may hold NaN, Infinity and integers beyond every float.
    return isinstance(value, int | float) and abs(value) < 1e300 and (kind is float or value == int(value))


def read_rope(attributes: dict[str, Any], positions: int) -> Rope:
    """The rotary embedding from either layout; `rope_parameters` (v5) wins where both are present."""
    scaling = _rope_scaling(attributes)
    theta = attribute(attributes, "rope_theta", float, 10000.0)
    theta = attribute(scaling, "rope_theta", float, theta, where="config.json: rope_parameters")
    kind = scaling.get("rope_type") or scaling.get("type") or "default"
    if scaling.get("partial_rotary_factor", 1.0) != 1.0:
        raise InputError("config.json: rope_parameters.partial_rotary_factor must be 1.0 in this family.")
    if kind not in KINDS:
        raise unknown("config.json: rope_scaling.rope_type", kind, KINDS)
    where, reads = f"config.json: rope_scaling of type {kind!r}", _ROPE_READS[kind]
    known = {*reads, *_ROPE_IRRELEVANT, "rope_theta", "rope_type", "type", "partial_rotary_factor"}
    for name in sorted(scaling.keys() - known):
        raise unknown(f"{where}: attribute", name, reads)
    needed = {"default": (), "llama3": ("factor", "low_freq_factor", "high_freq_factor")}.get(kind, ("factor",))
    for name in needed:
        if name not in scaling:
            raise InputError(f"{where} lacks {name!r}.")
    fields: dict[str, Any] = {}
    for name in reads:
        if name in scaling:
            field, type_ = _ROPE_KEYS[name]
            fields[field] = attribute(scaling, name, type_, where=where)
    if kind == "dynamic":
        fields["original_positions"] = positions
    elif kind in ("yarn", "llama3"):
        fields.setdefault("original_positions", positions)
    return Rope(theta=theta, kind=kind, **fields)


def _rope_scaling(attributes: Mapping[str, Any]) -> dict[str, Any]:
    """What is said of rotary embedding in one object, without its nulls."""
    for name in ("rope_parameters", "rope_scaling"):
        scaling = attributes.get(name)
        if scaling is not None and not isinstance(scaling, dict):
            raise InputError(
                f"config.json: {name}={scaling!r:.80} must be an object or null: "
                '{"rope_type": "linear", "factor": 2.0}, say.'
            )
        if scaling:
            return {name: value for name, value in scaling.items() if value is not None}
    return {}


def write_rope(rope: Rope) -> dict[str, Any]:
    """The same in both layouts: `rope_theta` and `rope_scaling` (v4), `rope_parameters` (v5)."""
    scaling: dict[str, Any] = {"rope_type": rope.kind}
    for name in _ROPE_READS[rope.kind]:
        value = getattr(rope, _ROPE_KEYS[name][0])
        if value is not None:
            scaling[name] = value
    return {
        "rope_theta": rope.theta,
        "rope_scaling": None if rope.kind == "default" else scaling,
        "rope_parameters": {"rope_theta": rope.theta, **scaling},
    }
