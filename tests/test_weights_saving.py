"""Saving: nothing is overwritten, nothing is half there, and what does not fit is refused."""

import dataclasses
import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict

from jaxfw.core.errors import InputError
from jaxfw.models import DecoderConfig, MoEConfig, init
from jaxfw.weights import load, save
from jaxfw.weights.families import FAMILIES, family
from tests.model_directories import CONFIG, TIED, equal


def test_nothing_is_overwritten(saved):
    before = {path.name: path.read_bytes() for path in saved.iterdir()}
    with pytest.raises(InputError, match=f"{saved} exists and is not empty: give a new directory"):
        save(saved, CONFIG, init(CONFIG, jax.random.key(5)))
    with pytest.raises(InputError, match=r"config\.json exists"):
        save(saved / "config.json", CONFIG, init(CONFIG, jax.random.key(5)))
    assert {path.name: path.read_bytes() for path in saved.iterdir()} == before


def test_an_empty_directory_may_be_filled_and_parents_are_made(tmp_path):
    params = init(TIED, jax.random.key(0))
    (tmp_path / "empty").mkdir()
    for directory in (tmp_path / "empty", tmp_path / "a" / "b"):
        assert equal(load(save(directory, TIED, params)).params, params)
        assert sorted(path.name for path in directory.iterdir()) == ["config.json", "model.safetensors"]


def test_params_of_another_model_are_refused(tmp_path):
    with pytest.raises(InputError, match="params do not fit the config: head/lm_head is in one of the two"):
        save(tmp_path / "a", CONFIG, {**init(CONFIG, jax.random.key(0)), "head": {"norm": {"scale": 1}}})
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "path, change, message",
    [
        ("layers_1/mlp/down/kernel", lambda x: x.T, "is [16, 24], the config asks for [24, 16]"),
        ("head/norm/scale", lambda x: x[:-1], "is [15], the config asks for [16]"),
        ("head/norm/scale", lambda x: 1.0, "is [], the config asks for [16]"),
        ("embed/embedding", lambda x: x.astype(jnp.int8), "is int8; accepted: float32, bfloat16, float16"),
        ("embed/embedding", lambda x: np.asarray(x, np.float64), "is float64; accepted: float32"),
    ],
)
def test_params_of_another_shape_or_dtype_are_refused(tmp_path, path, change, message):
    flat = flatten_dict(init(CONFIG, jax.random.key(0)), sep="/")
    params = unflatten_dict({**flat, path: change(flat[path])}, sep="/")
    message = f"{path} {message}"
    with pytest.raises(InputError, match=re.escape(message)):
        save(tmp_path / "a", CONFIG, params)
    assert not list(tmp_path.iterdir())


NARROW = DecoderConfig(vocab=8, width=4, ffn=8, layers=1, heads=2, kv_heads=1, head_dim=2, positions=8)


def test_the_first_family_that_can_express_a_model_is_taken(tmp_path):
    """LLaMA has one attribute for the biases of all four projections; Qwen2 has them on three."""
    for name, changes in {"llama": {}, "mistral": {"window": 4}, "qwen2": {"qkv_bias": True}}.items():
        config = dataclasses.replace(NARROW, **changes)
        directory = save(tmp_path / name, config, init(config, jax.random.key(0)))
        assert json.loads((directory / "config.json").read_text())["model_type"] == name
        assert load(directory).config == config


def test_what_means_the_same_may_be_written_otherwise(tmp_path):
    """None renormalises where there are several experts a token, which is all that this family has."""
    config = dataclasses.replace(NARROW, moe=MoEConfig(experts=3, per_token=2, ffn=6))
    again = load(save(tmp_path / "a", config, init(config, jax.random.key(0)))).config
    assert again == dataclasses.replace(config, ffn=6, moe=dataclasses.replace(config.moe, renormalize=True))


@pytest.mark.parametrize(
    "changes, model_type, message",
    [
        ({"qkv_bias": True}, "llama", r"qkv_bias=True.*out_bias=False"),
        ({"window": 4}, "llama", r"model_type 'llama' cannot express this model: model\.window=4 would become None"),
        ({"norm": "layer"}, None, r"no family of the Hub can express this model.*model\.norm='layer'"),
        ({}, "lama", r"model_type='lama' is unknown.*Did you mean 'llama'"),
    ],
)
def test_a_model_that_a_family_cannot_express_is_refused(tmp_path, changes, model_type, message):
    config = dataclasses.replace(NARROW, **changes)
    with pytest.raises(InputError, match=message):
        save(tmp_path / "a", config, init(config, jax.random.key(0)), model_type=model_type)
    assert not list(tmp_path.iterdir())


def test_every_family_is_there_under_its_name():
    for model_type in FAMILIES:
        assert model_type == family(model_type).MODEL_TYPE
