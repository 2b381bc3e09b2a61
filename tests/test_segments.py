"""Rows of several documents: each is what it would be alone, in logits, loss and gradients, whatever is beside it."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.extend.core import jaxprs_in_params

from jaxfw.core.errors import InputError
from jaxfw.models import Collect, DecoderConfig, Edit, MoEConfig, Rope, forward, init, stack_layers
from jaxfw.models.cache import FullCache
from jaxfw.models.routing import Dense, ExpertChoice, Sorted
from jaxfw.ops import segments
from jaxfw.ops.attention import attend
from tests import numpy_decoder
from tests.numpy_attention import attention

# Two rows: documents of 5, 3 and 2 tokens with two of padding; of 1, 4 and 7 tokens.
LENGTHS = ((5, 3, 2), (1, 4, 7))
IDS = np.array([[1] * 5 + [2] * 3 + [3] * 2 + [0] * 2, [1] + [2] * 4 + [3] * 7], np.int32)
B, T = IDS.shape
BASE = DecoderConfig(vocab=19, width=16, ffn=12, layers=1, heads=4, kv_heads=2, head_dim=4, positions=16, init_std=0.4)
DYNAMIC = Rope(
    kind="dynamic", factor=3.0, original_positions=4
)  # documents of 5 and 7 tokens are stretched, each its way
CONFIGS = {
    "rope": BASE,
    "dynamic": dataclasses.replace(BASE, rope=DYNAMIC),
    "learned positions": dataclasses.replace(BASE, rope=None, learned_positions=True, norm="layer", gated=False),
    "window": dataclasses.replace(BASE, layers=2, window=3, full_attention=(1,)),
    "experts": dataclasses.replace(BASE, moe=MoEConfig(experts=3, per_token=2, ffn=6)),
}
EACH = pytest.mark.parametrize("name", CONFIGS)
TOKENS = np.random.default_rng(0).integers(0, BASE.vocab, (B, T), np.int32)
WEIGHTS = np.random.default_rng(1).normal(size=(B, T, BASE.vocab)).astype(np.float32)
compiled = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


def documents():
    """(number, row, first column, end) of each."""
    number = 0
    for b, lengths in enumerate(LENGTHS):
        at = 0
        for n in lengths:
            yield number, b, at, at + n
            at, number = at + n, number + 1


def alone():
    """Every document in a row of its own: tokens, weights of its logits, lengths."""
    tokens, weights = np.zeros((6, T), np.int32), np.zeros((6, T, BASE.vocab), np.float32)
    for number, b, first, end in documents():
        tokens[number, : end - first], weights[number, : end - first] = TOKENS[b, first:end], WEIGHTS[b, first:end]
    return tokens, weights, np.array(sum(LENGTHS, ()), np.int32)


def close(ours, theirs, tolerance=1e-5):
    """In units of the largest value."""
    ours, theirs = np.asarray(ours, np.float64), np.asarray(theirs, np.float64)
    assert np.abs(ours - theirs).max() <= tolerance * max(np.abs(theirs).max(), 1e-30)


@functools.cache
def params_of(name):
    fresh = compiled(init, static_argnums=0)(CONFIGS[name], jax.random.key(0))
    rng = np.random.default_rng(2)
    return jax.tree.map(lambda x: x + 0.05 * rng.standard_normal(x.shape).astype(x.dtype), fresh)


@functools.cache
def run(name):
    """`(params, tokens, weights, **rows) -> ((loss, (logits, router losses, loads)), gradients)`, compiled."""

    def loss(params, tokens, weights, **rows):
        out = forward(CONFIGS[name], params, tokens, **rows)
        balance = sum(jnp.sum(x) for x in out.losses.values())
        logits = jnp.where(weights != 0, out.logits, 0)
        return jnp.sum(logits * weights) + balance, (out.logits, out.losses, out.metrics)

    return compiled(jax.value_and_grad(loss, has_aux=True))


@functools.cache
def packed(name):
    weights = WEIGHTS * (IDS > 0)[..., None]
    return run(name)(params_of(name), TOKENS, weights, segment_ids=IDS)


@EACH
def test_a_document_is_what_it_is_alone(name):
    """Losses of routers too: padding counts in neither."""
    (loss, (logits, losses, metrics)), gradients = packed(name)
    tokens, weights, lengths = alone()
    (wanted, (wanted_logits, wanted_losses, wanted_metrics)), wanted_gradients = run(name)(
        params_of(name), tokens, weights, lengths=lengths
    )
    close(loss, wanted)
    jax.tree.map(close, (gradients, losses, metrics), (wanted_gradients, wanted_losses, wanted_metrics))
    for number, b, first, end in documents():
        close(logits[b, first:end], wanted_logits[number, : end - first])


@pytest.mark.parametrize("name", ["rope", "learned positions", "window", "experts"])
def test_documents_equal_numpy(name):
    config = CONFIGS[name]
    params64 = jax.tree.map(lambda x: np.asarray(x, np.float64), params_of(name))
    logits = packed(name)[0][1][0]
    tokens, _, lengths = alone()
    wanted = numpy_decoder.run(config, params64, tokens, lengths)
    for number, b, first, end in documents():
        close(logits[b, first:end], wanted[number, : end - first])


@pytest.mark.parametrize("name", ["window", "experts"])
def test_other_tokens_beside_a_document_change_nothing_at_all(name):
    """Not a bit, neither of its logits nor of what it gives the gradients."""
    seen, weights = slice(5, 8), np.zeros_like(WEIGHTS)
    weights[0, seen] = WEIGHTS[0, seen]
    other = TOKENS.copy()
    other[:] = (other + 1) % BASE.vocab
    other[0, seen] = TOKENS[0, seen]

    def program(params, tokens):
        def loss(params):
            logits = forward(
                CONFIGS[name], params, tokens, segment_ids=IDS, experts=Dense() if "x" in name else None
            ).logits
            return jnp.sum(logits * weights), logits

        return jax.grad(loss, has_aux=True)(params)

    program = compiled(program)
    (gradient, logits), (other_gradient, other_logits) = (program(params_of(name), x) for x in (TOKENS, other))
    np.testing.assert_array_equal(logits[0, seen], other_logits[0, seen])
    assert np.any(logits[0, :5] != other_logits[0, :5])
    jax.tree.map(np.testing.assert_array_equal, gradient, other_gradient)


@pytest.mark.parametrize("window", [None, 100])
def test_attention_in_blocks_equals_its_definition(window):
    """1100 tokens are 9 blocks; documents begin on a block's border, inside one, and span several."""
    rng, (T, H, K, d), scale = np.random.default_rng(0), (1100, 2, 1, 4), 0.5
    lengths = (128, 30, 400, 1, 541)
    ids = np.repeat(np.arange(1, 6, dtype=np.int32), lengths)[None]
    q, k, v = (rng.normal(size=(1, T, n, d)).astype(np.float32) * 2 for n in (H, K, K))
    keys, values = k.swapaxes(1, 2), v.swapaxes(1, 2)
    run = compiled(functools.partial(attend, scale=scale, window=window))
    out = run(q, keys, values, starts=segments.starts(jnp.asarray(ids)))
    at = np.arange(T)
    visible = (at <= at[:, None]) & (ids[0] == ids[0][:, None])
    if window:
        visible &= at > at[:, None] - window
    some = rng.choice(T, 60, replace=False)
    wanted = attention(q[0, some], keys[0], values[0], visible[None, some], scale)
    close(out[0, some], wanted)


