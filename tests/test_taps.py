"""Taps: every edit and collection that the table lists, against a float64 decoder in numpy; and what is refused."""

import dataclasses
import functools
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxfw.core.errors import InputError
from jaxfw.models import Collect, Edit, Moment, embed, first_step, forward, layer, trunk
from jaxfw.models.cache import FullCache
from jaxfw.models.routing import ExpertChoice
from jaxfw.models.taps import EDITS, SITES, Sites, empty, validate
from tests.taps_program import (
    DENSE,
    EXPERTS,
    LENGTHS,
    MIXED,
    TOKENS,
    VALID,
    WEIGHTS,
    B,
    P,
    T,
    all_collects,
    as_dicts,
    close,
    compiled,
    every_edit,
    loss,
    numpy_collected,
    numpy_logits,
    numpy_loss,
    numpy_values,
    one_at_a_time,
    params_of,
    stacked,
    without_padding,
)  # fmt: skip

ROOT = Path(__file__).parents[1]


@functools.partial(compiled, static_argnums=0)
def run(config, params, tokens, lengths, taps):
    return forward(config, params, tokens, lengths=lengths, taps=taps)


def run_tapped(config, taps, tokens=TOKENS, lengths=LENGTHS):
    out = run(config, params_of(config), tokens, lengths, taps)
    valid = np.arange(tokens.shape[1]) < np.asarray(lengths)[:, None]
    return np.where(valid[..., None], out.logits, 0), jax.device_get(out.taps)


# --- collecting


def test_everything_that_can_be_collected_equals_numpy():
    """Every site and reduction, two batches and their sum; values where a token is padding mean nothing."""
    collects = all_collects(MIXED)
    assert {tap.site for tap in collects} == set(SITES)
    batches = [(TOKENS, LENGTHS), ((TOKENS + 3) % DENSE.vocab, np.array([2, 5], np.int32))]
    moments = []
    for tokens, lengths in batches:
        _, taps = run_tapped(MIXED, collects, tokens, lengths)
        expected = numpy_collected(MIXED, collects, [(tokens, lengths)])
        assert jax.tree.map(np.shape, taps) == tuple(jax.tree.map(np.shape, expected))
        jax.tree.map(close, without_padding(collects, taps, lengths), expected)
        kinds = {
            str(x.dtype) for tap, x in zip(collects, taps, strict=True) if not tap.reduce and tap.site == "moe/ids"
        }
        assert kinds == {"int32"}
        moments.append([x for tap, x in zip(collects, taps, strict=True) if tap.reduce])
    together = [one + two for one, two in zip(*moments, strict=True)]
    of_both = numpy_collected(MIXED, collects, batches)
    jax.tree.map(close, together, [x for tap, x in zip(collects, of_both, strict=True) if tap.reduce])


def test_statistics_are_float32_and_within_the_window():
    config = dataclasses.replace(DENSE, window=3)
    _, (lse, heads) = run_tapped(config, [Collect("attn/lse"), Collect("attn/head_out", layers=(0, 0))])
    values = numpy_values(config)
    for i in range(config.layers):
        close(lse[i][VALID], values["attn/lse"][i][VALID])
    close(heads[0][VALID], values["attn/head_out"][0][VALID])
    half, taps = (
        dataclasses.replace(MIXED, dtype="bfloat16"),
        [Collect("attn/lse"), Collect("moe/probs"), Collect("embed")],
    )
    out = jax.eval_shape(lambda p: forward(half, p, TOKENS, taps=taps).taps, params_of(MIXED))
    assert [str(x.dtype) for x in out] == ["float32", "float32", "bfloat16"]


def test_moments_of_empty_batches_add_nothing():
    some, none = Moment(jnp.full((2, 3), 4.0), jnp.array([2.0, 0.0])), Moment(jnp.full((2, 3), 7.0), jnp.zeros(2))
    np.testing.assert_array_equal((some + none).value[0], some.value[0])
    np.testing.assert_array_equal((none + some).count, [2, 0])


