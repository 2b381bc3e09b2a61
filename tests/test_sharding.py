"""Rules by a parameter's path, their table, and a decoder on eight devices against one."""

import functools
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec as P

from experiments import sharding as experiment
from jaxfw.core.errors import InputError
from jaxfw.core.mesh import abstract_mesh
from jaxfw.core.sharding import Rule, match, shardings, state_shardings, table
from jaxfw.models import DecoderConfig, MoEConfig, init, stack_layers
from jaxfw.models.presets import PRESETS, preset
from jaxfw.models.routing.routers import SoftChoice, TokenChoice
from jaxfw.models.sharding import ROUTER_STATES, batch_shardings, cache_shardings, decoder_rules
from jaxfw.nn.layers import _token_dot
from jaxfw.train import NextTokenLoss, init_state

MIB = 2**20
MESHES = {
    "tensor=8": abstract_mesh(tensor=8),
    "fsdp=8": abstract_mesh(fsdp=8),
    "fsdp=4,tensor=8": abstract_mesh(fsdp=4, tensor=8),
    "data=2,fsdp=2,tensor=2": abstract_mesh(data=2, fsdp=2, tensor=2),
    "fsdp=2,expert=4,tensor=2": abstract_mesh(fsdp=2, expert=4, tensor=2),
    "expert=8,tensor=8": abstract_mesh(expert=8, tensor=8),
}


def array(*shape, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(shape, dtype)


@functools.cache
def shapes_of(config):
    return jax.eval_shape(lambda: init(config, jax.random.key(0)))


def paths(tree):
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in
            jax.tree_util.tree_leaves_with_path(tree)}  # fmt: skip


def specs(rules, mesh, tree):
    return {name: tuple(place.spec) for name, place in paths(shardings(rules, mesh, tree)).items()}


# --- rules