def test_no_array_of_all_queries_and_keys():
    """Of 2048 tokens the largest array has a block's weights, [B K G T/8 S], forwards and backwards."""

    def loss(q, k, v, ids):
        return jnp.sum(attend(q, k, v, scale=1.0, starts=segments.starts(ids)))

    T = 2048
    q, k = jax.ShapeDtypeStruct((1, T, 1, 4), "float32"), jax.ShapeDtypeStruct((1, 1, T, 4), "float32")
    jaxpr = jax.make_jaxpr(jax.grad(loss, (0, 1, 2)))(q, k, k, jax.ShapeDtypeStruct((1, T), "int32"))

    def sizes(jaxpr):
        for eqn in jaxpr.eqns:
            yield from (x.aval.size for x in eqn.outvars)
            for inner in jaxprs_in_params(eqn.params):
                yield from sizes(inner)

    assert max(sizes(jaxpr.jaxpr)) == T * T // 8


def test_taps_see_documents():
    """Log-sum-exps equal those of documents alone; means leave out padding; positions, which repeat, are refused."""
    config, params = BASE, params_of("rope")
    taps = [Collect("attn/lse"), Collect("resid/out", reduce="mean")]
    got = compiled(lambda p: forward(config, p, TOKENS, segment_ids=IDS, taps=taps).taps)(params)
    tokens, _, lengths = alone()
    wanted = compiled(lambda p: forward(config, p, tokens, lengths=lengths, taps=taps).taps)(params)
    for number, b, first, end in documents():
        close(got[0][:, b, first:end], wanted[0][:, number, : end - first])
    jax.tree.map(close, got[1], wanted[1])
    pos = np.zeros((B, 1), np.int32)
    for tap in (Collect("embed", pos=pos), Edit("embed", 0.0, pos=pos)):
        with pytest.raises(InputError, match=r"taps\[0\].pos names true positions, which every document"):
            forward(config, params, TOKENS, segment_ids=IDS, taps=[tap])


