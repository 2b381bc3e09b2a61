"""DeepSeekMoE, which transformers does not have, against plain numpy in float64 on the same file; faults show."""

import dataclasses
import json
import re
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict
from safetensors.numpy import load_file, save_file

from jaxfw.models import forward
from jaxfw.weights import load, save
from tests import numpy_deepseek
from tests.model_directories import refused, set_attributes
from tests.published_mixtures import PUBLISHED

SMALL = PUBLISHED["deepseek-moe-16b"] | {
    "hidden_size": 64, "intermediate_size": 88, "moe_intermediate_size": 24, "n_routed_experts": 12,
    "num_attention_heads": 4, "num_hidden_layers": 3, "num_key_value_heads": 2, "torch_dtype": "float32",
    "vocab_size": 96,
}  # fmt: skip
LENGTHS = jnp.array([40, 23])
TOLERANCE = 1e-5  # as for the families that transformers has, see experiments/parity
MARGIN = 5e-4


def drawn():
    """Tensors by the Hub's names, each of which matters: sharp attention and routing, norms of all sizes."""
    a, rng = SMALL, np.random.default_rng(0)
    D, V, F, E = a["hidden_size"], a["vocab_size"], a["moe_intermediate_size"], a["n_routed_experts"]
    kv = D // a["num_attention_heads"] * a["num_key_value_heads"]
    sizes = {"model.embed_tokens.weight": (0.02, V, D), "lm_head.weight": (0.16, V, D)}

    def feed_forward(name, width):
        return {f"{name}.{part}_proj.weight": (0.05, width, D) for part in ("gate", "up")} | {
            f"{name}.down_proj.weight": (0.05, D, width)
        }

    for i in range(a["num_hidden_layers"]):
        layer = f"model.layers.{i}"
        projections = {"q": (0.15, D, D), "k": (0.15, kv, D), "v": (0.025, kv, D), "o": (0.025, D, D)}
        sizes |= {f"{layer}.self_attn.{part}_proj.weight": size for part, size in projections.items()}
        if i < a["first_k_dense_replace"]:
            sizes |= feed_forward(f"{layer}.mlp", a["intermediate_size"])
            continue
        sizes |= {f"{layer}.mlp.gate.weight": (0.1, E, D)}
        sizes |= feed_forward(f"{layer}.mlp.shared_experts", F * a["n_shared_experts"])
        for e in range(E):
            sizes |= feed_forward(f"{layer}.mlp.experts.{e}", F)
    tensors = {name: scale * rng.standard_normal(shape) for name, (scale, *shape) in sizes.items()}
    norms = [f"model.layers.{i}.{part}_layernorm.weight" for i in range(3) for part in ("input", "post_attention")]
    tensors |= {name: rng.uniform(0.5, 1.5, D) for name in (*norms, "model.norm.weight")}
    return {name: value.astype(np.float32).astype(np.float64) for name, value in tensors.items()}


def write(folder, tensors):
    tensors = {name: value.astype(np.float32) for name, value in tensors.items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(SMALL))


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    folder = tmp_path_factory.mktemp("deepseek")
    write(folder, drawn())
    return folder


@pytest.fixture(scope="module")
def checkpoint(directory):
    return load(directory)


@pytest.fixture(scope="module")
def tokens():
    return np.random.default_rng(1).integers(0, SMALL["vocab_size"], (2, 40)).astype(np.int32)


@pytest.fixture(scope="module")
def expected(tokens):
    """Logits of each row, cut to its length."""
    rows = [numpy_deepseek.run(SMALL, drawn(), row[:length]) for row, length in zip(tokens, LENGTHS)]
    assert min(lead for _, lead in rows) >= MARGIN, "no choice of experts is a tie"
    return [logits for logits, _ in rows]


def error(config, params, tokens, expected):
    logits = jax.jit(lambda params: forward(config, params, tokens, lengths=LENGTHS).logits)(params)
    largest = max(np.abs(ours[: len(row)] - row).max() for ours, row in zip(np.asarray(logits, np.float64), expected))
    return largest / np.concatenate(expected).std()


def test_logits(checkpoint, tokens, expected):
    assert np.concatenate(expected).std() >= 1
    assert error(checkpoint.config, checkpoint.params, tokens, expected) <= TOLERANCE


