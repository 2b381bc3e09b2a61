"""config.json as published and as transformers 5 writes it load to the same model; nothing in it is ignored unseen."""

import copy
import json

import pytest

transformers = pytest.importorskip("transformers")
pytest.importorskip("torch")
pytestmark = pytest.mark.oracle

from experiments import parity  # noqa: E402
from jaxfw.core.errors import InputError  # noqa: E402
from jaxfw.models import DecoderConfig, Rope, llama  # noqa: E402
from jaxfw.models.hub_config import IRRELEVANT, NEUTRAL  # noqa: E402

LLAMA_2_7B = {
    "_name_or_path": "meta-llama/Llama-2-7b-hf", "architectures": ["LlamaForCausalLM"], "bos_token_id": 1,
    "eos_token_id": 2, "hidden_act": "silu", "hidden_size": 4096, "initializer_range": 0.02,
    "intermediate_size": 11008, "max_position_embeddings": 4096, "model_type": "llama",
    "num_attention_heads": 32, "num_hidden_layers": 32, "num_key_value_heads": 32, "pretraining_tp": 1,
    "rms_norm_eps": 1e-05, "rope_scaling": None, "tie_word_embeddings": False, "torch_dtype": "float16",
    "transformers_version": "4.31.0.dev0", "use_cache": True, "vocab_size": 32000,
}  # fmt: skip
LLAMA_3_8B = {
    "architectures": ["LlamaForCausalLM"], "attention_bias": False, "attention_dropout": 0.0,
    "bos_token_id": 128000, "eos_token_id": 128001, "hidden_act": "silu", "hidden_size": 4096,
    "initializer_range": 0.02, "intermediate_size": 14336, "max_position_embeddings": 8192,
    "model_type": "llama", "num_attention_heads": 32, "num_hidden_layers": 32, "num_key_value_heads": 8,
    "pretraining_tp": 1, "rms_norm_eps": 1e-05, "rope_scaling": None, "rope_theta": 500000.0,
    "tie_word_embeddings": False, "torch_dtype": "bfloat16", "transformers_version": "4.40.0.dev0",
    "use_cache": True, "vocab_size": 128256,
}  # fmt: skip
LLAMA_3_1_8B = LLAMA_3_8B | {
    "max_position_embeddings": 131072, "mlp_bias": False, "transformers_version": "4.43.0.dev0",
    "rope_scaling": {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                     "original_max_position_embeddings": 8192, "rope_type": "llama3"},
}  # fmt: skip
LLAMA_3_2_1B = LLAMA_3_1_8B | {
    "head_dim": 64, "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16,
    "rope_scaling": LLAMA_3_1_8B["rope_scaling"] | {"factor": 32.0}, "tie_word_embeddings": True,
    "transformers_version": "4.45.0.dev0",
}  # fmt: skip
PUBLISHED = {
    "Llama-2-7b": LLAMA_2_7B,
    "Llama-3-8B": LLAMA_3_8B,
    "Llama-3.1-8B": LLAMA_3_1_8B,
    "Llama-3.2-1B": LLAMA_3_2_1B,
}
_LLAMA3_ROPE = {"theta": 500000.0, "kind": "llama3", "original_positions": 8192}
_8B = {
    "vocab": 128256, "width": 4096, "ffn": 14336, "layers": 32, "heads": 32, "kv_heads": 8, "head_dim": 128,
    "norm_eps": 1e-5, "param_dtype": "bfloat16", "dtype": "bfloat16",
}  # fmt: skip
MEANT = {
    "Llama-2-7b": DecoderConfig(
        vocab=32000, width=4096, ffn=11008, layers=32, heads=32, kv_heads=32, head_dim=128, positions=4096,
        norm_eps=1e-5, param_dtype="bfloat16", dtype="bfloat16"),
    "Llama-3-8B": DecoderConfig(**_8B, positions=8192, rope=Rope(theta=500000.0)),
    "Llama-3.1-8B": DecoderConfig(**_8B, positions=131072, rope=Rope(**_LLAMA3_ROPE, factor=8.0)),
    "Llama-3.2-1B": DecoderConfig(
        **_8B | {"width": 2048, "ffn": 8192, "layers": 16, "head_dim": 64}, positions=131072,
        rope=Rope(**_LLAMA3_ROPE, factor=32.0), tie_embeddings=True),
}  # fmt: skip


def read(attributes):
    return llama.read_config(
        copy.deepcopy(attributes), param_dtype="bfloat16", dtype="bfloat16", softmax_dtype="float32"
    )


def as_version_5(attributes):
    """What transformers 5 writes for the same model."""
    return json.loads(transformers.LlamaConfig.from_dict(copy.deepcopy(attributes)).to_json_string(use_diff=False))


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_and_version_5_layouts_load_alike(name):
    newer = as_version_5(PUBLISHED[name])
    assert "rope_parameters" in newer and not {"rope_theta", "torch_dtype"} & newer.keys()
    assert read(PUBLISHED[name]) == read(newer) == MEANT[name]


