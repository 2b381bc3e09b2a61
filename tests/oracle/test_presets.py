"""Presets have as many parameters as transformers' own models of those sizes, built without memory."""

import collections

import jax
import pytest
from flax.traverse_util import flatten_dict

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.oracle

from jaxfw.models import init  # noqa: E402
from jaxfw.models.presets import PRESETS, preset  # noqa: E402
from jaxfw.weights import families  # noqa: E402

# Families that transformers does not have, or nobody has: counted in tests/test_presets.py.
ELSEWHERE = {"deepseek-moe-16b", "switch-8"}


def model_there(name):
    """The model that transformers makes of our config.json, on the meta device."""
    written = families.choose(preset(name)).write_config(preset(name))
    config = transformers.AutoConfig.for_model(written.pop("model_type"), **written)
    with torch.device("meta"):
        return transformers.AutoModelForCausalLM.from_config(config)


def by_layer(sizes):
    """Sums by the number in a path, as experts may be stored apart or together there, and parts of one tensor here."""
    sums = collections.Counter()
    for path, size in sizes.items():
        numbers = [part for part in path.replace("_", ".").replace("/", ".").split(".") if part.isdecimal()]
        sums[numbers[0] if numbers else "outside"] += size
    return sums


@pytest.mark.parametrize("name", sorted(PRESETS.keys() - ELSEWHERE))
def test_sizes_layer_by_layer(name):
    theirs = {path: parameter.numel() for path, parameter in model_there(name).named_parameters()}
    sizes = jax.tree.map(lambda leaf: leaf.size, jax.eval_shape(lambda: init(preset(name), jax.random.key(0))))
    ours = flatten_dict(sizes, sep="/")
    assert by_layer(ours) == by_layer(theirs)
