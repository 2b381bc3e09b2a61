"""config.json as published and as transformers 5 writes it load to the same model; nothing in it is ignored unseen."""

import copy
import json

import numpy as np
import pytest

transformers = pytest.importorskip("transformers")
pytest.importorskip("torch")
pytestmark = pytest.mark.oracle

from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding  # noqa: E402

from experiments import parity  # noqa: E402
from jaxfw.core.errors import InputError  # noqa: E402
from jaxfw.models import DecoderConfig, Rope, llama  # noqa: E402
from jaxfw.models.hub_config import IRRELEVANT, NEUTRAL  # noqa: E402
from jaxfw.ops.rope import attention_factor, inverse_frequencies  # noqa: E402

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
SMOLLM2_135M = {
    "architectures": ["LlamaForCausalLM"], "attention_bias": False, "attention_dropout": 0.0, "bos_token_id": 0,
    "eos_token_id": 0, "hidden_act": "silu", "hidden_size": 576, "initializer_range": 0.041666666666666664,
    "intermediate_size": 1536, "is_llama_config": True, "max_position_embeddings": 8192, "model_type": "llama",
    "num_attention_heads": 9, "num_hidden_layers": 30, "num_key_value_heads": 3, "pretraining_tp": 1,
    "rms_norm_eps": 1e-05, "rope_interleaved": False, "rope_scaling": None, "rope_theta": 100000,
    "tie_word_embeddings": True, "torch_dtype": "bfloat16", "transformers_version": "4.40.1", "use_cache": True,
    "transformers.js_config": {"kv_cache_dtype": {"q4f16": "float16", "fp16": "float16"}}, "vocab_size": 49152,
}  # fmt: skip
TINYLLAMA = LLAMA_2_7B | {
    "attention_bias": False, "hidden_size": 2048, "intermediate_size": 5632, "max_position_embeddings": 2048,
    "num_hidden_layers": 22, "num_key_value_heads": 4, "rope_theta": 10000.0, "torch_dtype": "bfloat16",
}  # fmt: skip
VICUNA_16K = LLAMA_2_7B | {
    "_name_or_path": "vicuna-7b-v1.5-16k", "do_sample": True, "max_length": 4096, "max_sequence_length": 16384,
    "pad_token_id": 0, "rope_scaling": {"factor": 4.0, "type": "linear"}, "temperature": 0.9, "top_p": 0.6,
}  # fmt: skip
CODE_LLAMA_7B = LLAMA_2_7B | {"max_position_embeddings": 16384, "rope_theta": 1000000, "vocab_size": 32016}
DEEPSEEK_CODER = LLAMA_2_7B | {
    "bos_token_id": 32013, "eos_token_id": 32021, "max_position_embeddings": 16384, "rms_norm_eps": 1e-06,
    "rope_scaling": {"factor": 4.0, "type": "linear"}, "rope_theta": 100000, "vocab_size": 32256,
}  # fmt: skip
YARN_LLAMA_128K = LLAMA_2_7B | {
    "auto_map": {"AutoModelForCausalLM": "modeling_llama_together_yarn.LlamaForCausalLM"},
    "max_position_embeddings": 131072, "pad_token_id": 0,
    "rope_scaling": {"factor": 32.0, "finetuned": True, "original_max_position_embeddings": 4096, "type": "yarn"},
}  # fmt: skip
PUBLISHED = {
    "Llama-2-7b": LLAMA_2_7B,
    "Llama-3-8B": LLAMA_3_8B,
    "Llama-3.1-8B": LLAMA_3_1_8B,
    "Llama-3.2-1B": LLAMA_3_2_1B,
    "SmolLM2-135M": SMOLLM2_135M,
    "TinyLlama-1.1B": TINYLLAMA,
    "vicuna-7b-v1.5-16k": VICUNA_16K,
    "CodeLlama-7b": CODE_LLAMA_7B,
    "deepseek-coder-6.7b": DEEPSEEK_CODER,
    "Yarn-Llama-2-7b-128k": YARN_LLAMA_128K,
}
_LLAMA3_ROPE = {"theta": 500000.0, "kind": "llama3", "original_positions": 8192}
_8B = {
    "vocab": 128256, "width": 4096, "ffn": 14336, "layers": 32, "heads": 32, "kv_heads": 8, "head_dim": 128,
    "norm_eps": 1e-5, "param_dtype": "bfloat16", "dtype": "bfloat16",
}  # fmt: skip
_7B = {
    "vocab": 32000, "width": 4096, "ffn": 11008, "layers": 32, "heads": 32, "kv_heads": 32, "head_dim": 128,
    "positions": 4096, "norm_eps": 1e-5, "param_dtype": "bfloat16", "dtype": "bfloat16",
}  # fmt: skip
MEANT = {
    "Llama-2-7b": DecoderConfig(**_7B),
    "Llama-3-8B": DecoderConfig(**_8B, positions=8192, rope=Rope(theta=500000.0)),
    "Llama-3.1-8B": DecoderConfig(**_8B, positions=131072, rope=Rope(**_LLAMA3_ROPE, factor=8.0)),
    "Llama-3.2-1B": DecoderConfig(
        **_8B | {"width": 2048, "ffn": 8192, "layers": 16, "head_dim": 64}, positions=131072,
        rope=Rope(**_LLAMA3_ROPE, factor=32.0), tie_embeddings=True),
    "SmolLM2-135M": DecoderConfig(
        vocab=49152, width=576, ffn=1536, layers=30, heads=9, kv_heads=3, head_dim=64, positions=8192,
        rope=Rope(theta=100000.0), norm_eps=1e-5, tie_embeddings=True, init_std=1 / 24,
        param_dtype="bfloat16", dtype="bfloat16"),
    "TinyLlama-1.1B": DecoderConfig(
        **_7B | {"width": 2048, "ffn": 5632, "layers": 22, "kv_heads": 4, "head_dim": 64, "positions": 2048}),
    "vicuna-7b-v1.5-16k": DecoderConfig(**_7B, rope=Rope(kind="linear", factor=4.0)),
    "CodeLlama-7b": DecoderConfig(**_7B | {"vocab": 32016, "positions": 16384}, rope=Rope(theta=1e6)),
    "deepseek-coder-6.7b": DecoderConfig(
        **_7B | {"vocab": 32256, "positions": 16384, "norm_eps": 1e-6},
        rope=Rope(theta=1e5, kind="linear", factor=4.0)),
    "Yarn-Llama-2-7b-128k": DecoderConfig(
        **_7B | {"positions": 131072}, rope=Rope(kind="yarn", factor=32.0, original_positions=4096)),
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


def rotation(attributes):
    """What transformers rotates by: a frequency per pair, and the factor of cosines and sines."""
    rotary = LlamaRotaryEmbedding(transformers.LlamaConfig.from_dict(copy.deepcopy(attributes)))
    return rotary.inv_freq.numpy(), rotary.attention_scaling


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_rotations_are_those_of_transformers(name):
    frequencies, factor = rotation(PUBLISHED[name])
    ours = MEANT[name]
    np.testing.assert_allclose(inverse_frequencies(ours.rope, ours.head_dim), frequencies, rtol=3e-7)
    assert attention_factor(ours.rope) == pytest.approx(factor)


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
        for key in (llama._USED & theirs.keys()) - {"rope_parameters"}:
            assert from_ours[key] == theirs[key], key
        for ours, published in zip(rotation(layout), rotation(PUBLISHED[name]), strict=True):
            np.testing.assert_array_equal(ours, published)


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