@pytest.mark.parametrize("name", PUBLISHED)
def test_what_we_write_is_read_alike_everywhere(name):
    """By us, by transformers, and each layout alone (older libraries know only the first)."""
    written = json.loads(json.dumps(llama.write_config(MEANT[name])))
    assert read(written) == MEANT[name]
    older = {key: value for key, value in written.items() if key not in ("rope_parameters", "dtype")}
    newer = {key: value for key, value in written.items() if key not in ("rope_theta", "rope_scaling", "torch_dtype")}
    assert read(older) == read(newer) == MEANT[name]
    theirs = transformers.LlamaConfig.from_dict(copy.deepcopy(PUBLISHED[name])).to_dict()
    for layout in (written, older, newer):
        from_ours = transformers.LlamaConfig.from_dict(copy.deepcopy(layout)).to_dict()
        for key in llama._USED & theirs.keys():
            assert from_ours[key] == theirs[key], key


@pytest.mark.parametrize("name", parity.CASES)
def test_every_rope_survives_the_round_trip(name):
    case = parity.CASES[name]
    attributes = LLAMA_2_7B | {
        "max_position_embeddings": case.positions, "rope_parameters": dict(case.rope)
    }  # fmt: skip
    config = read(attributes)
    written = json.loads(json.dumps(llama.write_config(config)))
    assert read(written) == config
    for layout in (written, {k: v for k, v in written.items() if k != "rope_parameters"}):
        theirs = transformers.LlamaConfig.from_dict(copy.deepcopy(layout)).rope_parameters
        assert case.rope.items() <= theirs.items()


# Another value for each attribute that is used: the model must change, or the value be refused.
OTHER = {
    "attention_bias": True, "head_dim": 32, "hidden_size": 2048, "initializer_range": 0.01,
    "intermediate_size": 512, "max_position_embeddings": 1024, "mlp_bias": True, "num_attention_heads": 64,
    "num_hidden_layers": 3, "num_key_value_heads": 16, "rms_norm_eps": 1e-6, "rope_theta": 10000.0,
    "rope_scaling": {"rope_type": "linear", "factor": 2.0}, "tie_word_embeddings": True, "vocab_size": 100,
    "rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 100.0},
}  # fmt: skip


def test_every_used_attribute_is_used():
    assert OTHER.keys() == llama._USED
    for name, value in OTHER.items():
        assert read(LLAMA_3_1_8B | {name: value}) != MEANT["Llama-3.1-8B"], name


@pytest.mark.parametrize("name", ["factor", "low_freq_factor", "high_freq_factor",
                                  "original_max_position_embeddings"])  # fmt: skip
def test_every_attribute_of_llama3_rope_is_used(name):
    scaling = LLAMA_3_1_8B["rope_scaling"]
    changed = read(LLAMA_3_1_8B | {"rope_scaling": scaling | {name: scaling[name] * 2 + 1}})
    assert changed.rope != MEANT["Llama-3.1-8B"].rope


def test_irrelevant_attributes_change_nothing():
    assert IRRELEVANT.isdisjoint(llama._USED) and IRRELEVANT.isdisjoint(NEUTRAL)
    for name in IRRELEVANT:
        assert read(LLAMA_3_1_8B | {name: "something"}) == MEANT["Llama-3.1-8B"]
    assert read(LLAMA_3_1_8B | {"pretraining_tp": 4}) == MEANT["Llama-3.1-8B"]


def test_unknown_attributes_are_refused_all_at_once():
    with pytest.raises(InputError, match=r"foo_scale=3;.*new_norm='yes'.*remove them from config\.json"):
        read(LLAMA_3_1_8B | {"foo_scale": 3, "new_norm": "yes"})
    assert read(LLAMA_3_1_8B | {"foo_scale": None}) == MEANT["Llama-3.1-8B"]


@pytest.mark.parametrize("name", NEUTRAL)
def test_neutral_attributes_are_refused_at_other_values(name):
    neutral = NEUTRAL[name]
    for value in neutral if isinstance(neutral, tuple) else (neutral,):
        assert read(LLAMA_3_1_8B | {name: value}) == MEANT["Llama-3.1-8B"]
    with pytest.raises(InputError, match=f"{name}='other'"):
        read(LLAMA_3_1_8B | {name: "other"})


def test_quantised_checkpoints_are_refused_with_a_remedy():
    with pytest.raises(InputError, match=r"quantization_config=.*dequantise it once"):
        read(LLAMA_3_1_8B | {"quantization_config": {"bits": 4}})


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


@pytest.mark.parametrize("name", ["num_attention_heads", "hidden_size", "intermediate_size", "num_hidden_layers",
                                  "vocab_size"])  # fmt: skip
def test_missing_attributes_are_named(name):
    with pytest.raises(InputError, match=f"lacks '{name}'"):
        read({key: value for key, value in LLAMA_3_1_8B.items() if key != name})


def test_attributes_that_may_be_absent_have_transformers_defaults():
    absent = {
        "num_key_value_heads", "max_position_embeddings", "rms_norm_eps", "rope_scaling", "initializer_range",
        "tie_word_embeddings", "torch_dtype", "pretraining_tp",
    }  # fmt: skip
    attributes = {key: value for key, value in LLAMA_2_7B.items() if key not in absent}
    assert read(attributes) == read(as_version_5(attributes))
