"""What a model directory holds comes out: round trips, dtypes, the configuration alone."""

import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from jaxfw.core.errors import InputError
from jaxfw.models import forward, init
from jaxfw.weights import load, load_config, save, tensors
from tests.model_directories import CONFIG, DOWN, EMBEDDING, TIED, equal, refused, rewrite, set_attributes

# --- round trips


@pytest.mark.parametrize("config", [CONFIG, TIED], ids=["untied", "tied"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("shard_bytes", [4096, 10**9], ids=["shards", "one file"])
def test_round_trip(tmp_path, config, dtype, shard_bytes):
    params = jax.tree.map(lambda x: x.astype(dtype), init(config, jax.random.key(1)))
    directory = save(tmp_path / "a", config, params, shard_bytes=shard_bytes)
    read = load(directory)
    assert equal(read.params, params)
    assert (read.config.param_dtype, read.config.dtype) == (dtype, dtype)
    again = load(save(tmp_path / "b", read.config, read.params))
    assert again.config == read.config and equal(again.params, params)


def test_each_tensor_keeps_its_own_dtype(tmp_path):
    params = init(CONFIG, jax.random.key(0))
    params = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)
    params["head"]["norm"]["scale"] = params["head"]["norm"]["scale"].astype(jnp.float32)
    read = load(save(tmp_path / "mixed", CONFIG, params))
    assert equal(read.params, params)
    assert read.config.dtype == "bfloat16"


def test_dtypes_on_request(saved):
    read = load(saved, param_dtype="bfloat16", dtype="float16", softmax_dtype="bfloat16")
    assert {x.dtype for x in jax.tree.leaves(read.params)} == {jnp.dtype("bfloat16")}
    assert (read.config.param_dtype, read.config.dtype, read.config.softmax_dtype) == (
        "bfloat16", "float16", "bfloat16",
    )  # fmt: skip
    with pytest.raises(InputError, match=r"dtype='int8' is unknown\. Known: float32, bfloat16, float16"):
        load(saved, dtype="int8")


def test_the_loaded_model_computes_the_same(saved):
    params = init(CONFIG, jax.random.key(0))
    tokens = jnp.arange(12)[None]
    read = load(saved)
    assert read.config == CONFIG
    expected = forward(CONFIG, params, tokens).logits
    np.testing.assert_array_equal(forward(read.config, read.params, tokens).logits, expected)


def test_further_attributes_are_written_and_come_back(tmp_path):
    params = init(CONFIG, jax.random.key(0))
    directory = save(tmp_path / "a", CONFIG, params, attributes={"eos_token_id": [2, 7], "vocab_size": 9})
    attributes = load(directory).attributes
    assert attributes["eos_token_id"] == [2, 7]
    assert attributes["vocab_size"] == 32, "the model's own attributes are not to be overridden"


def test_dtypes_may_be_given_as_jax_has_them(saved):
    assert load(saved, param_dtype=jnp.bfloat16, dtype=np.float16).config.dtype == "float16"


def test_tensors_can_be_read_by_whoever_can_read_the_config(saved):
    assert len({path.stat().st_mode for path in saved.iterdir()}) == 1


def test_a_tied_head_is_not_stored(tied, saved):
    assert "lm_head.weight" not in load_file(tied / "model.safetensors")
    assert "lm_head.weight" in load_file(saved / "model.safetensors")


def test_the_index_says_where_tensors_are(sharded):
    index = json.loads((sharded / "model.safetensors.index.json").read_text())
    found = {}
    for file in sorted(set(index["weight_map"].values())):
        assert re.fullmatch(r"model-\d{5}-of-\d{5}\.safetensors", file)
        tensors = load_file(sharded / file)
        assert len(tensors) == 1 or sum(x.nbytes for x in tensors.values()) <= 4096
        found |= dict.fromkeys(tensors, file)
    assert found == index["weight_map"]
    params = init(CONFIG, jax.random.key(0))
    assert index["metadata"]["total_size"] == sum(x.nbytes for x in jax.tree.leaves(params))


# --- what may be there without need


def test_rotary_buffers_of_old_checkpoints_are_ignored(saved):
    expected = load(saved).params
    name = "model.layers.1.self_attn.rotary_emb.inv_freq"
    rewrite(saved, lambda tensors: tensors | {name: np.ones(4, np.float32)})
    assert equal(load(saved).params, expected)


def test_a_stored_tied_head_may_equal_the_embedding(tied):
    expected = load(tied).params
    rewrite(tied, lambda tensors: tensors | {"lm_head.weight": tensors[EMBEDDING].copy()})
    assert equal(load(tied).params, expected)


def test_a_stored_tied_head_that_differs_is_refused(tied):
    rewrite(tied, lambda tensors: tensors | {"lm_head.weight": tensors[EMBEDDING] + 1})
    refused(tied, "lm_head.weight differs from", EMBEDDING, "tie_word_embeddings=true (set it to false)")


# --- dtypes


@pytest.mark.parametrize(
    "dtype, spelled", [("int8", "I8"), ("float64", "F64"), ("uint8", "U8"), ("float8_e4m3fn", "F8_E4M3")]
)
@pytest.mark.parametrize("name", [EMBEDDING, DOWN, "model.norm.weight"])
def test_a_dtype_that_is_not_one_of_ours(saved, name, dtype, spelled):
    rewrite(saved, lambda tensors: tensors | {name: tensors[name].astype(dtype)})
    refused(saved, f"stored as {spelled}: {name} (accepted: F32, BF16, F16.", "Take the unquantised one")


def test_all_odd_dtypes_are_told_with_the_shapes(saved):
    def change(tensors):
        kernels = {name: x.astype(np.int8) for name, x in tensors.items() if "mlp" in name}
        return tensors | kernels | {EMBEDDING: tensors[EMBEDDING][1:].astype(np.float64)}

    rewrite(saved, change)
    refused(
        saved,
        f"misshaped: {EMBEDDING} is [31, 16]",
        f"stored as F64: {EMBEDDING}; stored as I8: {DOWN}, model.layers.0.mlp.gate_proj.weight and 4 more (accepted:",
    )


def test_a_stored_tied_head_of_another_dtype_is_refused(tied):
    rewrite(tied, lambda tensors: tensors | {"lm_head.weight": tensors[EMBEDDING].astype(np.int8)})
    refused(tied, "stored as I8: lm_head.weight")


def test_buffers_that_are_ignored_may_have_any_dtype(saved):
    name = "model.layers.1.self_attn.rotary_emb.inv_freq"
    rewrite(saved, lambda tensors: tensors | {name: np.ones(4, np.float64)})
    assert load(saved).config == CONFIG


# --- the configuration alone


@pytest.mark.parametrize(
    "options", [{}, {"dtype": "bfloat16"}, {"param_dtype": "float16", "softmax_dtype": "bfloat16"}]
)
def test_the_configuration_alone_is_that_of_load(saved, sharded, tied, options, monkeypatch):
    expected = [load(directory, **options).config for directory in (saved, sharded, tied)]
    monkeypatch.setattr(tensors.Reader, "read", lambda *_: pytest.fail("a tensor is read"))
    assert [load_config(directory, **options) for directory in (saved, sharded, tied)] == expected


def test_the_configuration_alone_has_the_refusals_of_load(saved):
    rewrite(saved, lambda tensors: tensors | {DOWN: tensors[DOWN].astype(np.int8)})
    with pytest.raises(InputError, match=f"stored as I8: {DOWN}"):
        load_config(saved)
    set_attributes(saved, num_hidden_layers=3)
    with pytest.raises(InputError, match=r"missing: model\.layers\.2\."):
        load_config(saved)
    with pytest.raises(InputError, match=r"softmax_dtype='int8' is unknown"):
        load_config(saved, softmax_dtype="int8")
