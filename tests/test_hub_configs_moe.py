"""config.json of published mixtures: both layouts load to the preset of that name, and nothing is read past."""

import dataclasses
import json

import pytest

from jaxfw.core.errors import InputError
from jaxfw.models import MoEConfig, deepseek, mixtral, olmoe, qwen2_moe, qwen3_moe
from jaxfw.models.hub_config import IRRELEVANT, NEUTRAL
from jaxfw.models.presets import preset
from jaxfw.weights import families
from tests.published_mixtures import PUBLISHED, in_version_5

FAMILIES = {family.MODEL_TYPE: family for family in (deepseek, mixtral, olmoe, qwen2_moe, qwen3_moe)}


def read(attributes):
    family = FAMILIES[attributes["model_type"]]
    return family.read_config(dict(attributes), param_dtype="bfloat16", dtype="bfloat16", softmax_dtype="float32")


@pytest.mark.parametrize("name", PUBLISHED)
def test_both_layouts_are_the_preset(name):
    newer = in_version_5(PUBLISHED[name])
    assert not {"rope_theta", "torch_dtype"} & newer.keys()
    assert read(PUBLISHED[name]) == read(newer) == preset(name)


@pytest.mark.parametrize("name", PUBLISHED)
def test_what_is_written_is_read_alike_in_each_layout(name):
    written = json.loads(json.dumps(FAMILIES[PUBLISHED[name]["model_type"]].write_config(preset(name))))
    older = {key: value for key, value in written.items() if key not in ("rope_parameters", "dtype")}
    newer = {key: value for key, value in written.items() if key not in ("rope_theta", "rope_scaling", "torch_dtype")}
    assert read(written) == read(older) == read(newer) == preset(name)


# Another value of each attribute: the model differs, or the value is refused.
OTHER = {
    "attention_bias": True, "attention_dropout": 0.1, "clip_qkv": 8.0, "decoder_sparse_step": 2,
    "first_k_dense_replace": 2, "head_dim": 32, "hidden_act": "gelu", "hidden_size": 1344, "initializer_range": 0.01,
    "intermediate_size": 512, "layer_types": ["sliding_attention"], "max_position_embeddings": 1024,
    "mlp_only_layers": [1], "moe_intermediate_size": 64, "moe_layer_freq": 2, "n_routed_experts": 32,
    "n_shared_experts": 1, "norm_topk_prob": "other", "num_attention_heads": 64, "num_experts": 16,
    "num_experts_per_tok": 3, "num_hidden_layers": 3, "num_key_value_heads": 1, "num_local_experts": 4,
    "qkv_bias": False, "rms_norm_eps": 1e-3, "rope_parameters": {"rope_type": "default", "rope_theta": 100.0},
    "rope_scaling": {"rope_type": "linear", "factor": 2.0}, "rope_theta": 100.0, "router_jitter_noise": 0.1,
    "scoring_func": "sigmoid", "shared_expert_intermediate_size": 64, "sliding_window": 512,
    "tie_word_embeddings": True, "use_sliding_window": True, "vocab_size": 100,
}  # fmt: skip
# The size and the layers of a window that is switched off.
IDLE = {model_type: {"sliding_window", "max_window_layers"} for model_type in ("qwen2_moe", "qwen3_moe")}


# Attributes of which only one value is read.
REFUSED = {"clip_qkv", "hidden_act", "layer_types", "router_jitter_noise", "scoring_func"}

# A second name of what the file says already; a window.
ALSO_REFUSED = {"qwen3_moe": {"num_local_experts"}, "qwen2_moe": {"use_sliding_window"}}


def refused(attributes):
    return REFUSED | ALSO_REFUSED.get(attributes["model_type"], set())


def flipped(attributes, key):
    if key == "norm_topk_prob":
        return attributes | {key: not attributes[key]}
    if key == "rope_parameters":  # the older layout beside it must say the same
        attributes = {name: value for name, value in attributes.items() if name not in ("rope_theta", "rope_scaling")}
    window = {"sliding_window": 512} if key == "use_sliding_window" else {}
    return attributes | {key: OTHER[key]} | window


@pytest.mark.parametrize("name", PUBLISHED)
def test_each_attribute_is_used_refused_or_known_to_be_irrelevant(name):
    attributes = PUBLISHED[name]
    idle = IDLE.get(attributes["model_type"], set())
    used = FAMILIES[attributes["model_type"]].USED
    for key in sorted((attributes.keys() | used) - IRRELEVANT - idle):
        if key in refused(attributes):
            with pytest.raises(InputError, match=key):
                read(flipped(attributes, key))
        else:
            assert read(flipped(attributes, key)) != preset(name), key
    for key in idle | (IRRELEVANT & attributes.keys() - {"model_type"}):
        assert read(attributes | {key: 7}) == preset(name), key


@pytest.mark.parametrize("model_type", FAMILIES)
def test_neutral_attributes_are_refused_at_other_values(model_type):
    attributes = next(value for value in PUBLISHED.values() if value["model_type"] == model_type)
    for name in NEUTRAL.keys() - FAMILIES[model_type].USED:
        with pytest.raises(InputError, match=f"{name}='other'"):
            read(attributes | {name: "other"})


