"""Whatever is wrong with a model directory is named with its value and its remedy."""

import json
import os

import numpy as np
import pytest

from jaxfw.core.errors import InputError
from jaxfw.models import Rope
from jaxfw.weights import load, load_config
from tests.model_directories import DOWN, EMBEDDING, QUERY, refused, rewrite, set_attributes

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
        ({"hidden_act": "gelu"}, ["hidden_act='gelu'", "built is 'silu'"]),
        ({"sliding_window": 4096}, ["sliding_window=4096", "has model_type 'mistral'"]),
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
    set_attributes(saved, rope_parameters=rope, rope_scaling=rope, rope_theta=500, rms_norm_eps=1)
    config = load_config(saved)
    assert (config.rope, config.norm_eps) == (Rope(kind="linear", factor=4.0, theta=500.0), 1.0)
    assert type(config.rope.theta) is type(config.norm_eps) is float


# --- checkpoints of other kinds


@pytest.mark.parametrize(
    "config, name",
    [
        ({"quant_method": "fp8"}, "FP8"),
        ({"quant_method": "gptq", "bits": 4}, "GPTQ"),
        ({"quant_method": "awq"}, "AWQ"),
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "bitsandbytes"),
        ({"load_in_8bit": True}, "bitsandbytes"),
        ({"quant_method": "compressed-tensors"}, "compressed-tensors"),
        ({"quant_method": "mxfp4"}, "MXFP4"),
        ({"quant_method": "aqlm"}, "aqlm"),
        ({"bits": 3}, "an unnamed method"),
    ],
)
def test_quantised_checkpoints(saved, config, name):
    set_attributes(saved, quantization_config=config)
    refused(
        saved, f"quantization_config says that this checkpoint is quantised by {name}", "unquantised repository",
        "quantise='int8' or quantise='int4'",
    )  # fmt: skip


def test_the_older_name_of_compressed_tensors(saved):
    set_attributes(saved, compression_config={"format": "pack-quantized"})
    refused(saved, "compression_config", "quantised by compressed-tensors")


def test_gguf(saved, tmp_path):
    (saved / "model.safetensors").unlink()
    (saved / "model-q4_k_m.gguf").write_bytes(b"GGUF")
    refused(saved, "holds GGUF files (model-q4_k_m.gguf)", "unquantised repository", "quantise='int4'")
    refused(saved / "model-q4_k_m.gguf", "is a GGUF file", "unquantised repository")


def test_a_file_of_pickles_in_place_of_a_directory(tmp_path):
    (tmp_path / "model.bin").write_bytes(b"cos\nsystem\n(S'false'\ntR.")
    refused(tmp_path / "model.bin", "pickled weights", "give a directory with safetensors")


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_git_lfs_pointers(saved, name):
    (saved / name).write_text(f"version https://git-lfs.github.com/spec/v1\noid sha256:{'0' * 64}\nsize 9\n")
    refused(saved, saved / name, "is a Git-LFS pointer", "git lfs pull")


def test_adapters(tmp_path):
    (tmp_path / "adapter_config.json").write_text("{}")
    (tmp_path / "adapter_model.safetensors").write_bytes(b"")
    refused(tmp_path, "holds an adapter (adapter_config.json)", "export BASE NEW --adapter=")


def test_weights_that_are_not_finite_are_not_quantised(saved):
    rewrite(saved, lambda tensors: tensors | {DOWN: np.full((16, 24), np.inf, np.float32)})
    assert not np.isfinite(load(saved).params["layers_0"]["mlp"]["down"]["kernel"]).any()
    with pytest.raises(InputError, match=f"{DOWN} holds values that are not finite"):
        load(saved, quantise="int8")


def test_an_unknown_quantisation(saved):
    with pytest.raises(InputError, match=r"quantise='nf4' is unknown\. Known: int8, int4"):
        load(saved, quantise="nf4")