def test_half_precision_reductions_are_float32_and_padding_may_hold_anything():
    x = jnp.asarray(np.random.default_rng(0).normal(size=(1, B, T, 16)) + 3, jnp.bfloat16)[0]
    x = jnp.where(VALID[..., None], x, jnp.inf)
    step = first_step(jnp.asarray(LENGTHS), T)
    taps = (Collect("final", reduce="mean"), Collect("final", reduce="second_moment"))
    config = dataclasses.replace(DENSE, dtype="bfloat16")
    sites = Sites(taps, step, empty(config, taps, B, T))
    sites("final", x)
    rows = np.asarray(x, np.float64)[VALID]
    close(sites.collected[0].value, rows.mean(axis=0), 1e-6)
    close(sites.collected[1].value, rows.T @ rows / len(rows), 1e-6)


# --- editing: every site and operation


def test_every_edit_equals_numpy():
    """Under jit and vmap, one program for all, mapped over which is at work; each moves the loss.

    Their gradients: tests/test_stacked.py.
    """
    params, alone = params_of(MIXED), one_at_a_time(MIXED)
    editable = [name for name, site in SITES.items() if site.can_edit]
    assert [(e.site, e.op) for e in alone[0]] == [(site, op) for site in editable for op in EDITS]
    losses = np.asarray(compiled(jax.vmap(lambda taps: loss(MIXED, params, taps)))(stacked(alone)))
    plain = numpy_loss(MIXED)
    for n, (edits, got) in enumerate(zip(alone, losses, strict=True)):
        expected = numpy_loss(MIXED, as_dicts(edits))
        assert abs(expected - plain) > 1e-2, edits[n]
        assert abs(got - expected) < 1e-4, (edits[n].site, edits[n].op, got, expected)


@functools.partial(compiled, static_argnums=0)
def logits_of_edits(config, params, taps):
    return forward(config, params, TOKENS, lengths=LENGTHS, taps=taps).logits


@st.composite
def some_edits(draw):
    """One to three edits with random layers, rows, positions (some twice, some beyond the row) and values."""
    edits = list(every_edit(MIXED))
    for n in draw(st.lists(st.integers(0, len(edits) - 1), min_size=1, max_size=3, unique=True)):
        positions = draw(st.lists(st.integers(-1, T), min_size=B * P, max_size=B * P))
        change = {
            "pos": np.array(positions, np.int32).reshape(B, P),
            "rows": np.array(draw(st.lists(st.booleans(), min_size=B, max_size=B))),
            "value": edits[n].value * np.float32(draw(st.sampled_from([-1.5, 0.0, 0.5, 1.0]))),
        }
        if edits[n].layers is not None:
            change["layers"] = tuple(np.int32(draw(st.integers(0, 1))) for _ in range(2))  # the last may be first: none
        edits[n] = dataclasses.replace(edits[n], **change)
    return tuple(edits)


@settings(max_examples=60, deadline=None, derandomize=True, database=None)
@given(some_edits())
def test_edits_at_random_places_equal_numpy(edits):
    got = logits_of_edits(MIXED, params_of(MIXED), edits)
    close(np.where(VALID[..., None], got, 0), numpy_logits(MIXED, as_dicts(edits)), 5e-5)


SECOND_ROW = np.array([False, True])


# --- the other forms of edits, and their order


