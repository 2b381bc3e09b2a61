"""Model directories: what goes in comes out, and whatever is wrong is named with its value and its remedy."""

import json
import os
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict
from safetensors.numpy import load_file, save_file

from jaxfw.core.errors import InputError
from jaxfw.models import DecoderConfig, Rope, forward, init
from jaxfw.weights import load, load_config, save, tensors

CONFIG = DecoderConfig(
    vocab=32, width=16, ffn=24, layers=2, heads=4, kv_heads=2, head_dim=8, positions=64, qkv_bias=True,
    out_bias=True, rope=Rope(kind="llama3", factor=8.0, original_positions=16),
)  # fmt: skip
TIED = DecoderConfig(
    vocab=32, width=16, ffn=24, layers=2, heads=4, kv_heads=2, head_dim=8, positions=64, tie_embeddings=True
)
EMBEDDING, QUERY = "model.embed_tokens.weight", "model.layers.0.self_attn.q_proj.weight"
DOWN = "model.layers.0.mlp.down_proj.weight"


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


@pytest.mark.parametrize("text", ["{}", '{"weight_map": {}}', '{"weight_map": []}', '{"weight_map": {"a": 1}}'])
def test_an_index_without_a_map(sharded, text):
    path = sharded / "model.safetensors.index.json"
    path.write_text(text)
    refused(sharded, path, "lacks 'weight_map'", "download it again")


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_a_directory_in_place_of_a_file(saved, name):
    (saved / name).unlink()
    (saved / name).mkdir()
    refused(saved, saved / name, "cannot be read (Is a directory)", "must be a file that you may read")


def test_a_shard_that_cannot_be_opened(sharded):
    path = sorted(sharded.glob("model-*.safetensors"))[1]
    path.unlink()
    path.symlink_to(path)
    refused(sharded, path, "cannot be read (Too many levels of symbolic links)")


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_a_file_that_may_not_be_read(saved, name):
    (saved / name).chmod(0)
    if os.access(saved / name, os.R_OK):
        pytest.skip("this user may read every file")
    refused(saved, saved / name, "cannot be read (Permission denied)")


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
    message = refused(saved / "config.json", saved / "config.json", "is not a directory")
    assert "hf download" not in message


def test_a_hub_id_is_told_how_to_get_the_model(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    refused("HuggingFaceTB/SmolLM2-135M", "`hf download HuggingFaceTB/SmolLM2-135M --local-dir DIR`", "huggingface_hub")
    for other in ("./a/b", "a/b/c", "a", "/a/b"):
        assert "hf download" not in refused(other, f"{other} is not a directory")


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


# --- attributes of the wrong type


@pytest.mark.parametrize(
    "attributes, message",
    [
        ({"hidden_size": "16"}, "hidden_size='16' must be a whole number: write it without quotes"),
        ({"hidden_size": 16.5}, "hidden_size=16.5 must be a whole number: correct it"),
        ({"num_hidden_layers": True}, "num_hidden_layers=True must be a whole number"),
        ({"vocab_size": [32]}, "vocab_size=[32] must be a whole number"),
        ({"max_position_embeddings": float("inf")}, "max_position_embeddings=inf must be a whole number"),
        ({"num_attention_heads": 0}, "model.heads=0 must be a whole number from 1 on"),
        ({"num_key_value_heads": 0}, "model.kv_heads=0 must be a whole number from 1 on"),
        ({"rms_norm_eps": "1e-5"}, "rms_norm_eps='1e-5' must be a number: write it without quotes"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps=nan must be a number"),
        ({"tie_word_embeddings": "false"}, "tie_word_embeddings='false' must be true or false: write it without"),
        ({"attention_bias": 0}, "attention_bias=0 must be true or false"),
        ({"mlp_bias": "no"}, "mlp_bias='no' must be true or false"),
        ({"model_type": ["llama"]}, "model_type=['llama'] is unknown. Known: llama"),
        ({"rope_parameters": None, "rope_theta": "1e4"}, "rope_theta='1e4' must be a number"),
        ({"rope_parameters": {"rope_theta": "1e4"}}, "rope_parameters: rope_theta='1e4' must be a number"),
        ({"rope_parameters": None, "rope_scaling": "linear"}, "rope_scaling='linear' must be an object or null"),
        ({"rope_parameters": [1]}, "rope_parameters=[1] must be an object or null"),
        ({"rope_parameters": {"rope_type": ["yarn"]}}, "rope_type=['yarn'] is unknown. Known: default"),
        ({"rope_parameters": {"type": "linear", "factor": "4"}}, "type 'linear': factor='4' must be a number"),
        ({"rope_parameters": {"type": "yarn", "factor": 4, "truncate": 1}}, "truncate=1 must be true or false"),
    ],
)
def test_attributes_of_the_wrong_type(saved, attributes, message):
    set_attributes(saved, **attributes)
    refused(saved, message)


def test_numbers_that_mean_the_same_are_taken(saved):
    expected = load_config(saved)
    set_attributes(saved, hidden_size=16.0, num_hidden_layers=2.0, vocab_size=32.0)
    config = load_config(saved)
    assert config == expected and type(config.width) is int
    rope = {"rope_type": "linear", "factor": 4, "rope_theta": 500}
    set_attributes(saved, rope_parameters=rope, rms_norm_eps=1)
    config = load_config(saved)
    assert (config.rope, config.norm_eps) == (Rope(kind="linear", factor=4.0, theta=500.0), 1.0)
    assert type(config.rope.theta) is type(config.norm_eps) is float


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
    monkeypatch.setattr(tensors, "read", lambda *_: pytest.fail("a tensor is read"))
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


def test_a_model_that_this_family_cannot_describe_is_refused(tmp_path):
    """LLaMA has one attribute for the biases of all four projections."""
    config = DecoderConfig(
        vocab=8, width=4, ffn=8, layers=1, heads=2, kv_heads=1, head_dim=2, positions=8, qkv_bias=True
    )
    with pytest.raises(InputError, match=r"qkv_bias=True.*out_bias=False"):
        save(tmp_path / "a", config, init(config, jax.random.key(0)))
    assert not list(tmp_path.iterdir())
