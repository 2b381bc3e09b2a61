"""config.json as transformers reads and writes it means what it means here, in every dense family."""

import copy
import json
from importlib import import_module

import numpy as np
import pytest

transformers = pytest.importorskip("transformers")
pytest.importorskip("torch")
pytestmark = pytest.mark.oracle

from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding  # noqa: E402

from experiments import parity  # noqa: E402
from jaxfw.ops.rope import attention_factor, inverse_frequencies  # noqa: E402
from tests.published_dense import LLAMA_2_7B, MEANT, PUBLISHED, QWEN_2_5_7B, QWEN_3_06B, in_version_5  # noqa: E402

ROTATED = [name for name, config in MEANT.items() if config.rope is not None]


def family(attributes):
    return import_module(f"jaxfw.models.{attributes['model_type']}")


def read(attributes):
    dtypes = {"param_dtype": "bfloat16", "dtype": "bfloat16", "softmax_dtype": "float32"}
    return family(attributes).read_config(copy.deepcopy(attributes), **dtypes)


def theirs(attributes):
    """The same file as an object of transformers."""
    kind = type(transformers.AutoConfig.for_model(attributes["model_type"]))
    return kind.from_dict(copy.deepcopy(attributes))


def as_version_5(attributes):
    """What transformers 5 writes for the same model."""
    return json.loads(theirs(attributes).to_json_string(use_diff=False))


@pytest.mark.parametrize("name", PUBLISHED)
def test_what_version_5_writes_means_what_is_published(name):
    newer = as_version_5(PUBLISHED[name])
    assert not {"rope_theta", "torch_dtype"} & newer.keys()
    assert read(newer) == MEANT[name]
    by_hand = in_version_5(PUBLISHED[name])
    assert {key: by_hand[key] for key in by_hand.keys() & family(newer).USED} == {
        key: newer[key] for key in by_hand.keys() & family(newer).USED
    }


def rotation(attributes):
    """What transformers rotates by: a frequency per pair, and the factor of cosines and sines."""
    rotary = LlamaRotaryEmbedding(theirs(attributes))
    return rotary.inv_freq.numpy(), rotary.attention_scaling


@pytest.mark.parametrize("name", ROTATED)
def test_published_rotations_are_those_of_transformers(name):
    frequencies, factor = rotation(PUBLISHED[name])
    ours = MEANT[name]
    np.testing.assert_allclose(inverse_frequencies(ours.rope, ours.head_dim), frequencies, rtol=3e-7)
    assert attention_factor(ours.rope) == pytest.approx(factor)


@pytest.mark.parametrize("name", PUBLISHED)
def test_what_we_write_is_read_alike_there(name):
    """Also each layout alone: older libraries know only the first."""
    written = json.loads(json.dumps(family(PUBLISHED[name]).write_config(MEANT[name])))
    older = {key: value for key, value in written.items() if key not in ("rope_parameters", "dtype", "layer_types")}
    newer = {key: value for key, value in written.items() if key not in ("rope_theta", "rope_scaling", "torch_dtype")}
    expected = theirs(PUBLISHED[name]).to_dict()
    for layout in (written, older, newer):
        from_ours = theirs(layout).to_dict()
        for key in (family(written).USED & expected.keys()) - {"rope_parameters", "max_window_layers"}:
            # Where it is absent, the width divided by the heads is meant.
            assert from_ours[key] == expected[key] or (key, expected[key]) == ("head_dim", None), key
        if name in ROTATED:
            for ours, published in zip(rotation(layout), rotation(PUBLISHED[name]), strict=True):
                np.testing.assert_array_equal(ours, published)


@pytest.mark.parametrize("name", [name for name, case in parity.CASES.items() if case.model_type == "llama"])
def test_every_rope_survives_the_round_trip(name):
    case = parity.CASES[name]
    positions = case.attributes["max_position_embeddings"]
    attributes = LLAMA_2_7B | {"max_position_embeddings": positions, "rope_parameters": dict(case.rope)}
    config = read(attributes)
    written = json.loads(json.dumps(family(attributes).write_config(config)))
    assert read(written) == config
    for layout in (written, {k: v for k, v in written.items() if k != "rope_parameters"}):
        assert case.rope.items() <= theirs(layout).rope_parameters.items()


@pytest.mark.parametrize("changes", [
    {"max_window_layers": 21}, {"max_window_layers": 0}, {"max_window_layers": 28}, {"sliding_window": None},
    {"use_sliding_window": False}, {"layer_types": ["full_attention", "sliding_attention"] * 14},
])  # fmt: skip
@pytest.mark.parametrize("published", [QWEN_2_5_7B, QWEN_3_06B], ids=["qwen2", "qwen3"])
def test_windows_are_in_the_layers_in_which_transformers_has_them(published, changes):
    attributes = published | {"use_sliding_window": True, "sliding_window": 512, "max_window_layers": 20} | changes
    config, there = read(attributes), theirs(attributes)
    slides = [kind == "sliding_attention" for kind in there.layer_types]
    assert [config.at(i).window for i in range(28)] == [there.sliding_window if here else None for here in slides]
    again = theirs(family(attributes).write_config(config))
    assert again.layer_types == there.layer_types
    assert not any(slides) or again.sliding_window == there.sliding_window


@pytest.mark.parametrize("model_type", ["llama", "mistral", "qwen2", "qwen3", "gpt2"])
def test_attributes_that_may_be_absent_have_transformers_defaults(model_type):
    needed = ("hidden_size", "intermediate_size", "num_attention_heads", "num_hidden_layers", "vocab_size")
    default = transformers.AutoConfig.for_model(model_type).to_dict()
    attributes = {key: default[key] for key in needed if key in default} | {"model_type": model_type}
    assert read(attributes) == read(as_version_5(attributes))
