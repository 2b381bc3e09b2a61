"""Model directories: what goes in comes out, and whatever is wrong is named with its value and its remedy."""

import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from jaxfw.core.errors import InputError
from jaxfw.models import DecoderConfig, Rope, forward, init
from jaxfw.weights import load, save

CONFIG = DecoderConfig(
    vocab=32, width=16, ffn=24, layers=2, heads=4, kv_heads=2, head_dim=8, positions=64, qkv_bias=True,
    out_bias=True, rope=Rope(kind="llama3", factor=8.0, original_positions=16),
)  # fmt: skip
TIED = DecoderConfig(
    vocab=32, width=16, ffn=24, layers=2, heads=4, kv_heads=2, head_dim=8, positions=64, tie_embeddings=True
)
EMBEDDING, QUERY = "model.embed_tokens.weight", "model.layers.0.self_attn.q_proj.weight"


@pytest.fixture
def saved(tmp_path):
    return save(tmp_path / "model", CONFIG, init(CONFIG, jax.random.key(0)))


@pytest.fixture
def tied(tmp_path):
    return save(tmp_path / "tied", TIED, init(TIED, jax.random.key(0)))


@pytest.fixture
def sharded(tmp_path):
    directory = save(tmp_path / "sharded", CONFIG, init(CONFIG, jax.random.key(0)), shard_bytes=4096)
    assert len(list(directory.glob("model-*.safetensors"))) > 3
    return directory


def rewrite(directory, change):
    """Replace the tensors of model.safetensors by `change(tensors)`."""
    path = directory / "model.safetensors"
    tensors = load_file(path)
    save_file(change(dict(tensors)), path, metadata={"format": "pt"})


def set_attributes(directory, **attributes):
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | attributes))


def refused(directory, *parts):
    """Load, expect a refusal, and check that its message has each part."""
    with pytest.raises(InputError) as caught:
        load(directory)
    message = str(caught.value)
    for part in parts:
        assert str(part) in message
    assert message.count("\n") == 0 and len(message) < 600
    return message


def equal(a, b):
    same = jax.tree.map(lambda x, y: x.dtype == y.dtype and np.array_equal(x, y), a, b)
    return jax.tree.structure(a) == jax.tree.structure(b) and jax.tree.all(same)


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


# --- tensors that do not fit


def test_missing_unexpected_and_misshaped_are_told_at_once(saved):
    def change(tensors):
        del tensors["model.norm.weight"]
        tensors[QUERY] = tensors[QUERY][:-8]
        return tensors | {"model.extra.weight": np.ones(3, np.float32)}

    rewrite(saved, change)
    refused(
        saved,
        "missing: model.norm.weight",
        "unexpected: model.extra.weight",
        f"misshaped: {QUERY} is [24, 16], config.json asks for [32, 16]",
    )


def test_a_missing_head_is_missing_unless_tied(saved):
    rewrite(saved, lambda tensors: {name: x for name, x in tensors.items() if name != "lm_head.weight"})
    refused(saved, "missing: lm_head.weight")


def test_a_long_list_is_cut(saved):
    rewrite(saved, lambda tensors: {EMBEDDING: tensors[EMBEDDING]})
    refused(saved, "missing: ", "and 23 more")


def test_transposed_tensors_are_misshaped(saved):
    name = "model.layers.1.mlp.gate_proj.weight"
    rewrite(saved, lambda tensors: tensors | {name: np.ascontiguousarray(tensors[name].T)})
    refused(saved, f"{name} is [16, 24], config.json asks for [24, 16]")


# --- damaged files


@pytest.mark.parametrize("keep", [0, 5, 100, -7])
def test_a_truncated_file(saved, keep):
    path = saved / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    refused(saved, path, f"({path.stat().st_size} bytes)", "truncated or corrupt", "download it again")


def test_a_corrupt_header(saved):
    path = saved / "model.safetensors"
    raw = bytearray(path.read_bytes())
    raw[8:20] = b"not a header"
    path.write_bytes(raw)
    refused(saved, path, "truncated or corrupt", "download it again")