@pytest.mark.slow
def test_logits_on_a_mesh(directory, tokens, expected, tmp_path):
    """fsdp=2, tensor=2; and what is quantised while a mesh is set is what one device quantises."""
    np.save(tmp_path / "tokens.npy", tokens)
    words = [directory, tmp_path / "tokens.npy", tmp_path / "out.npz"]
    command = [sys.executable, "-m", "tests.mesh_deepseek", *map(str, words)]
    done = subprocess.run(command, cwd=Path(__file__).parents[1], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    found = np.load(tmp_path / "out.npz")
    pairs = zip(np.asarray(found["logits"], np.float64), expected, strict=True)
    largest = max(np.abs(ours[: len(row)] - row).max() for ours, row in pairs)
    assert largest / np.concatenate(expected).std() <= TOLERANCE and found["same"]


def moe(**changes):
    return lambda config: dataclasses.replace(config, moe=dataclasses.replace(config.moe, **changes))


def where(pattern, change):
    def edit(params):
        flat = flatten_dict(params, sep="/")
        named = [path for path in flat if re.fullmatch(pattern, path)]
        assert named
        return unflatten_dict({**flat, **{path: change(flat[path]) for path in named}}, sep="/")

    return edit


def one_shared(params):
    params = where(r"\w+/moe/shared/(gate|up)/kernel", lambda kernel: kernel[:, :24])(params)
    return where(r"\w+/moe/shared/down/kernel", lambda kernel: kernel[:24])(params)


def gate_for_up(params):
    flat = flatten_dict(params, sep="/")
    other = {"gate": "up", "up": "gate"}
    name = re.compile(r"(?<=moe/shared/)(gate|up)")
    return unflatten_dict({name.sub(lambda m: other[m[0]], path): leaf for path, leaf in flat.items()}, sep="/")


EXPERTS = r"\w+/moe/experts/\w+"
FAULTS = {
    "shared experts left out": (moe(shared=0), None),
    "one shared expert of two": (moe(shared=24), one_shared),
    "gate and up of the shared experts swapped": (None, gate_for_up),
    "norm_topk_prob true": (moe(renormalize=True), None),
    "scores sigmoid": (moe(scores="sigmoid"), None),
    "five experts for six": (moe(per_token=5), None),
    "seven experts for six": (moe(per_token=7), None),
    "experts one further": (None, where(EXPERTS, lambda kernels: jnp.roll(kernels, 1, axis=0))),
    "experts in the order of their names": (
        None, where(EXPERTS, lambda kernels: kernels[np.array(sorted(range(12), key=str))])),
    "layers with experts swapped": (
        None, lambda params: {**params, "layers_1": params["layers_2"], "layers_2": params["layers_1"]}),
    "norm eps 1e-5 for 1e-6": (lambda config: dataclasses.replace(config, norm_eps=1e-5), None),
}  # fmt: skip


@pytest.mark.parametrize("name", FAULTS)
def test_a_planted_fault_shows(checkpoint, tokens, expected, name):
    config, params = (
        value if edit is None else edit(value)
        for edit, value in zip(FAULTS[name], (checkpoint.config, checkpoint.params))
    )
    assert error(config, params, tokens, expected) >= 100 * TOLERANCE


def test_the_gradient_along_a_direction(checkpoint, tokens, tmp_path):
    """Of a loss that is linear in the logits, by central differences in float64."""
    rng, row = np.random.default_rng(2), tokens[0, :16]
    weights = rng.standard_normal((16, SMALL["vocab_size"]))
    tensors = drawn()
    direction = {name: rng.standard_normal(x.shape) * np.abs(x).mean() for name, x in tensors.items()}

    def loss(step):
        moved = {name: x + step * direction[name] for name, x in tensors.items()}
        return (weights * numpy_deepseek.run(SMALL, moved, row)[0]).sum()

    slope = (loss(1e-5) - loss(-1e-5)) / 2e-5

    def loss_here(params):
        return jnp.sum(weights * forward(checkpoint.config, params, row[None]).logits[0])

    gradients = jax.jit(jax.grad(loss_here))(checkpoint.params)
    write(tmp_path, direction)
    parts = jax.tree.leaves(jax.tree.map(lambda x, y: float(jnp.vdot(x, y)), gradients, load(tmp_path).params))
    assert sum(parts) == pytest.approx(slope, abs=1e-4 * sum(map(abs, parts)))


def test_what_is_saved_is_the_file_to_the_bit(checkpoint, directory, tmp_path):
    save(tmp_path / "ours", checkpoint.config, checkpoint.params, attributes=checkpoint.attributes)
    theirs, ours = load_file(directory / "model.safetensors"), load_file(tmp_path / "ours" / "model.safetensors")
    assert theirs.keys() == ours.keys()
    assert all(np.array_equal(theirs[name], ours[name]) for name in theirs)
    written = json.loads((tmp_path / "ours" / "config.json").read_text())
    assert {name: written[name] for name in SMALL} == SMALL


@pytest.mark.parametrize("attributes, names", [
    ({"first_k_dense_replace": 0}, ["missing", "model.layers.0.mlp.experts.0.down_proj.weight"]),
    ({"first_k_dense_replace": 2}, ["missing", "model.layers.1.mlp.down_proj.weight", "unexpected"]),
    ({"moe_layer_freq": 2}, ["missing", "model.layers.1.mlp.down_proj.weight", "unexpected"]),
    ({"n_shared_experts": 1}, ["misshaped", "model.layers.1.mlp.shared_experts.down_proj.weight"]),
    ({"n_shared_experts": None}, ["unexpected", "model.layers.1.mlp.shared_experts.down_proj.weight"]),
    ({"n_routed_experts": 11}, ["unexpected", "model.layers.1.mlp.experts.11.down_proj.weight"]),
])  # fmt: skip
def test_layers_and_experts_that_the_file_does_not_have(directory, tmp_path, attributes, names):
    (tmp_path / "model.safetensors").symlink_to(directory / "model.safetensors")
    (tmp_path / "config.json").write_text((directory / "config.json").read_text())
    set_attributes(tmp_path, **attributes)
    refused(tmp_path, *names)
