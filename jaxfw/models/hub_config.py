"""Reading a published config.json strictly: every attribute is used, known to be irrelevant, or refused.

Two layouts are in use. v4, which most of the Hub holds: `rope_theta` and `rope_scaling` side by side, `torch_dtype`.
v5, which transformers 5 writes: one `rope_parameters`, `dtype`. Both are read; what is written holds the keys of both.

`read_decoder` and `write_decoder` are what LLaMA and the families after it have alike; a family adds what differs.
"""

from collections.abc import Collection, Mapping
from typing import Any, TypeVar

from jaxfw.core.errors import InputError, unknown
from jaxfw.nn.config import DecoderConfig
from jaxfw.ops.rope import KINDS, Rope

# Attributes that change neither parameters nor results of a decoder here.
IRRELEVANT = frozenset(
    "_name_or_path architectures auto_map bos_token_id eos_token_id pad_token_id transformers_version "
    "transformers_js_config use_cache dtype torch_dtype pretraining_tp model_type unsloth_version unsloth_fixed "
    "return_dict output_hidden_states output_attentions id2label label2id problem_type task_specific_params "
    "chunk_size_feed_forward max_window_layers _attn_implementation_autoset tokenizer_class "
    "is_llama_config max_sequence_length transformers.js_config finetuning_task prefix sep_token_id use_bfloat16 "
    "decoder_start_token_id tf_legacy_loss "
    # How to decode, which older libraries wrote here and generation_config.json holds today.
    "max_length max_new_tokens min_length do_sample early_stopping num_beams num_beam_groups diversity_penalty "
    "temperature top_k top_p typical_p repetition_penalty length_penalty no_repeat_ngram_size "
    "encoder_no_repeat_ngram_size bad_words_ids num_return_sequences output_scores return_dict_in_generate "
    "forced_bos_token_id forced_eos_token_id remove_invalid_values exponential_decay_length_penalty suppress_tokens "
    "begin_suppress_tokens "
    # Of training.
    "attention_dropout "
    # How the losses of routers enter a training loss, which `NextTokenLoss.router_losses` says here.
    "router_aux_loss_coef aux_loss_alpha seq_aux output_router_logits".split()
)

# Attributes that do nothing at this value; at any other they would change results, and are refused.
NEUTRAL = {
    "hidden_act": "silu",
    "activation": "swiglu",
    "add_cross_attention": False,
    "is_encoder_decoder": False,
    "is_decoder": (False, True),
    "partial_rotary_factor": 1.0,
    "pruned_heads": {},
    "rope_interleaved": False,
    "router_jitter_noise": 0.0,
    "tie_encoder_decoder": False,
    "torchscript": False,
    "use_mrope": False,
    "use_bidirectional_attention": False,
    "use_sliding_window": False,
    "use_qk_norm": False,
    "residual_multiplier": 1.0,
    "embedding_multiplier": 1.0,
    "logits_scaling": 1.0,
}

REMEDIES = {
    "quantization_config": "Load the unquantised checkpoint, or dequantise it once with the library that wrote it.",
    "sliding_window": "A LLaMA with sliding windows has model_type 'mistral'.",
}

# Buffers that old checkpoints hold beside the parameters; they are computed from config.json here.
ROTARY_BUFFERS = r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq"

# What `read_decoder` reads.
DECODER_ATTRIBUTES = frozenset(
    "head_dim hidden_size initializer_range intermediate_size max_position_embeddings num_attention_heads "
    "num_hidden_layers num_key_value_heads rms_norm_eps rope_parameters rope_scaling rope_theta tie_word_embeddings "
    "vocab_size".split()
)
# What `read_windows` reads.
WINDOWS = frozenset("layer_types max_window_layers sliding_window use_sliding_window".split())
LAYER_TYPES = ("full_attention", "sliding_attention")

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


def check_attributes(
    attributes: Mapping[str, Any],
    used: Collection[str],
    *,
    irrelevant: Collection[str] = (),
    neutral: Mapping[str, Any] | None = None,
) -> None:
    """Raise one `InputError` that lists every attribute which is neither used nor known to change nothing.

    `irrelevant` and `neutral` are the family's own additions to `IRRELEVANT` and `NEUTRAL`.
    """
    unread, refused, known = [], [], NEUTRAL | dict(neutral or {})
    for name, value in sorted(attributes.items()):
        if name in used or name in IRRELEVANT or name in irrelevant or value is None:
            continue
        if name in known:
            values = known[name] if isinstance(known[name], tuple) else (known[name],)
            if value in values:
                continue
            refused.append(f"{name}={value!r} (built is {values[0]!r})")
        elif name in REMEDIES:
            refused.append(f"{name}={value!r} ({REMEDIES[name]})")
        else:
            unread.append(f"{name}={value!r}")
    said = []
    if refused:
        said.append(
            f"config.json asks for what this family does not do: {'; '.join(refused)}. Without it the model would "
            "compute something else, so leave it there, and take a checkpoint or a family that has what is built."
        )
    if unread:
        said.append(
            f"config.json has attributes that this family does not read: {'; '.join(unread)}. They may change what the "
            "model computes. If they do not, remove them from config.json."
        )
    if said:
        raise InputError(" ".join(said))


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


