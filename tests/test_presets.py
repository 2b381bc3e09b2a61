"""Published models by name."""

import jax
import pytest

from jaxfw.core.errors import InputError
from jaxfw.models import init, llama
from jaxfw.models.presets import PRESETS, preset

# As the models' pages give them, from the safetensors index of each checkpoint.
COUNTS = {
    "llama-2-7b": 6_738_415_616,
    "llama-2-13b": 13_015_864_320,
    "llama-2-70b": 68_976_648_192,
    "llama-3.1-8b": 8_030_261_248,
    "llama-3.1-70b": 70_553_706_496,
    "llama-3.2-1b": 1_235_814_400,
    "llama-3.2-3b": 3_212_749_824,
    "mixtral-8x7b": 46_702_792_704,
}


def test_every_preset_is_counted():
    assert set(COUNTS) == set(PRESETS)


@pytest.mark.parametrize("name", COUNTS)
def test_parameters_without_holding_them(name):
    leaves = jax.tree.leaves(jax.eval_shape(lambda: init(preset(name), jax.random.key(0))))
    assert sum(leaf.size for leaf in leaves) == COUNTS[name]
    assert {str(leaf.dtype) for leaf in leaves} == {"bfloat16"}


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