@pytest.mark.parametrize("name, changes, fields", [
    ("qwen3-30b-a3b", {"decoder_sparse_step": 2}, {"first": 1, "every": 2}),
    ("qwen3-30b-a3b", {"decoder_sparse_step": 3, "mlp_only_layers": [5, 8]}, {"first": 2, "every": 3, "dense": (5, 8)}),
    ("qwen2-57b-a14b", {"mlp_only_layers": [0]}, {"dense": (0,)}),
    ("deepseek-moe-16b", {"first_k_dense_replace": 3, "moe_layer_freq": 2}, {"first": 4, "every": 2}),
    ("deepseek-moe-16b", {"first_k_dense_replace": 4, "moe_layer_freq": 2}, {"first": 4, "every": 2}),
    ("deepseek-moe-16b", {"n_shared_experts": None}, {"shared": 0}),
    ("deepseek-moe-16b", {"norm_topk_prob": True}, {"renormalize": True}),
    ("deepseek-moe-16b", {"norm_topk_prob": True, "num_experts_per_tok": 1}, {"renormalize": False, "per_token": 1}),
])  # fmt: skip
def test_which_layers_have_experts_and_which(name, changes, fields):
    config = read(PUBLISHED[name] | changes)
    assert isinstance(config.moe, MoEConfig)
    assert {field: getattr(config.moe, field) for field in fields} == fields
    written = json.loads(json.dumps(FAMILIES[PUBLISHED[name]["model_type"]].write_config(config)))
    assert read(written) == config


def test_windows():
    mixtral_config = read(PUBLISHED["mixtral-8x7b"] | {"sliding_window": 4096})
    assert mixtral_config.window == 4096 and read(mixtral.write_config(mixtral_config)) == mixtral_config
    windowed = PUBLISHED["qwen3-30b-a3b"] | {"use_sliding_window": True, "sliding_window": 512}
    assert read(windowed).window == 512 and read(qwen3_moe.write_config(read(windowed))) == read(windowed)


@pytest.mark.parametrize("name, changes, message", [
    ("olmoe-1b-7b", {"clip_qkv": 8.0}, "clip_qkv=8.0"),
    ("deepseek-moe-16b", {"scoring_func": "sigmoid"}, "scoring_func='sigmoid' .built is 'softmax'"),
    ("deepseek-moe-16b", {"moe_layer_freq": 0}, "moe_layer_freq=0 must be from 1 on"),
    ("deepseek-moe-16b", {"n_group": 8, "topk_method": "noaux_tc"}, "n_group=8; topk_method='noaux_tc'"),
    ("qwen3-30b-a3b", {"decoder_sparse_step": 0}, "decoder_sparse_step=0 must be from 1 on"),
    ("qwen3-30b-a3b", {"mlp_only_layers": "all"}, "mlp_only_layers='all' must be a list"),
    ("qwen3-30b-a3b", {"num_local_experts": 64}, "'num_experts': 128, 'num_local_experts': 64.* disagree"),
    ("qwen2-57b-a14b", {"use_sliding_window": True}, "use_sliding_window=True"),
    ("qwen2-57b-a14b", {"num_experts_per_tok": 65}, "per_token=65 exceeds"),
    ("mixtral-8x7b", {"router_jitter_noise": 0.1}, "router_jitter_noise=0.1"),
    ("mixtral-8x7b", {"shared_expert_intermediate_size": 64}, "shared_expert_intermediate_size=64"),
])  # fmt: skip
def test_what_cannot_be_read_is_refused(name, changes, message):
    with pytest.raises(InputError, match=message):
        read(PUBLISHED[name] | changes)


def without(name, **changes):
    config = preset(name)
    assert config.moe is not None
    return dataclasses.replace(config, moe=dataclasses.replace(config.moe, **changes))


@pytest.mark.parametrize("family, config, message", [
    (mixtral, preset("llama-2-7b"), r"model\.moe is None, but a config\.json .*'mixtral' describes experts"),
    (qwen3_moe, without("qwen3-30b-a3b", first=1), r"model\.moe\.first=1 with model\.moe\.every=1 cannot be written"),
    (qwen2_moe, preset("qwen3-30b-a3b"), r"model\.moe\.shared=0 cannot be written"),
    (deepseek, without("deepseek-moe-16b", shared=1000), r"shared=1000 must be a multiple of model\.moe\.ffn=1408"),
    (deepseek, without("deepseek-moe-16b", every=2), r"first=1 must be a multiple of model\.moe\.every=2"),
])  # fmt: skip
def test_what_a_family_cannot_say_is_not_written(family, config, message):
    with pytest.raises(InputError, match=message):
        family.write_config(config)


@pytest.mark.parametrize("model_type, config, message", [
    ("mixtral", preset("olmoe-1b-7b"), "renormalize=False"),
    ("mixtral", without("mixtral-8x7b", shared=64), "shared=64"),
    ("olmoe", preset("mixtral-8x7b"), "model.qk_norm=None would become 'projection'"),
    ("qwen2_moe", without("qwen1.5-moe-a2.7b", shared_gate=False), "shared_gate=False"),
    ("qwen3_moe", without("qwen3-30b-a3b", scores="sigmoid"), "scores='sigmoid'"),
    ("deepseek", without("deepseek-moe-16b", dense=(4,)), r"dense=\(4,\)"),
])  # fmt: skip
def test_what_would_be_lost_is_refused(model_type, config, message):
    with pytest.raises(InputError, match=message):
        families.choose(config, model_type)


def test_models_are_saved_under_their_own_family():
    for name, attributes in PUBLISHED.items():
        assert attributes["model_type"] == families.choose(preset(name)).MODEL_TYPE
