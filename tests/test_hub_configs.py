"""config.json of published dense models: both layouts mean the same, and nothing is passed over unseen."""

import copy
import dataclasses
import json
from importlib import import_module

import pytest

from jaxfw.core.errors import InputError
from jaxfw.models import Rope, gpt2
from jaxfw.models.hub_config import IRRELEVANT, NEUTRAL
from jaxfw.models.presets import preset
from tests.published_dense import (
    GPT_2,
    LLAMA_2_7B,
    LLAMA_3_1_8B,
    MEANT,
    MISTRAL_7B_V01,
    PUBLISHED,
    QWEN_2_5_7B,
    QWEN_3_06B,
    in_version_5,
)

FAMILIES = {name: import_module(f"jaxfw.models.{name}") for name in ("llama", "mistral", "qwen2", "qwen3", "gpt2")}
WINDOWED = QWEN_2_5_7B | {"use_sliding_window": True, "sliding_window": 4096, "max_window_layers": 21}


def read(attributes):
    attributes = copy.deepcopy(attributes)
    family = FAMILIES[attributes["model_type"]]
    return family.read_config(attributes, param_dtype="bfloat16", dtype="bfloat16", softmax_dtype="float32")


def write(model_type, config):
    return json.loads(json.dumps(FAMILIES[model_type].write_config(config)))


@pytest.mark.parametrize("name", PUBLISHED)
def test_both_layouts_mean_one_configuration(name):
    newer = in_version_5(PUBLISHED[name])
    assert not {"rope_theta", "rope_scaling", "torch_dtype"} & newer.keys()
    assert read(PUBLISHED[name]) == read(newer) == MEANT[name]


@pytest.mark.parametrize("name", PUBLISHED)
def test_what_is_written_is_read_alike_in_each_layout(name):
    written = write(PUBLISHED[name]["model_type"], MEANT[name])
    older = {key: value for key, value in written.items() if key not in ("rope_parameters", "dtype", "layer_types")}
    newer = {key: value for key, value in written.items() if key not in ("rope_theta", "rope_scaling", "torch_dtype")}
    assert read(written) == read(older) == read(newer) == MEANT[name]


# Another value where a file has none, or where twice its number would not do.
OTHER = {
    "activation_function": "gelu", "attention_bias": True, "head_dim": 32, "mlp_bias": True, "n_inner": 512,
    "num_key_value_heads": 1, "rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 100.0},
    "rope_scaling": {"rope_type": "linear", "factor": 2.0}, "rope_theta": 100.0, "sliding_window": 512,
    "use_sliding_window": True,
}  # fmt: skip
# Of a window that is switched off, its size and its layers say nothing.
IDLE = {"sliding_window", "max_window_layers"}
# Values of NEUTRAL attributes that published files hold, and another one.
REFUSED = {"hidden_act": "gelu", "rope_interleaved": True, "use_mrope": True}


