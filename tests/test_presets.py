"""Published models by name."""

import functools
import re
from typing import Any

import jax
import pytest
from flax.traverse_util import flatten_dict

from jaxfw.core.errors import InputError
from jaxfw.models import init, llama
from jaxfw.models.presets import PRESETS, preset
from jaxfw.models.sharding import decoder_rules
from jaxfw.weights import families

# As the models' pages give them, from the safetensors index of each checkpoint; a tied table once.
COUNTS = {
    "llama-2-7b": 6_738_415_616,
    "llama-2-13b": 13_015_864_320,
    "llama-2-70b": 68_976_648_192,
    "llama-3.1-8b": 8_030_261_248,
    "llama-3.1-70b": 70_553_706_496,
    "llama-3.2-1b": 1_235_814_400,
    "llama-3.2-3b": 3_212_749_824,
    "mistral-7b-v0.1": 7_241_732_096,
    "mistral-7b-v0.3": 7_248_023_552,
    "qwen2.5-0.5b": 494_032_768,
    "qwen2.5-1.5b": 1_543_714_304,
    "qwen2.5-7b": 7_615_616_512,
    "qwen2.5-32b": 32_763_876_352,
    "qwen2.5-72b": 72_706_203_648,
    "qwen3-0.6b": 596_049_920,
    "qwen3-1.7b": 1_720_574_976,
    "qwen3-8b": 8_190_735_360,
    "qwen3-32b": 32_762_123_264,
    "gpt2": 124_439_808,
    "gpt2-medium": 354_823_168,
    "gpt2-large": 774_030_080,
    "gpt2-xl": 1_557_611_200,
    "mixtral-8x7b": 46_702_792_704,
    "mixtral-8x22b": 140_620_634_112,
    "qwen1.5-moe-a2.7b": 14_315_784_192,
    "qwen2-57b-a14b": 57_408_658_944,
    "qwen3-30b-a3b": 30_532_122_624,
    "olmoe-1b-7b": 6_919_161_856,
    "deepseek-moe-16b": 16_375_728_128,
    "switch-8": 332_520_192,  # ours: by hand below
}


@functools.cache
def shapes(name) -> dict[str, jax.ShapeDtypeStruct]:
    """Path -> abstract parameter."""
    flat: Any = flatten_dict(jax.eval_shape(lambda: init(preset(name), jax.random.key(0))), sep="/")
    return flat


def test_every_preset_is_counted():
    assert set(COUNTS) == set(PRESETS)


@pytest.mark.parametrize("name", COUNTS)
def test_parameters_without_holding_them(name):
    leaves = shapes(name).values()
    assert sum(leaf.size for leaf in leaves) == COUNTS[name]
    assert {str(leaf.dtype) for leaf in leaves} == {"bfloat16"}


def test_what_transformers_does_not_have_is_counted_by_hand():
    """DeepSeekMoE by the sizes of its paper and config.json: 28 layers, the first dense, 64 experts and 2 shared."""
    width, layers, vocab = 2048, 28, 102400
    attention, norms, expert = 4 * width**2, 2 * width, 3 * width * 1408
    sparse = attention + norms + width * 64 + (64 + 2) * expert
    dense = attention + norms + 3 * width * 10944
    assert dense + (layers - 1) * sparse + 2 * vocab * width + width == COUNTS["deepseek-moe-16b"]
    attention, feed_forward, norms = 4 * 768**2, 3 * 768 * 2048, 2 * 768
    sparse = attention + norms + 768 * 8 + 8 * feed_forward
    dense = attention + norms + feed_forward
    assert 6 * (dense + sparse) + 2 * 32128 * 768 + 768 == COUNTS["switch-8"]


def test_experts_are_where_they_should_be():
    moe = {name: config.moe for name, config in PRESETS.items() if config.moe}
    assert [i for i in range(28) if not moe["deepseek-moe-16b"].is_in(i)] == [0]
    assert [i for i in range(12) if moe["switch-8"].is_in(i)] == [1, 3, 5, 7, 9, 11]
    everywhere = moe.keys() - {"deepseek-moe-16b", "switch-8"}
    assert all(moe[name].is_in(i) for name in everywhere for i in range(PRESETS[name].layers))


@pytest.mark.parametrize("name", COUNTS)
def test_every_parameter_has_exactly_one_rule_and_a_place_in_the_files(name):
    config, paths = preset(name), shapes(name).keys()
    rules = decoder_rules(config)
    for path in paths:
        assert sum(bool(re.fullmatch(rule.pattern, path)) for rule in rules) == 1, path
    if name != "switch-8":
        assert families.choose(config).tensors(config).keys() == paths


LLAMA_2 = {
    "hidden_act": "silu", "hidden_size": 4096, "intermediate_size": 11008, "max_position_embeddings": 4096,
    "model_type": "llama", "num_attention_heads": 32, "num_hidden_layers": 32, "num_key_value_heads": 32,
    "rms_norm_eps": 1e-05, "rope_scaling": None, "tie_word_embeddings": False, "vocab_size": 32000,
}  # fmt: skip
LLAMA_3 = LLAMA_2 | {
    "attention_bias": False, "intermediate_size": 14336, "max_position_embeddings": 131072, "mlp_bias": False,
    "num_key_value_heads": 8, "rope_theta": 500000.0, "vocab_size": 128256,
    "rope_scaling": {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                     "original_max_position_embeddings": 8192, "rope_type": "llama3"},
}  # fmt: skip
LARGE = {"hidden_size": 8192, "intermediate_size": 28672, "num_attention_heads": 64, "num_hidden_layers": 80}
SMALL = {"rope_scaling": LLAMA_3["rope_scaling"] | {"factor": 32.0}, "tie_word_embeddings": True, "head_dim": 64}
PUBLISHED = {
    "llama-2-7b": LLAMA_2,
    "llama-2-13b": LLAMA_2 | {
        "hidden_size": 5120, "intermediate_size": 13824, "num_attention_heads": 40, "num_hidden_layers": 40,
        "num_key_value_heads": 40,
    },
    "llama-2-70b": LLAMA_2 | LARGE | {"num_key_value_heads": 8},
    "llama-3.1-8b": LLAMA_3,
    "llama-3.1-70b": LLAMA_3 | LARGE,
    "llama-3.2-1b": LLAMA_3 | SMALL | {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16},
    "llama-3.2-3b": LLAMA_3 | SMALL | {
        "head_dim": 128, "hidden_size": 3072, "intermediate_size": 8192, "num_attention_heads": 24,
        "num_hidden_layers": 28,
    },
}  # fmt: skip


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_llama_is_what_its_config_json_says(name):
    read = llama.read_config(PUBLISHED[name], param_dtype="bfloat16", dtype="bfloat16", softmax_dtype="float32")
    assert preset(name) == read


def test_an_unknown_preset_is_named_with_the_nearest():
    with pytest.raises(InputError, match=r"preset='llama-3\.1-7b' is unknown\. .* Did you mean 'llama-3\.1-"):
        preset("llama-3.1-7b")