def test_values_broadcast_and_what_is_left_out_means_all():
    rng = np.random.default_rng(5)
    forms = [
        {"site": "embed", "op": "add", "value": rng.normal(size=(B, 1, 16))},
        {"site": "resid/in", "op": "add", "value": rng.normal(size=16), "layers": (1, 1)},
        {"site": "attn/v", "op": "lerp", "value": rng.normal(size=(2, 1)), "weight": 0.3, "rows": SECOND_ROW},
        {"site": "attn/head_out", "op": "scale", "value": np.array([[1.0], [0.0], [0.5], [2.0]]), "layers": (0, 0)},
        {"site": "mlp/out", "op": "scale", "value": 0.25},
        {"site": "final", "op": "set", "value": rng.normal(size=(T, 16)), "rows": ~SECOND_ROW},
        {"site": "resid/out", "op": "add", "value": rng.normal(size=(P, 1)), "pos": np.array([[5, -1], [0, 2]])},
    ]
    taps = []
    for form in forms:
        value = np.asarray(form["value"], np.float32)
        taps.append(Edit(**{**form, "value": value}))
    logits, collected = run_tapped(
        MIXED, [Collect("final"), *taps, Collect("final"), Collect("mlp/out", layers=(1, 1))]
    )
    close(logits, numpy_logits(MIXED, forms))
    behind = numpy_values(MIXED, forms)
    before = numpy_values(MIXED, [form for form in forms if form["site"] != "final"])
    assert len(collected) == 3 and collected[2].shape == (1, B, T, 16)
    close(collected[0][VALID], before["final"][None][VALID])
    close(collected[1][VALID], behind["final"][None][VALID])
    close(collected[2][0][VALID], behind["mlp/out"][1][VALID])
    assert np.any(behind["final"][None] != before["final"][None])


def test_edits_at_one_site_act_in_their_order():
    add, scale = Edit("resid/mid", jnp.ones(16), "add"), Edit("resid/mid", jnp.float32(2), "scale")
    step = first_step(jnp.asarray(LENGTHS), T)
    x = jnp.ones((B, T, 16))
    np.testing.assert_array_equal(Sites((add, scale), step)("resid/mid", x), 4 * x)
    np.testing.assert_array_equal(Sites((scale, add), step)("resid/mid", x), 3 * x)
    np.testing.assert_array_equal(Sites((add, scale), step)("resid/out", x), x)


def test_an_edit_keeps_the_compute_dtype():
    x = jnp.ones((B, T, 16), jnp.bfloat16)
    for op in EDITS:
        weight = jnp.float32(0.5) if op == "lerp" else None
        edit = Edit("resid/mid", jnp.full(16, 1.5, jnp.float32), op, weight=weight)
        assert Sites((edit,), first_step(jnp.asarray(LENGTHS), T))("resid/mid", x).dtype == jnp.bfloat16


# --- gradients by example and by head


def test_gradients_by_head_and_by_example():
    """A scale of 1 on each head; a zero added to each row: vmapped over examples, and row by row."""
    config, params = DENSE, params_of(DENSE)

    def objective(scale, add, tokens, length, weights):
        heads = [Edit("attn/head_out", scale[i], "scale", layers=(i, i)) for i in range(config.layers)]
        taps = [*heads, Edit("resid/mid", add, "add", layers=(0, 0))]
        out = forward(config, params, tokens[None], lengths=length[None], taps=taps)
        return jnp.sum(out.logits[0] * weights)

    inputs = jnp.ones((2, 4, 1)), jnp.zeros(16)
    rows = jnp.asarray(TOKENS), jnp.asarray(LENGTHS), jnp.asarray(WEIGHTS, jnp.float32)
    gradient = jax.grad(objective, (0, 1))
    of_heads, of_added = compiled(jax.vmap(gradient, (None, None, 0, 0, 0)))(*inputs, *rows)
    by_row = compiled(gradient)
    for b in range(B):
        alone = by_row(*inputs, *(x[b] for x in rows))
        close(of_heads[b], alone[0])
        close(of_added[b], alone[1])
    step = 1e-5
    for i, h in np.ndindex(2, 4):
        sides = []
        for sign in (1, -1):
            scale = np.ones((4, 1))
            scale[h] += sign * step
            edit = {"site": "attn/head_out", "op": "scale", "value": scale, "layers": (i, i)}
            sides.append(np.sum(numpy_logits(config, [edit]) * WEIGHTS, axis=(1, 2)))
        close(of_heads[:, i, h, 0], (sides[0] - sides[1]) / (2 * step), 1e-4)


