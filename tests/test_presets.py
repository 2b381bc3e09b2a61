"""Published models by name."""

import jax
import pytest

from jaxfw.core.errors import InputError
from jaxfw.models import init
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


def test_contexts():
    assert {name: config.context for name, config in PRESETS.items()} == {
        "llama-2-7b": 4096, "llama-2-13b": 4096, "llama-2-70b": 4096, "llama-3.1-8b": 131072, "llama-3.1-70b": 131072,
        "llama-3.2-1b": 131072, "llama-3.2-3b": 131072, "mixtral-8x7b": 32768,
    }  # fmt: skip


def test_an_unknown_preset_is_named_with_the_nearest():
    with pytest.raises(InputError, match=r"preset='llama-3\.1-7b' is unknown\. .* Did you mean 'llama-3\.1-"):
        preset("llama-3.1-7b")