def flipped(attributes, key):
    """The file with another value of `key`, and what that needs to count."""
    if key == "tie_word_embeddings":
        return attributes | {key: not attributes.get(key, attributes["model_type"] == "gpt2")}
    if key == "layer_types":
        kinds = ["sliding_attention", "full_attention"] * (attributes["num_hidden_layers"] // 2)
        return attributes | {key: kinds, "use_sliding_window": True, "sliding_window": 512}
    needed = {"use_sliding_window": {"sliding_window": 512, "max_window_layers": 1}}.get(key, {})
    if key == "rope_parameters":  # the older layout beside it must say the same
        attributes = {name: value for name, value in attributes.items() if name not in ("rope_theta", "rope_scaling")}
    value = attributes.get(key)
    is_number = type(value) in (int, float) and key != "num_key_value_heads"
    return attributes | {key: 2 * value if is_number else OTHER[key]} | needed


@pytest.mark.parametrize("name", PUBLISHED)
def test_each_attribute_is_used_refused_or_known_to_be_irrelevant(name):
    attributes = PUBLISHED[name]
    family = FAMILIES[attributes["model_type"]]
    irrelevant = (IRRELEVANT | getattr(family, "IRRELEVANT", frozenset())) - family.USED
    idle = IDLE & family.USED if "use_sliding_window" in family.USED else set()
    assert attributes.keys() <= family.USED | irrelevant | REFUSED.keys()
    for key in sorted(family.USED - idle):
        assert read(flipped(attributes, key)) != MEANT[name], key
    for key in sorted(attributes.keys() & REFUSED.keys()):
        with pytest.raises(InputError, match=f"{key}={REFUSED[key]!r}"):
            read(attributes | {key: REFUSED[key]})
    for key in sorted(idle | (irrelevant & attributes.keys() - {"model_type"})):
        assert read(attributes | {key: 7}) == MEANT[name], key


@pytest.mark.parametrize("model_type", FAMILIES)
def test_neutral_attributes_are_refused_at_other_values(model_type):
    name, attributes = next(item for item in PUBLISHED.items() if item[1]["model_type"] == model_type)
    family = FAMILIES[model_type]
    for key, neutral in (NEUTRAL | getattr(family, "NEUTRAL", {})).items():
        if key in family.USED:
            continue
        for value in neutral if isinstance(neutral, tuple) else (neutral,):
            assert read(attributes | {key: value}) == MEANT[name]
        with pytest.raises(InputError, match=f"{key}='other'"):
            read(attributes | {key: "other"})


@pytest.mark.parametrize("changes, window, full", [
    ({}, 4096, tuple(range(21))),
    ({"max_window_layers": 0}, 4096, ()),
    ({"max_window_layers": 28}, None, ()),
    ({"sliding_window": None}, None, ()),
    ({"layer_types": ["full_attention", "sliding_attention"] * 14}, 4096, tuple(range(0, 28, 2))),
    ({"layer_types": ["full_attention"] * 28}, None, ()),
    ({"layer_types": ["sliding_attention"] * 28}, 4096, ()),
])  # fmt: skip
@pytest.mark.parametrize("published", [WINDOWED, WINDOWED | {"model_type": "qwen3"}], ids=["qwen2", "qwen3"])
def test_which_layers_of_qwen_have_windows(published, changes, window, full):
    config = read(published | changes)
    assert (config.window, config.full_attention) == (window, full)
    written = write(published["model_type"], config)
    assert read(written) == config
    if full == tuple(range(len(full))):  # older libraries know only where windows begin
        assert read({key: value for key, value in written.items() if key != "layer_types"}) == config


@pytest.mark.parametrize("changes, message", [
    ({"rope_scaling": {"rope_type": "linear", "factor": 2.0}}, "rope_scaling=.*and rope_parameters=.*disagree"),
    ({"rope_scaling": {"rope_type": "yarnn", "factor": 2.0}}, "rope_type='yarnn' is unknown"),
    ({"rope_theta": 500.0}, "rope_theta=500 and rope_parameters.rope_theta=10000 disagree"),
])  # fmt: skip
def test_the_two_layouts_of_rope_must_not_disagree(changes, message):
    """What somebody edits in the file that `save` wrote, which holds both."""
    written = write("llama", read(next(iter(PUBLISHED.values())) | {"rope_theta": 10000.0, "rope_scaling": None}))
    read(written)
    with pytest.raises(InputError, match=message):
        read(written | changes)


def test_irrelevant_attributes_change_nothing():
    assert IRRELEVANT.isdisjoint(NEUTRAL) and IRRELEVANT.isdisjoint(FAMILIES["llama"].USED)
    for name in IRRELEVANT - {"model_type"}:
        assert read(LLAMA_3_1_8B | {name: "something"}) == MEANT["Llama-3.1-8B"]


def test_unknown_attributes_are_refused_all_at_once():
    with pytest.raises(InputError, match=r"foo_scale=3;.*new_norm='yes'.*remove them from config\.json"):
        read(LLAMA_3_1_8B | {"foo_scale": 3, "new_norm": "yes"})
    assert read(LLAMA_3_1_8B | {"foo_scale": None}) == MEANT["Llama-3.1-8B"]


@pytest.mark.parametrize("name", ["factor", "low_freq_factor", "high_freq_factor",
                                  "original_max_position_embeddings"])  # fmt: skip
def test_every_attribute_of_llama3_rope_is_used(name):
    scaling = LLAMA_3_1_8B["rope_scaling"]
    changed = read(LLAMA_3_1_8B | {"rope_scaling": scaling | {name: scaling[name] * 2 + 1}})
    assert changed.rope != MEANT["Llama-3.1-8B"].rope


@pytest.mark.parametrize("scaling, message", [
    ({"rope_type": "longrope", "factor": 2.0}, "rope_type='longrope' is unknown.*llama3"),
    ({"type": "linear"}, "'linear' lacks 'factor'"),
    ({"rope_type": "linear", "factor": 2.0, "beta_fast": 3}, "'linear'.*'beta_fast'"),
    ({"rope_type": "llama3", "factor": 8.0, "original_max_position_embeddings": 8192,
      "high_freq_factor": 4.0}, "lacks 'low_freq_factor'"),
    ({"rope_type": "default", "partial_rotary_factor": 0.5}, "partial_rotary_factor"),
])  # fmt: skip
def test_rope_that_cannot_be_read_is_refused(scaling, message):
    with pytest.raises(InputError, match=message):
        read(LLAMA_3_1_8B | {"rope_scaling": scaling})


def test_the_oldest_spelling_of_rope_scaling():
    config = read(LLAMA_2_7B | {"rope_scaling": {"type": "dynamic", "factor": 2.0}})
    assert config.rope == Rope(kind="dynamic", factor=2.0, original_positions=4096)


@pytest.mark.parametrize("published", [LLAMA_3_1_8B, MISTRAL_7B_V01, QWEN_2_5_7B, QWEN_3_06B])
def test_missing_attributes_are_named(published):
    for name in ("num_attention_heads", "hidden_size", "intermediate_size", "num_hidden_layers", "vocab_size"):
        with pytest.raises(InputError, match=f"lacks '{name}'"):
            read({key: value for key, value in published.items() if key != name})


def test_a_window_of_mistral_is_transformers_default_where_none_is_given():
    absent = {key: value for key, value in MISTRAL_7B_V01.items() if key != "sliding_window"}
    assert read(absent).window == 4096
    assert read(MISTRAL_7B_V01 | {"sliding_window": None}).window is None


def test_what_may_be_absent_has_the_defaults_of_the_family():
    few = {
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_attention_heads": 4,
        "num_hidden_layers": 1,
        "vocab_size": 9,
    }
    mistral, qwen3 = (few | {"model_type": name, "num_attention_heads": 32} for name in ("mistral", "qwen3"))
    assert (read(mistral).kv_heads, read(mistral).positions, read(mistral).head_dim) == (8, 131072, 2)
    assert (read(qwen3).kv_heads, read(qwen3).positions, read(qwen3).head_dim) == (32, 32768, 128)
    assert read(mistral | {"num_key_value_heads": None}).kv_heads == 32
    assert read({"model_type": "gpt2"}) == preset("gpt2")


@pytest.mark.parametrize("attributes, changes, message", [
    (WINDOWED, {"layer_types": ["full_attention"] * 27}, "layer_types=.* for each of the num_hidden_layers=28 layers"),
    (WINDOWED, {"layer_types": ["chunked_attention"] * 28}, "one of full_attention, sliding_attention"),
    (WINDOWED, {"layer_types": "sliding_attention"}, "layer_types='sliding_attention' must name"),
    (QWEN_3_06B, {"layer_types": ["sliding_attention"] * 28}, "there is no window: set use_sliding_window to true"),
    (QWEN_3_06B, {"use_sliding_window": 1}, "use_sliding_window=1 must be true or false"),
    (WINDOWED, {"sliding_window": "long"}, "sliding_window='long' must be a whole number"),
    (QWEN_2_5_7B, {"dual_chunk_attention_config": {"chunk_size": 1}}, "dual_chunk_attention_config="),
    (MISTRAL_7B_V01, {"sliding_window": 0}, r"model\.window=0 must be a whole number from 1 on"),
    (MISTRAL_7B_V01, {"attention_bias": True}, "attention_bias=True"),
    (LLAMA_2_7B, {"sliding_window": 4096}, "sliding_window=4096 .*model_type 'mistral'"),
    (GPT_2, {"activation_function": "relu"}, "activation_function='relu' is unknown.*gelu_new"),
    (GPT_2, {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx=True .built is False"),
    (GPT_2, {"reorder_and_upcast_attn": True}, "reorder_and_upcast_attn=True"),
    (GPT_2, {"n_embd": "768"}, "n_embd='768' must be a whole number: write it without quotes"),
    (GPT_2, {"rope_theta": 10000.0}, "rope_theta=10000.0"),
])  # fmt: skip
def test_what_cannot_be_read_is_refused(attributes, changes, message):
    with pytest.raises(InputError, match=message):
        read(attributes | changes)


@pytest.mark.parametrize("model_type, changes, message", [
    ("llama", {"rope": None}, r"model\.rope=None cannot be written"),
    ("llama", {"qkv_bias": True}, r"qkv_bias=True and model\.out_bias=False differ"),
    ("qwen3", {"out_bias": True}, r"qkv_bias=False and model\.out_bias=True differ"),
    ("gpt2", {"activation": "relu"}, "activation.*gelu_tanh"),
])  # fmt: skip
def test_what_cannot_be_written_is_refused(model_type, changes, message):
    names = {"llama": "llama-2-7b", "qwen3": "qwen3-8b", "gpt2": "gpt2"}
    config = dataclasses.replace(preset(names[model_type]), **{k: v for k, v in changes.items() if k != "activation"})
    if "activation" in changes:  # one that configurations take and GPT-2 has no name for
        object.__setattr__(config, "activation", changes["activation"])
    with pytest.raises(InputError, match=message):
        FAMILIES[model_type].write_config(config)


def test_every_parameter_of_gpt2_has_its_columns_of_the_fused_tensor():
    config = dataclasses.replace(preset("gpt2"), layers=1, width=8, heads=2, kv_heads=2, head_dim=4, ffn=32)
    tensors = gpt2.tensors(config)
    fused = {path: entry.part for path, entry in tensors.items() if "c_attn.weight" in entry.names[0]}
    assert fused == {f"layers_0/attn/{x}/kernel": (8 * i, 8) for i, x in enumerate("qkv")}
    assert not any(entry.transposed for entry in tensors.values())
    assert "head/lm_head" not in tensors
    assert "head/lm_head" in gpt2.tensors(dataclasses.replace(config, tie_embeddings=False))
