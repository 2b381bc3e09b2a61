"""Loading straight onto a mesh: by the rules, equal to one device, whatever the family and the bits."""

import json
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from jaxfw.models.hub_names import Stored
from jaxfw.weights import layout, load, save, tensors
from tests.mesh_weights import CASES, GPT2, LLAMA, MIXTRAL, numbers
from tests.model_directories import refused

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    command = [sys.executable, "-m", "tests.mesh_weights", str(tmp_path_factory.mktemp("meshes"))]
    found = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert found.returncode == 0, found.stderr[-2000:]
    return json.loads(found.stdout.splitlines()[-1])


@pytest.mark.parametrize("name", CASES)
def test_a_mesh_holds_what_one_device_does(report, name):
    found = report[name]
    assert found["equal"] and found["as ruled"]
    assert found["logits"] <= 2e-5
    assert found["held"] == [found["predicted"]], "the bytes that the pre-flight counts with"
    assert found["whole"] == found["predicted whole"]
    assert found["predicted"] < 0.8 * found["whole"]


@pytest.mark.parametrize("number", range(3))
def test_sharded_parameters_are_saved_as_whole_ones(report, number):
    assert report[f"saved {number}"]


@pytest.mark.parametrize("config", [LLAMA, GPT2, MIXTRAL], ids=["llama", "gpt2", "mixtral"])
def test_any_region_is_that_of_the_whole(tmp_path, config):
    """Transposed, fused and stacked tensors, cut anywhere."""
    rng, params = np.random.default_rng(0), jax.tree_util.tree_leaves_with_path(numbers(config))
    directory = save(tmp_path / "model", config, numbers(config))
    from jaxfw.weights.directory import open_directory

    opened = open_directory(directory)
    with tensors.Reader(opened.found) as reader:
        for path, leaf in params:
            ends = [sorted(rng.choice(size + 1, 2, replace=False)) for size in leaf.shape]
            index = tuple(slice(int(a), int(b)) for a, b in ends)
            stored = opened.stored[jax.tree_util.keystr(path, simple=True, separator="/")]
            assert np.array_equal(layout.read(reader, stored, index, leaf.dtype), leaf[index])


def test_shapes_of_what_is_stored():
    stored = {
        "a": Stored(("x",), transposed=True), "b": Stored(("y",), part=(0, 2)), "c": Stored(("y",), part=(2, 3)),
        "d": Stored(("e0", "e1"), transposed=True), "n": Stored(("n",)),
    }  # fmt: skip
    shapes = {"a": (4, 6), "b": (5, 2), "c": (5, 3), "d": (2, 7, 8), "n": (9,)}
    assert layout.stored_shapes(stored, shapes) == {"x": (6, 4), "y": (5, 5), "e0": (8, 7), "e1": (8, 7), "n": (9,)}


# --- names as older files have them


def unprefixed(name):
    return name.removeprefix("transformer.")


def test_gpt2_as_the_hub_has_it(tmp_path):
    """Its tensors are named there without the prefix that transformers writes."""
    directory = save(tmp_path / "model", GPT2, numbers(GPT2))
    found = load_file(directory / "model.safetensors")
    assert all(name.startswith("transformer.") for name in found)
    save_file({unprefixed(name): x for name, x in found.items()}, directory / "model.safetensors")
    read = load(directory)
    assert read.config.dtype == "float32"
    assert jax.tree.all(jax.tree.map(np.array_equal, read.params, numbers(GPT2)))


def test_the_stored_dtype_is_the_embeddings_whatever_its_name(tmp_path):
    params = jax.tree.map(lambda x: x.astype("bfloat16"), numbers(GPT2))
    read = load(save(tmp_path / "model", GPT2, params))
    assert (read.config.param_dtype, read.config.dtype) == ("bfloat16", "bfloat16")


def test_a_tensor_under_both_names_is_refused(tmp_path):
    directory = save(tmp_path / "model", GPT2, numbers(GPT2))
    found = load_file(directory / "model.safetensors")
    save_file(found | {"wte.weight": found["transformer.wte.weight"]}, directory / "model.safetensors")
    refused(directory, "holds transformer.wte.weight and wte.weight, which are one tensor: remove one of them")


def test_a_prefix_of_somebody_else_is_not_guessed(tmp_path):
    directory = save(tmp_path / "model", LLAMA, numbers(LLAMA))
    found = load_file(directory / "model.safetensors")
    save_file({f"module.{name}": x for name, x in found.items()}, directory / "model.safetensors")
    refused(directory, "missing: lm_head.weight", "unexpected: module.lm_head.weight")