def test_the_first_layout_that_cuts_evenly_is_taken_and_the_table_says_why():
    rules = (Rule("a", (("tensor", "fsdp"), (None, ("fsdp", "tensor")), (None, None))),)
    for shape, spec, parts, why in (
        ((8, 6), ("tensor", "fsdp"), 8, ""),
        ((50257, 16), (None, ("fsdp", "tensor")), 8, "50257 over tensor=4"),
        ((7, 3), (None, None), 1, "7 over tensor=4"),
        ((8, 3), (None, None), 1, "3 over fsdp=2"),
    ):
        tree, mesh = {"a": array(*shape)}, abstract_mesh(fsdp=2, tensor=4)
        assert specs(rules, mesh, tree) == {"a": spec}
        (row,) = table(rules, mesh, tree).rows
        assert (row.bytes, row.bytes_per_device, row.why) == (4 * np.prod(shape), 4 * np.prod(shape) // parts, why)


def test_heads_are_not_cut():
    rule = Rule("k", ((None, "tensor"), (None, None)), units=(None, 2))
    assert specs((rule,), abstract_mesh(tensor=2), {"k": array(4, 32)}) == {"k": (None, "tensor")}
    assert specs((rule,), abstract_mesh(tensor=8), {"k": array(4, 32)}) == {"k": (None, None)}
    (row,) = table((rule,), abstract_mesh(tensor=8), {"k": array(4, 32)}).rows
    assert row.why == "2 blocks of 16 over tensor=8"


def test_axes_in_front_of_a_layout_stay_whole():
    rule = Rule("w", (("fsdp", "tensor"),), units=(None, 4))
    assert specs((rule,), abstract_mesh(fsdp=2, tensor=4), {"w": array(3, 8, 16)}) == {"w": (None, "fsdp", "tensor")}


def test_parameters_without_a_rule_and_with_two_are_named():
    rules = (Rule("a/.*", ((None,),)), Rule(".*/b", ((None,),)))
    mesh = abstract_mesh(data=2)
    with pytest.raises(InputError, match=r"parameter 'c' matches no sharding rule: add a Rule"):
        shardings(rules, mesh, {"c": array(2)})
    with pytest.raises(InputError, match=r"parameter 'a/b' matches 2 sharding rules, 'a/\.\*' and '\.\*/b'"):
        shardings(rules, mesh, {"a": {"b": array(2)}})
    with pytest.raises(InputError, match=r"'xa/c' matches no"):
        match(rules, "xa/c")  # the whole path counts


def test_a_rule_without_a_layout_that_fits_is_named():
    with pytest.raises(InputError, match=r"parameter 'a' \[6\] fits no layout of rule 'a' .*: 6 over fsdp=4\."):
        table((Rule("a", (("fsdp",),)),), abstract_mesh(fsdp=4), {"a": array(6)})
    with pytest.raises(InputError, match=r"parameter 'a' \[6\] has fewer axes than \('fsdp', None\)"):
        table((Rule("a", (("fsdp", None),)),), abstract_mesh(fsdp=4), {"a": array(6)})


def test_the_table_prints_what_lies_where():
    rules = (Rule("w", (("fsdp", "tensor"), (None, None))), Rule("s", ((None,),), why="small"))
    text = str(table(rules, abstract_mesh(fsdp=2, tensor=2), {"w": array(4, 1000), "s": array(10)}))
    lines = [" ".join(line.split()) for line in text.splitlines()]
    assert lines[1:] == [
        "w 1 4x1000 float32 fsdp, tensor 16,000 4,000",
        "s 1 10 float32 - 40 40 small",
        "all 16,040 4,040",
    ]


# --- a decoder's rules

BIASED = DecoderConfig(
    vocab=50257, width=64, ffn=96, layers=2, heads=6, kv_heads=2, head_dim=8, positions=64,
    qkv_bias=True, out_bias=True, mlp_bias=True, moe=MoEConfig(experts=6, per_token=2, ffn=32, first=1),
)  # fmt: skip


@pytest.mark.parametrize("name", PRESETS)
@pytest.mark.parametrize("mesh", MESHES)
def test_every_parameter_of_every_preset_has_one_rule_and_nothing_large_is_replicated(name, mesh):
    config = preset(name)
    shapes, rules = shapes_of(config), decoder_rules(config)
    counts = {path: sum(rule.pattern == match(rules, path).pattern for rule in rules) for path in paths(shapes)}
    assert set(counts.values()) == {1}
    found = table(rules, MESHES[mesh], shapes)
    assert found.bytes == sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(shapes))
    whole = [row for row in found.rows if row.bytes_per_device == row.bytes and row.bytes / row.count > MIB]
    # A head is never cut: heads that do not divide are whole, if there is no other axis to cut by.
    uneven = re.compile(rf"({config.heads}|{config.kv_heads}) blocks of {config.head_dim} over tensor=8")
    assert [row.pattern for row in whole if not uneven.fullmatch(row.why)] == []


def test_what_is_large_and_replicated_all_the_same_is_listed_with_its_reason():
    config = preset("llama-3.1-8b")
    found = table(decoder_rules(config), abstract_mesh(tensor=16), shapes_of(config))
    large = {row.pattern: (row.count, row.why) for row in found.rows if row.bytes_per_device == row.bytes > MIB}
    assert large == {r"layers(_\d+)?/attn/[kv]/kernel(/values|/scale)?": (64, "8 blocks of 128 over tensor=16")}


@pytest.mark.parametrize("name", ["llama-3.2-1b", "mixtral-8x7b"])
def test_the_committed_tables_are_those_of_today(name):
    committed = json.loads(experiment.RESULTS.read_text())["presets"]
    assert set(committed) == set(PRESETS)
    for mesh in experiment.MESHES:
        found = experiment.layout(name, mesh)
        assert committed[name][mesh]["bytes_per_device"] == found.bytes_per_device
        assert committed[name][mesh]["table"] == str(found).splitlines()


def test_every_parameter_of_a_decoder_with_everything_has_one_rule():
    rules = decoder_rules(BIASED)
    for tree in (
        shapes_of(BIASED),
        jax.eval_shape(lambda: init(BIASED, jax.random.key(0), router=SoftChoice(slots=2))),
    ):
        for mesh in MESHES.values():
            shardings(rules, mesh, tree)