def test_a_missing_shard(sharded):
    gone = sharded / "model-00002-of-00005.safetensors"
    files = sorted(sharded.glob("model-*.safetensors"))
    gone = files[1]
    gone.unlink()
    refused(sharded, gone, "is missing, but the index names it", "download the missing shard")


def test_a_truncated_shard(sharded):
    path = sorted(sharded.glob("model-*.safetensors"))[-1]
    path.write_bytes(path.read_bytes()[:-1])
    refused(sharded, path, "truncated or corrupt", "download it again")


def test_an_index_that_names_the_wrong_shard(sharded):
    path = sharded / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    first, last = (sorted(set(index["weight_map"].values()))[i] for i in (0, -1))
    moved = next(name for name, file in index["weight_map"].items() if file == first)
    index["weight_map"][moved] = last
    path.write_text(json.dumps(index))
    refused(sharded, sharded / last, f"lacks {moved}", "model.safetensors.index.json places there")


@pytest.mark.parametrize("text, part", [("{", "is not valid JSON"), ("[]", "must hold a JSON object, not list")])
@pytest.mark.parametrize("name", ["config.json", "model.safetensors.index.json"])
def test_damaged_json(sharded, name, text, part):
    (sharded / name).write_text(text)
    refused(sharded, sharded / name, part)


def test_an_index_without_a_map(sharded):
    path = sharded / "model.safetensors.index.json"
    path.write_text("{}")
    refused(sharded, path, "lacks 'weight_map'", "download it again")


# --- directories that are not models


def test_pickles_are_not_opened(saved):
    (saved / "model.safetensors").unlink()
    (saved / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'false'\ntR.")
    refused(saved, saved, "pytorch_model.bin", "can run code", "safetensors", "save_pretrained")


def test_no_weights_at_all(saved):
    (saved / "model.safetensors").unlink()
    refused(saved, saved, "neither model.safetensors nor model.safetensors.index.json")


def test_not_a_directory(tmp_path, saved):
    refused(tmp_path / "absent", tmp_path / "absent", "is not a directory", "config.json")
    refused(saved / "config.json", saved / "config.json", "is not a directory")


def test_no_config(saved):
    (saved / "config.json").unlink()
    refused(saved, saved / "config.json", "does not exist", "Hugging Face model directory?")


@pytest.mark.parametrize(
    "attributes, parts",
    [
        ({"foo_scale": 3}, ["foo_scale=3", "remove them from config.json"]),
        ({"model_type": "lama"}, ["model_type='lama' is unknown", "Known: llama", "Did you mean 'llama'?"]),
        ({"hidden_act": "gelu"}, ["hidden_act='gelu'", "only 'silu' is supported"]),
        ({"sliding_window": 4096}, ["sliding_window=4096", "not built yet"]),
        ({"num_hidden_layers": None}, ["lacks 'num_hidden_layers'", "complete?"]),
        ({"num_key_value_heads": 3}, ["model.heads=4 must be a multiple of model.kv_heads=3"]),
        ({"num_hidden_layers": 3}, ["missing: model.layers.2."]),
        ({"num_hidden_layers": 1}, ["unexpected: model.layers.1."]),
    ],
)
def test_attributes_that_do_not_fit(saved, attributes, parts):
    set_attributes(saved, **attributes)
    refused(saved, *parts)


def test_a_dtype_that_is_not_one_of_ours(saved):
    rewrite(saved, lambda tensors: tensors | {EMBEDDING: tensors[EMBEDDING].astype(np.float64)})
    refused(saved, f"{EMBEDDING} is stored as float64", "accepted: float32, bfloat16, float16")


# --- saving


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


def test_a_model_that_this_family_cannot_describe_is_refused(tmp_path):
    """LLaMA has one attribute for the biases of all four projections."""
    config = DecoderConfig(
        vocab=8, width=4, ffn=8, layers=1, heads=2, kv_heads=1, head_dim=2, positions=8, qkv_bias=True
    )
    with pytest.raises(InputError, match=r"qkv_bias=True.*out_bias=False"):
        save(tmp_path / "a", config, init(config, jax.random.key(0)))