def read_decoder(attributes: Mapping[str, Any], **fields: Any) -> DecoderConfig:
    """The configuration that `DECODER_ATTRIBUTES` describe; `fields` are the family's own, and its dtypes.

    What may be absent has LLaMA's default; a family with others gives `DEFAULTS | attributes`.
    """
    width, heads = attribute(attributes, "hidden_size", int), attribute(attributes, "num_attention_heads", int)
    positions = attribute(attributes, "max_position_embeddings", int, 2048)
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
        init_std=attribute(attributes, "initializer_range", float, 0.02),
        **fields,
    )


def write_decoder(config: DecoderConfig) -> dict[str, Any]:
    """`DECODER_ATTRIBUTES` and those that go without saying, in the v4 and the v5 layout at once."""
    if config.rope is None:
        raise InputError("model.rope=None cannot be written: this family rotates. Give a Rope.")
    return {
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
        "attention_dropout": 0.0,
        **write_rope(config.rope),
        "torch_dtype": config.param_dtype,
        "dtype": config.param_dtype,
    }


def read_windows(attributes: Mapping[str, Any]) -> dict[str, Any]:
    """Qwen's sliding windows, the fields `window` and `full_attention`, from the attributes `WINDOWS`.

    The layers from `max_window_layers` on have a window, unless `layer_types` (v5) says which.
    """
    layers = attribute(attributes, "num_hidden_layers", int)
    window = None
    if attribute(attributes, "use_sliding_window", bool, False) and attributes.get("sliding_window", 0) is not None:
        window = attribute(attributes, "sliding_window", int, 4096)
    first = attribute(attributes, "max_window_layers", int, 28)
    kinds = attributes.get("layer_types")
    if kinds is None:
        kinds = [LAYER_TYPES[window is not None and i >= first] for i in range(layers)]
    _check_layer_types(kinds, layers)
    full = tuple(i for i, kind in enumerate(kinds) if kind == LAYER_TYPES[0])
    if window is None and len(full) < layers:
        raise InputError(
            "config.json: layer_types has sliding_attention, but there is no window: set use_sliding_window to true "
            "and sliding_window to a number of positions."
        )
    return {"window": None, "full_attention": ()} if len(full) == layers else {"window": window, "full_attention": full}


def _check_layer_types(kinds: Any, layers: int) -> None:
    if not isinstance(kinds, list) or len(kinds) != layers or not all(kind in LAYER_TYPES for kind in kinds):
        raise InputError(
            f"config.json: layer_types={kinds!r:.80} must name one of {', '.join(LAYER_TYPES)} for each of the "
            f"num_hidden_layers={layers} layers."
        )


def write_windows(config: DecoderConfig) -> dict[str, Any]:
    """The attributes `WINDOWS`. Libraries that know no `layer_types` read the same if full layers come first."""
    is_full = [config.at(i).window is None for i in range(config.layers)]
    return {
        "use_sliding_window": config.window is not None,
        "sliding_window": config.window,
        "max_window_layers": is_full.index(False) if False in is_full else config.layers,
        "layer_types": [LAYER_TYPES[not full] for full in is_full],
    }


def read_attention_bias(attributes: Mapping[str, Any]) -> dict[str, bool]:
    """The fields `qkv_bias` and `out_bias` from `attention_bias`, which says both."""
    has_bias = attribute(attributes, "attention_bias", bool, False)
    return {"qkv_bias": has_bias, "out_bias": has_bias}


def write_attention_bias(config: DecoderConfig) -> dict[str, bool]:
    """`attention_bias`; `InputError` where queries, keys and values have biases and the output has none, or so."""
    if config.qkv_bias != config.out_bias:
        raise InputError(
            f"model.qkv_bias={config.qkv_bias} and model.out_bias={config.out_bias} differ, but config.json has one "
            "attention_bias for all four projections: set both alike."
        )
    return {"attention_bias": config.qkv_bias}


def read_rope(attributes: Mapping[str, Any], positions: int) -> Rope:
    """The rotary embedding from either layout; where both are present, they must say the same."""
    older, newer = (_rope_object(attributes, name) for name in ("rope_scaling", "rope_parameters"))
    theta = attribute(attributes, "rope_theta", float, 10000.0)
    if not newer:
        return _rope(older, theta, positions)
    rope = _rope(newer, attribute(newer, "rope_theta", float, theta, where="config.json: rope_parameters"), positions)
    if older and _rope(older, theta if "rope_theta" in attributes else rope.theta, positions) != rope:
        raise InputError(
            f"config.json: rope_scaling={older} and rope_parameters={newer} disagree, and libraries differ in which "
            "they read: write the same into both, or remove one."
        )
    if attributes.get("rope_theta") is not None and theta != rope.theta:
        raise InputError(
            f"config.json: rope_theta={theta:g} and rope_parameters.rope_theta={rope.theta:g} disagree, and libraries "
            "differ in which they read: write the same into both, or remove one."
        )
    return rope


def _rope(scaling: Mapping[str, Any], theta: float, positions: int) -> Rope:
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


def _rope_object(attributes: Mapping[str, Any], name: str) -> dict[str, Any]:
    """What one attribute says of rotary embedding, without its nulls."""
    scaling = attributes.get(name)
    if scaling is not None and not isinstance(scaling, dict):
        raise InputError(
            f"config.json: {name}={scaling!r:.80} must be an object or null: "
            '{"rope_type": "linear", "factor": 2.0}, say.'
        )
    return {name: value for name, value in (scaling or {}).items() if value is not None}


def write_rope(rope: Rope | None) -> dict[str, Any]:
    """The same in both layouts: `rope_theta` and `rope_scaling` (v4), `rope_parameters` (v5); nothing for None."""
    if rope is None:
        return {}
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