def test_stacked_layers():
    name = "experts"
    logits = compiled(lambda p: forward(CONFIGS[name], p, TOKENS, segment_ids=IDS).logits)(
        stack_layers(params_of(name))
    )
    close(np.where(IDS[..., None], logits, 0), np.where(IDS[..., None], packed(name)[0][1][0], 0))


def test_padding_takes_no_room_of_an_expert():
    """With room for the valid tokens alone, what is dropped does not depend on how much padding there is."""
    name, experts = "experts", Sorted(capacity=0.7)
    padded = np.pad(IDS, ((0, 0), (0, 6)))
    more = np.pad(TOKENS, ((0, 0), (0, 6)), constant_values=3)
    run = compiled(lambda p, t, s: forward(CONFIGS[name], p, t, segment_ids=s, experts=experts).metrics["load"])
    np.testing.assert_array_equal(run(params_of(name), TOKENS, IDS), run(params_of(name), more, padded))
    assert np.sum(run(params_of(name), more, padded)) == CONFIGS[name].layers * 2 * np.sum(IDS > 0)


def test_what_does_not_go_with_documents_is_refused():
    config, params = BASE, params_of("rope")
    with pytest.raises(InputError, match=r"segment_ids cannot be given beside a cache .*Give each document a row"):
        forward(config, params, TOKENS, segment_ids=IDS, policy=FullCache())
    with pytest.raises(InputError, match=r"segment_ids is float64 of shape \[2, 12\]: give integers"):
        forward(config, params, TOKENS, segment_ids=IDS * 1.0)
    with pytest.raises(InputError, match=r"segment_ids is int32 of shape \[12\]"):
        forward(config, params, TOKENS, segment_ids=IDS[0])
    mixed = dataclasses.replace(config, moe=MoEConfig(3, 2, 6, allow_noncausal=True))
    with pytest.raises(InputError, match=r"ExpertChoice.* mixes the documents of a packed row"):
        forward(mixed, params_of("experts"), TOKENS, segment_ids=IDS, router=ExpertChoice())
    q = jnp.zeros((1, 2, 1, 4))
    with pytest.raises(InputError, match="positions and starts do not go together"):
        attend(
            q,
            q.swapaxes(1, 2),
            q.swapaxes(1, 2),
            scale=1.0,
            positions=jnp.zeros((1, 2), int),
            starts=jnp.zeros((1, 2), int),
        )


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(1, 6), min_size=1, max_size=6))
def test_starts_and_lengths_by_counting(lengths):
    row = [n for n, length in enumerate(lengths, 1) for _ in range(length)]
    row += [0] * (37 - len(row))
    ids = np.array([row], np.int32)
    assert segments.starts(ids)[0].tolist() == [row.index(n) for n in row]
    assert segments.document_lengths(ids)[0].tolist() == [row.count(n) for n in row]
