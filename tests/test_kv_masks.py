"""A compressed cache equals a full one whose forgotten slots are masked, and padding changes nothing that is kept.

The oracle is plain softmax over every key that there was, of which each head of each layer sees those that the
compressed cache holds before the step, and the new one. Streaming with positions assigned anew reads keys that no
full cache holds: it has a simulator of its own in test_kv_decode.py, and takes part here only where padding does.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxfw.generate import engine
from jaxfw.kv import METHODS, parse
from jaxfw.kv.heads import Even
from jaxfw.kv.spec import AXES
from jaxfw.models import DecoderConfig, forward, init
from jaxfw.models.cache import Cache, FullCache
from pallas_kernels.packing import unpack
from pallas_kernels.ragged_decode import BLOCK, block_heads
from tests.cache_contract import FAST_TO_COMPILE, fast_to_compile

CONFIG = DecoderConfig(
    vocab=61, width=32, ffn=40, layers=3, heads=4, kv_heads=2, head_dim=8, positions=128, init_std=0.15
)
B, T, NEW, LENGTHS = 3, 48, 32, (48, 31, 17)
ROOM = T + NEW
ATOL = 5e-6
TEXT = np.random.default_rng(0).integers(0, CONFIG.vocab, (B, ROOM), np.int32)
KEYS = jax.random.split(jax.random.key(3), B)
# Units of six tokens; the last nine tokens of a prompt are a question.
UNITS = np.where(np.arange(T) < np.asarray(LENGTHS)[:, None] - 9, np.arange(T) // 6, -1)

POLICIES = (
    "streaming(reassign=false)@keep=0.3", "streaming(reassign=false,sinks=2)@budget=10", "random@keep=0.3",
    "knorm@keep=0.3", "keydiff@keep=0.3", "snapkv(w=4)@keep=0.3", "h2o@keep=0.3", "h2o@budget=12", "tova@keep=0.3",
    "pyramidkv(w=2,beta=5)@keep=0.3", "expected@keep=0.3", "chunkkv(w=4)@keep=0.3",
    "chunkkv(w=4,size=5,reuse=2)@keep=0.3", "chunkkv(w=4,size=5,rule=count)@keep=0.3", "lagkv(lag=8)@keep=0.3",
    "shotkv(w=8)@keep=0.5,rd=0.4", "shotkv(w=8,scope=global)@keep=0.5,rd=0.4", "randomshot@keep=0.5",
    "oracleshot@keep=0.5", "snapkv(w=4)@keep=0.3,decode=slide(window=6,recent=3)",
    "knorm@keep=0.3,decode=adaptive(recent=3,delta=4)", "knorm@keep=0.3,decode=discontinuous(recent=3,delta=4)",
    "critical(w=4)@keep=0.3", "adakv(w=4)@keep=0.3", "critical(w=4)@keep=0.3,heads=ada(floor=0.1),rd=0.4",
    "adakv(w=2)@keep=0.3,layers=pyramid(beta=5,w=2),decode=discontinuous(recent=3,delta=4)",
)  # fmt: skip
REASSIGNED = "streaming@keep=0.3"
PACKED = (
    "snapkv(w=4)@keep=0.3,kv=int8", "snapkv(w=4)@keep=0.3,kv=fp8(residual=3)",
    "knorm@keep=1,kv=kivi(bits=2,group=4,residual=3)",
    "shotkv(w=8)@keep=0.5,rd=0.4,kv=kivi(bits=4,group=8,residual=5)",
    "adakv(w=4)@keep=0.3,kv=kivi(bits=8,group=8,residual=4)",
)  # fmt: skip


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class MaskedState:
    """Every key and value that there was, and which of them a head may see."""

    k: jax.Array
    v: jax.Array
    visible: jax.Array
    seen: jax.Array


@dataclasses.dataclass(frozen=True)
class Masked:
    """A full cache with holes that are set from outside."""

    reads_previous = False

    def at(self, layer):
        return self

    def empty(self, batch, **options):
        full = FullCache().empty(batch, **options)
        return MaskedState(full.k, full.v, full.kept_positions >= 0, full.seen)

    def prefill(self, qkv, step, *, spec, room, previous=None):
        out, full = FullCache().prefill(qkv, step, spec=spec, room=room)
        return out, MaskedState(full.k, full.v, full.kept_positions >= 0, full.seen)

    def extend(self, state, qkv, step, *, spec, previous=None, shared=None, write=True):
        is_new = (jnp.arange(state.k.shape[2]) == step.positions)[:, None]
        k, v = (
            jnp.where(is_new[..., None], jnp.swapaxes(new, 1, 2), held)
            for new, held in ((qkv.k, state.k), (qkv.v, state.v))
        )
        (rows, _, heads, d), K = qkv.q.shape, spec.kv_heads
        q = qkv.q.reshape(rows, K, heads // K, d)
        logits = jnp.einsum("BKGd,BKSd->BKGS", q, k) * spec.scale
        weights = jax.nn.softmax(jnp.where((state.visible | is_new)[:, :, None], logits, -jnp.inf), axis=-1)
        out = jnp.einsum("BKGS,BKSd->BKGd", weights, v).reshape(rows, 1, heads, d)
        return out, MaskedState(k, v, state.visible, state.seen + step.lengths)

    def finish(self, states, step):
        return Cache(states)


@functools.cache
def params():
    """Queries are long, so that attention is sharp; logits are small, so that their rounding is."""
    scales = {"q": 3.0, "lm_head": 0.7}

    def scaled(path, x):
        return x * scales.get(next((key.key for key in path if key.key in scales), ""), 1.0)

    return jax.tree.map_with_path(scaled, jax.jit(init, static_argnums=0)(CONFIG, jax.random.key(0)))


def policy(text):
    return parse(text, layers=CONFIG.layers)


def prompts(junk=60, pad="right"):
    """[B T], with junk in the padding; left-padded rows are rolled to begin with their first token."""
    out = np.full((B, T), junk, np.int32)
    for row, source, n in zip(out, TEXT, LENGTHS):
        row[slice(None, n) if pad == "right" else slice(T - n, None)] = source[:n]
    if pad == "left":
        out = np.stack([np.roll(row, n - T) for row, n in zip(out, LENGTHS)])
    return out


def prefilled(policy, tokens, lengths, rows=slice(None)):
    width = tokens.shape[1]
    with fast_to_compile():
        return engine.prefill(
            CONFIG, params(), tokens, np.asarray(lengths, np.int32), policy=policy, room=width + NEW,
            unit_id=UNITS[rows, :width].astype(np.int32), key=KEYS[rows],
        )  # fmt: skip


@functools.cache
def of_full(policy):
    return prefilled(policy, prompts(), LENGTHS)


def slots_of(kept):
    """[B K S] positions -> [B K ROOM], whether each is held."""
    return jnp.any(kept[..., None] == jnp.arange(ROOM), axis=2)


@functools.partial(jax.jit, static_argnames="policy", compiler_options=FAST_TO_COMPILE)
def decoded(policy, weights, cache, masked, also_hidden):
    """Logits [NEW B V] of the compressed and of the masked cache, and positions that are held [NEW L B K ROOM].

    `also_hidden` [L B K ROOM] is masked besides, which no compressed cache knows of.
    """

    def one(carry, i):
        ours, oracle = carry
        at = jnp.asarray(LENGTHS) + i
        token = jnp.take_along_axis(jnp.asarray(TEXT), at[:, None], axis=1)
        held = [slots_of(state.kept_positions) for state in ours.layers]
        layers = tuple(
            dataclasses.replace(state, visible=visible & ~hidden)
            for state, visible, hidden in zip(oracle.layers, held, also_hidden)
        )
        a = forward(CONFIG, weights, token, policy=policy, cache=ours, key=KEYS)
        b = forward(CONFIG, weights, token, policy=Masked(), cache=Cache(layers), key=KEYS)
        return (a.cache, b.cache), (a.logits[:, 0], b.logits[:, 0], jnp.stack(held))

    return jax.lax.scan(one, (cache, masked), jnp.arange(NEW))[1]


def test_the_list_names_every_method_and_every_way_of_an_axis():
    made = [policy(text) for text in POLICIES]
    assert {text.partition("@")[0].partition("(")[0] for text in POLICIES} == set(METHODS)
    for axis, part in (("by", "granularity"), ("layers", "layer_budget"), ("heads", "heads"), ("decode", "decode")):
        assert {type(getattr(one, part, Even())) for one in made} == set(AXES[axis].values())


@pytest.mark.slow
def test_the_model_has_something_to_say_and_looks_at_few_tokens():
    out = jax.jit(forward, static_argnums=0)(CONFIG, params(), TEXT)
    assert np.asarray(out.logits).std() >= 0.5
    largest = []

    class Watching(Masked):
        def prefill(self, qkv, step, *, spec, **options):
            q = qkv.q[:, -1].reshape(B, spec.kv_heads, -1, spec.head_dim)
            weights = jax.nn.softmax(jnp.einsum("BKGd,BSKd->BKGS", q, qkv.k) * spec.scale, axis=-1)
            largest.append(np.asarray(weights).max(axis=-1))
            return super().prefill(qkv, step, spec=spec, **options)

    forward(CONFIG, params(), jnp.asarray(TEXT[:, :T]), policy=Watching(), room=ROOM)
    assert np.mean(largest) >= 0.25 > 10 / T, "a last query looks at one of 48 tokens most of all"


@pytest.mark.slow
@pytest.mark.parametrize("text", POLICIES)
def test_a_compressed_cache_is_a_full_one_with_holes(text):
    logits, cache = of_full(policy(text))
    expected, masked = of_full(Masked())
    assert np.array_equal(logits, expected), "the prompt itself is read in full"
    hidden = np.zeros((CONFIG.layers, B, CONFIG.kv_heads, ROOM), bool)
    ours, oracle, held = map(np.asarray, decoded(policy(text), params(), cache, masked, hidden))
    assert np.abs(ours - oracle).max() <= ATOL
    share = held[0].sum() / (CONFIG.layers * CONFIG.kv_heads * sum(LENGTHS))
    assert 0.1 < share < 0.75, "something was forgotten, something stays"
    if policy(text).decode.evicts:
        assert held[-1].sum() < held[0].sum() + (NEW - 1) * B * CONFIG.kv_heads * CONFIG.layers

    # One more slot in each row, of one head of one layer, is seen.
    for b in range(B):
        hidden[1, b, 0, np.flatnonzero(held[0, 1, b, 0])[-1]] = True
    _, other, _ = map(np.asarray, decoded(policy(text), params(), cache, masked, hidden))
    assert np.all(np.abs(ours[0] - other[0]).max(axis=-1) > 1e-4)


def rounded(masked, state):
    """A full cache with what a pool holds in place of the keys and values that it was made of."""
    (_, R, P), K = state.positions.shape, CONFIG.kv_heads
    owner = np.asarray(block_heads(state.start, R, P)).repeat(BLOCK, axis=2)
    found = {name: np.array(getattr(masked, name)) for name in ("k", "v")}
    for name, out in found.items():
        pool = np.asarray(unpack(getattr(state, name)))
        for b, r, slot in zip(*np.nonzero(np.asarray(state.positions) >= 0), strict=True):
            out[b, r * (K // R) + owner[b, r, slot], state.positions[b, r, slot]] = pool[b, r, slot]
    return dataclasses.replace(masked, **found)


@pytest.mark.slow
@pytest.mark.parametrize("text", PACKED)
def test_a_cache_in_few_bits_is_a_full_one_of_rounded_numbers(text):
    logits, cache = of_full(policy(text))
    expected, masked = of_full(Masked())
    assert np.array_equal(logits, expected), "the prompt itself is read in full width"
    near = Cache(tuple(map(rounded, masked.layers, cache.layers)))
    hidden = np.zeros((CONFIG.layers, B, CONFIG.kv_heads, ROOM), bool)
    ours, oracle, _ = map(np.asarray, decoded(policy(text), params(), cache, near, hidden))
    assert np.abs(ours - oracle).max() <= ATOL
    _, unrounded, _ = map(np.asarray, decoded(policy(text), params(), cache, masked, hidden))
    assert np.abs(ours - unrounded).max() > 1e-3, "rounding is seen"


@pytest.mark.slow
@pytest.mark.parametrize("text", [*POLICIES, REASSIGNED])
def test_neither_padding_nor_neighbours_change_what_is_kept(text):
    logits, cache = of_full(policy(text))
    for junk, pad in ((0, "right"), (7, "left")):
        other = prefilled(policy(text), prompts(junk, pad), LENGTHS)
        assert np.array_equal(other[0], logits)
        for a, b in zip(other[1].layers, cache.layers):
            assert np.array_equal(a.kept_positions, b.kept_positions)
            for name in ("k", "v"):  # slots without a token may hold anything
                held = np.asarray(getattr(a, "positions", a.kept_positions) >= 0)
                assert np.array_equal(np.asarray(getattr(a, name))[held], np.asarray(getattr(b, name))[held])
    for row in (1,):
        only = slice(row, row + 1)
        alone = prefilled(policy(text), TEXT[only, : LENGTHS[row]], LENGTHS[only], only)
        for a, b in zip(alone[1].layers, cache.layers):
            held, expected = (np.asarray(slots_of(x)[0]) for x in (a.kept_positions, b.kept_positions[row : row + 1]))
            assert np.array_equal(held, expected)