def test_odd_sizes_fall_back_as_listed():
    got = specs(decoder_rules(BIASED), abstract_mesh(tensor=8), shapes_of(BIASED))
    assert got["embed/embedding"] == (None, "tensor"), "a vocabulary of 50257"
    assert got["layers_0/attn/k/kernel"] == (None, None), "2 key heads on 8"
    assert got["layers_0/attn/q/kernel"] == (None, None), "6 heads on 8, though 48 columns divide"
    assert got["layers_0/mlp/gate/kernel"] == (None, "tensor")
    assert got["layers_0/mlp/down/kernel"] == ("tensor", None)
    assert got["layers_0/mlp/gate/bias"] == ("tensor",)
    assert got["layers_1/moe/experts/gate"] == (None, None, "tensor")
    got = specs(decoder_rules(BIASED), abstract_mesh(expert=4, fsdp=2), shapes_of(BIASED))
    assert got["layers_1/moe/experts/gate"] == (None, ("fsdp", "expert"), None), "6 experts on 4"
    assert got["layers_1/moe/experts/down"] == (None, None, ("fsdp", "expert"))
    got = specs(decoder_rules(BIASED), abstract_mesh(expert=3, fsdp=2), shapes_of(BIASED))
    assert got["layers_1/moe/experts/down"] == ("expert", None, "fsdp")


def test_stacked_layers_lie_as_single_ones():
    config = preset("llama-3.2-1b")
    shapes, rules, mesh = shapes_of(config), decoder_rules(config), abstract_mesh(fsdp=2, tensor=4)
    stacked = jax.eval_shape(stack_layers, shapes)
    single, together = specs(rules, mesh, shapes), specs(rules, mesh, stacked)
    for name, spec in single.items():
        if name.startswith("layers_0/"):
            assert together[name.replace("layers_0", "layers")] == (None, *spec)
    assert table(rules, mesh, stacked).bytes_per_device == table(rules, mesh, shapes).bytes_per_device


# --- states, caches, batches


@pytest.mark.parametrize(
    "optimizer", [optax.adamw(0.1), optax.chain(optax.clip_by_global_norm(1.0), optax.sgd(0.1, momentum=0.9))]
)
def test_an_optimisers_state_lies_as_its_parameters(optimizer):
    config, mesh = preset("llama-3.2-1b"), abstract_mesh(fsdp=2, tensor=4)
    shapes = shapes_of(config)
    places = shardings(decoder_rules(config), mesh, shapes)
    state = jax.eval_shape(lambda: init_state(shapes, optimizer))
    found = paths(state_shardings(places, shapes, state))
    of = paths(places)
    checked = 0
    for name, place in found.items():
        parameter = next((p for p in of if name.endswith(f"/{p}")), None)
        assert place == of[parameter] if parameter else place.spec == P()
        checked += parameter is not None
    assert checked >= 2 * len(of)


def test_factored_moments_are_replicated_and_strangers_named():
    shapes, mesh = {"w": array(256, 512)}, abstract_mesh(fsdp=2)
    places = shardings((Rule("w", (("fsdp", None),)),), mesh, shapes)
    state = jax.eval_shape(optax.adafactor(0.1).init, shapes)
    assert {tuple(place.spec) for place in jax.tree.leaves(state_shardings(places, shapes, state))} == {()}
    for stranger in ({"moment": {"w": array(256, 5)}}, {"ema": array(3)}):
        with pytest.raises(InputError, match=r"state (moment/w|ema) \[.*\] belongs to no parameter"):
            state_shardings(places, shapes, stranger)


def test_what_routers_remember_is_laid_out_by_its_own_rule():
    """The tree of a training state: a bias belongs to no parameter, and only its rule lays it out."""
    mesh = abstract_mesh(fsdp=2, expert=2)
    config = DecoderConfig(
        vocab=64, width=32, ffn=64, layers=2, heads=4, kv_heads=2, head_dim=8, positions=16,
        moe=MoEConfig(experts=4, per_token=2, ffn=16),
    )  # fmt: skip
    router = TokenChoice(2, scores="sigmoid", bias_rate=0.1)
    params = jax.eval_shape(lambda: init(config, jax.random.key(0), router=router))
    places = shardings(decoder_rules(config), mesh, params)
    state = init_state(params, optax.adam(0.1), state=NextTokenLoss(config, router=router).init_state())
    with pytest.raises(InputError, match=r"state state/routers/layers_0/bias \[4\] belongs to no parameter"):
        state_shardings(places, params, state)
    laid = state_shardings(places, params, state, rules=ROUTER_STATES)
    assert laid.state["routers"]["layers_1"]["bias"].spec == P(None)
    assert laid.params == places and laid.opt_state[0].mu == places