# --- by parts, and while decoding


def test_one_trace_for_each_kind_of_layer():
    """Whatever the number of layers, and the values, positions, rows and layers of taps."""
    traces = []

    def counted(config, params, x, step, **options):
        traces.append("moe" in params)
        return layer(config, params, x, step, **options)

    config = dataclasses.replace(MIXED, layers=4, moe=dataclasses.replace(MIXED.moe, every=2))
    params = {**params_of(MIXED), "layers_2": params_of(MIXED)["layers_0"], "layers_3": params_of(MIXED)["layers_1"]}
    run_layer = compiled(counted, static_argnames=("config", "policy", "room", "write", "router", "experts"))
    step, x = first_step(jnp.asarray(LENGTHS), T), embed(config, params, TOKENS)
    rng, outs = np.random.default_rng(0), []
    for first, last in ((0, 3), (1, 1), (2, 3)):
        taps = (
            Edit("resid/mid", jnp.asarray(rng.normal(size=16), jnp.float32), "add", layers=(first, last)),
            Edit("attn/v", jnp.float32(0), "scale", pos=rng.integers(-1, T, (B, P)), rows=np.array([first > 0, True])),
        )
        taps += (Collect("resid/out"), Collect("resid/out", layers=(1, 2)))
        held = empty(config, taps, B, T)
        out = trunk(config, params, x, step, taps=taps, collected=held, run_layer=run_layer)
        everywhere, between = out.collected
        np.testing.assert_array_equal(between, everywhere[1:3])
        np.testing.assert_array_equal(out.x, everywhere[3])
        outs.append(np.asarray(out.x))
    assert sorted(traces) == [False, True]
    assert np.abs(outs[0] - outs[1]).max() > 0.1


def test_positions_are_true_ones_while_decoding():
    """A prompt, then token by token under a cache: edits and collections act where they would in one go."""
    policy, config, params = FullCache(), DENSE, params_of(DENSE)
    rng = np.random.default_rng(6)
    pos = np.array([[1, 4], [3, -1]], np.int32)
    edits = [
        {"site": "resid/in", "op": "add", "value": rng.normal(size=(B, P, 16)), "pos": pos, "layers": (1, 1)},
        {"site": "attn/k", "op": "set", "value": rng.normal(size=(B, P, 2, 4)), "pos": pos},
    ]
    collect = Collect("resid/out", pos=np.array([[0, 5, 4], [3, -1, 1]], np.int32))
    taps = [*(Edit(**{**edit, "value": edit["value"].astype(np.float32)}) for edit in edits), collect]

    @compiled
    def extend(tokens, lengths, cache, taps):
        return forward(config, params, tokens, lengths=lengths, policy=policy, cache=cache, room=T, taps=taps)

    prompt = np.array([4, 2], np.int32)
    out = extend(TOKENS[:, :4], prompt, None, taps)
    logits, collected = [np.asarray(out.logits)[b, :n] for b, n in enumerate(prompt)], [np.asarray(out.taps[0])]
    for _ in range(2):
        at = np.asarray(out.cache.seen)
        out = extend(TOKENS[np.arange(B), at][:, None], np.array([1, 1], np.int32), out.cache, taps)
        logits = [np.concatenate([rows, np.asarray(out.logits)[b]]) for b, rows in enumerate(logits)]
        collected.append(np.asarray(out.taps[0]))
    expected, values = numpy_logits(config, edits), numpy_values(config, edits)["resid/out"]
    for b, length in enumerate(LENGTHS):
        close(logits[b], expected[b, :length])
    total = np.sum(collected, axis=0)  # where a position is not among a call's tokens, that call has zeros
    assert total.shape == (2, B, 3, 16)
    for i, b, p in np.ndindex(2, B, 3):
        position = collect.pos[b, p]
        close(total[i, b, p], values[i][b, position] if position >= 0 else np.zeros(16))


# --- on a mesh

ON_A_MESH = """
import jax, numpy as np
from jaxfw.core.mesh import make_mesh
from jaxfw.core.sharding import shardings
from jaxfw.models import Edit, forward
from jaxfw.models.sharding import decoder_rules
from tests.taps_program import *

def run(params, settings, scale):
    losses = jax.vmap(lambda taps: loss(MIXED, params, taps))(settings)
    taps = forward(MIXED, params, TOKENS, lengths=LENGTHS, taps=collects).taps
    return losses, taps, jax.grad(lambda x: loss(MIXED, params, (Edit("attn/head_out", x, "scale"),)))(scale)

alone, collects, params = one_at_a_time(MIXED), all_collects(MIXED), params_of(MIXED)
mesh = make_mesh(data=2, tensor=2, devices=jax.devices()[:4])
placed = jax.device_put(params, shardings(decoder_rules(MIXED), mesh, params))
query = placed["layers_0"]["attn"]["q"]["kernel"]
assert query.addressable_shards[0].data.size * 2 == query.size
with jax.set_mesh(mesh):
    losses, taps, gradient = jax.device_get(compiled(run)(placed, stacked(alone), np.ones((4, 1), np.float32)))
for n, edits in enumerate(alone):
    assert abs(losses[n] - numpy_loss(MIXED, as_dicts(edits))) < 1e-4, (edits[n].site, edits[n].op)
expected = numpy_collected(MIXED, collects, [(TOKENS, LENGTHS)])
jax.tree.map(close, without_padding(collects, taps), expected)
scale_by = {"site": "attn/head_out", "op": "scale"}
sides = [
    [numpy_loss(MIXED, [{**scale_by, "value": 1 + way * np.eye(4)[h][:, None]}]) for h in range(4)]
    for way in (1e-5, -1e-5)
]
close(gradient[:, 0], (np.array(sides[0]) - sides[1]) / 2e-5, 1e-4)
print("equal on", len(alone), "edits and", len(collects), "collections")
"""