def test_caches_are_cut_by_rows_and_key_heads_and_batches_by_rows():
    mesh = abstract_mesh(data=2, tensor=4)
    state = {"k": array(6, 8, 16, 4), "kept": array(6, 8, 16), "slots": array(6, 16), "seen": array(6)}
    rows = ("data", "fsdp", "expert")
    got = {name: tuple(place.spec) for name, place in cache_shardings(mesh, state).items()}
    assert got == {
        "k": (rows, "tensor", None, None),
        "kept": (rows, "tensor", None),
        "slots": (rows, None),
        "seen": (rows,),
    }
    odd = cache_shardings(mesh, {"k": array(3, 2, 16, 4)})
    assert tuple(odd["k"].spec)[1:] == (None, None, None), "2 heads on 4"
    assert odd["k"].shard_shape((3, 2, 16, 4)) == (3, 2, 16, 4)
    tokens = batch_shardings(abstract_mesh(data=2, fsdp=2), {"tokens": array(8, 5), "weight": array()})
    assert tokens["tokens"].shard_shape((8, 5)) == (2, 5) and tokens["weight"].spec == P()


def test_dots_over_tokens_keep_their_axes_on_a_mesh():
    """Merged, rows and positions would have to move between devices."""

    def ranks(mesh):
        with jax.sharding.use_abstract_mesh(mesh):
            jaxpr = jax.make_jaxpr(_token_dot)(array(2, 3, 4), array(4, 5)).jaxpr
        return [e.invars[0].aval.ndim for e in jaxpr.eqns if e.primitive.name == "dot_general"]

    assert ranks(abstract_mesh(data=2)) == [3]
    assert ranks(abstract_mesh()) == [2]


# --- eight devices


@pytest.fixture(scope="module")
def report():
    environment = {name: value for name, value in os.environ.items() if name not in ("XLA_FLAGS", "JAX_PLATFORMS")}
    program = Path(__file__).with_name("eight_devices.py")
    done = subprocess.run([sys.executable, str(program)], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout.splitlines()[-1])


ON_MESHES = (
    "tensor=8", "fsdp=8", "data=8", "data=2,fsdp=2,tensor=2", "data=2,expert=4", "fsdp=2,tensor=2,expert=2",
    "stacked, 6 rows",
)  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("name", ON_MESHES)
def test_a_mesh_equals_one_device(report, name):
    assert {key: report[name][key] <= 1e-5 for key in ("loss", "logits", "gradients")} == {
        "loss": True, "logits": True, "gradients": True,
    }, report[name]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("name", ON_MESHES)
def test_devices_hold_what_the_table_says(report, name):
    found = report[name]
    assert found["held"] == found["gradients held"] == found["table"]
    assert found["table"] == found["whole"] if name == "data=8" else found["table"] < 0.7 * found["whole"]


@pytest.mark.slow
def test_training_on_a_mesh_equals_one_device(report):
    found = report["train"]
    assert found["loss"] <= 1e-5
    assert found["held"] == 3 * found["table"] + 2 * 4, "parameters, two moments, two counts"


@pytest.mark.slow
@pytest.mark.parametrize(("name", "parts"), [("decode, tensor=4", (4, 1)), ("decode, data=2,tensor=4", (8, 2))])
def test_a_cache_lies_over_rows_and_heads_unasked(report, name, parts):
    found = report[name]
    assert found["logits"] <= 1e-5 and found["cache"] <= 1e-5
    assert found["as wanted"] == [True, True]
    buffers = found["whole"] - found["seen"]
    assert found["held"] == [buffers // parts[0] + found["seen"] // parts[1]] * 2