def test_on_a_mesh_of_data_and_tensor():
    """Every edit and collection where rows, heads and feed-forward are cut in two."""
    environment = {**os.environ, "XLA_FLAGS": "--xla_force_host_platform_device_count=8", "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(
        [sys.executable, "-c", ON_A_MESH], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "equal on 64 edits and 55 collections" in done.stdout


# --- what is refused


def edit(site="resid/in", value=None, **fields):
    return Edit(site, jnp.zeros(16) if value is None else value, **fields)


@pytest.mark.parametrize(
    "config, tap, message",
    [
        (DENSE, "resid/in", r"taps\[0\]='resid/in' must be an Edit or a Collect"),
        (DENSE, Collect("resid_pre"), r"taps\[0\].site='resid_pre' is unknown. Known: embed, resid/in.*"),
        (DENSE, edit("attn/head_outs"), "Did you mean 'attn/head_out'"),
        (DENSE, edit(op="replace"), r"taps\[0\].op='replace' is unknown. Known: set, add, scale, lerp"),
        (DENSE, edit("attn/lse", op="add"), r"'attn/lse' can only be collected, not edited \(op='add'\)"),
        (MIXED, edit("moe/probs"), "'moe/probs' can only be collected"),
        (MIXED, edit("moe/ids", op="scale"), "'moe/ids' can only be collected"),
        (DENSE, edit(value=jnp.zeros(12)), r"value has shape \[12\], which does not broadcast to \[B T D\] = \[2, 6"),
        (DENSE, edit(value=jnp.zeros((3, 1, 16))), r"does not broadcast to \[B T D\]"),
        (DENSE, edit("attn/k", jnp.zeros((4, 4))), r"does not broadcast to \[B T K d\] = \[2, 6, 2, 4\] of 'attn/k'"),
        (DENSE, edit(value=jnp.zeros((B, T, 16)), pos=jnp.zeros((B, P), int)), r"to \[B P D\] = \[2, 2, 16\]"),
        (DENSE, edit(op="lerp"), "op='lerp' and weight= go together; got op='lerp', weight=None"),
        (DENSE, edit(weight=0.5), "op='lerp' and weight= go together; got op='set', weight=0.5"),
        (DENSE, edit(op="lerp", weight=jnp.zeros(3)), r"weight has shape \[3\], which does not broadcast"),
        (DENSE, edit(layers=(0, 2)), r"layers=\(0, 2\) must be \(first, last\) within 0..1"),
        (DENSE, edit(layers=(1, 0)), r"layers=\(1, 0\) must be \(first, last\) within 0..1"),
        (DENSE, edit(layers=(1,)), r"layers=\(1,\) must be \(first, last\), both included"),
        (DENSE, edit("embed", layers=(0, 0)), "'embed' is outside of the layers; leave layers out"),
        (DENSE, Collect("final", layers=(0, 0)), "'final' is outside of the layers"),
        (DENSE, Collect("resid/in", layers=(np.zeros(()), 1)), "of a Collect are static: give two whole numbers"),
        (DENSE, Collect("resid/in", reduce="max"), "reduce='max' is not possible at 'resid/in': it takes None, 'mean'"),
        (MIXED, Collect("moe/ids", reduce="mean"), "reduce='mean' is not possible at 'moe/ids': it takes None"),
        (DENSE, Collect("moe/probs"), r"no layer of 0..1 has 'moe/probs', since none has experts"),
        (EXPERTS, Collect("mlp/key"), r"no layer of 0..1 has 'mlp/key', since none has a dense feed-forward"),
        (MIXED, Collect("moe/probs", layers=(0, 0)), r"no layer of 0..0 has 'moe/probs'"),
        (DENSE, edit(pos=jnp.zeros(B, int)), r"pos is int32 of shape \[2\]: give \[B P\] = \[2, P\] true positions"),
        (DENSE, edit(pos=jnp.zeros((3, P), int)), r"pos is int32 of shape \[3, 2\]: give \[B P\]"),
        (DENSE, Collect("resid/in", pos=jnp.zeros((B, P))), r"pos is float32 of shape \[2, 2\]: give \[B P\]"),
        (DENSE, Collect("resid/in", pos=[[0], [1]]), r"pos=\[\[0\], \[1\]\] must be an array"),
        (DENSE, edit(rows=jnp.ones(3, bool)), r"rows is bool of shape \[3\]: give one boolean for each of 2 rows"),
        (DENSE, edit(rows=jnp.array([0, 1])), r"rows is int32 of shape \[2\]: give one boolean for each"),
    ],
)  # fmt: skip
def test_what_means_nothing_is_refused(config, tap, message):
    with pytest.raises(InputError, match=message):
        forward(config, {}, TOKENS, taps=(tap,))


def test_what_a_call_cannot_give_is_refused():
    config = dataclasses.replace(EXPERTS, moe=dataclasses.replace(EXPERTS.moe, allow_noncausal=True))
    params = params_of(EXPERTS)
    with pytest.raises(InputError, match="'moe/ids' needs a router by which tokens choose: ExpertChoice"):
        jax.eval_shape(
            lambda p: forward(config, p, TOKENS, router=ExpertChoice(1.0), taps=[Collect("moe/ids")]).logits, params
        )
    params = params_of(DENSE)
    with pytest.raises(InputError, match="'attn/lse' cannot be collected beside a cache"):
        jax.eval_shape(
            lambda p: forward(DENSE, p, TOKENS, policy=FullCache(), taps=[Collect("attn/lse")]).logits, params
        )


def test_traced_layers_are_taken_as_they_come():
    """What only the device knows cannot be refused: a range without a layer edits none."""
    validate(DENSE, [edit(layers=(jnp.int32(5), jnp.int32(9)))], B, T)
