"""What every cache policy must hold to, as tests that a policy inherits.

    class TestMine(CacheContract):
        policy = Mine()

What the policy returns is compared with the forward without a cache of the model `reference`, which may have a window.
A policy that forgets or rounds otherwise sets `is_exact = False`: then that comparison is left out, and all the rest
still holds. One that rounds also sets `atol`: where a sum falls on the edge between two steps, its order decides.
"""

import contextlib
import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxfw.core.keys import fold
from jaxfw.generate import engine
from jaxfw.models import DecoderConfig, attention_spec, forward, init
from jaxfw.models.cache import Cache, CachePolicy

CONFIG = DecoderConfig(
    vocab=61, width=24, ffn=40, layers=2, heads=6, kv_heads=2, head_dim=8, positions=128, init_std=0.3
)
SPEC = attention_spec(CONFIG)
LENGTHS = (9, 4, 1)
B, T, ROOM = len(LENGTHS), engine.SHORTEST_BUCKET, 48
PIECE = 5  # an extension by more than one token is padded to this width: one compiled program for all
NEW = 12  # tokens that are generated
ATOL = 2e-5  # logits here have a deviation of 1 to 2; their sums may run in another order
NEAR_TIE = 1e-4  # two logits this close, in deviations of all logits, may change places with the order of a sum


@functools.cache
def params() -> Any:
    return jax.jit(init, static_argnums=0)(CONFIG, jax.random.key(0))


@functools.cache
def text() -> np.ndarray:
    """[B ROOM]: prompts and what follows them."""
    return np.random.default_rng(0).integers(0, CONFIG.vocab, (B, ROOM), np.int32)


@functools.cache
def keys() -> jax.Array:
    """A random key a row."""
    return jax.random.split(jax.random.key(1), B)


@functools.cache
def logits_of_text(reference: DecoderConfig = CONFIG) -> np.ndarray:
    """[B ROOM V]: of one forward without a cache."""
    return np.asarray(jax.jit(forward, static_argnums=0)(reference, params(), jnp.asarray(text())).logits)


def cut(starts, lengths, width, rows=range(B), junk=CONFIG.vocab - 1) -> np.ndarray:
    """[B width]: `lengths[b]` tokens of row `rows[b]` of `text` from `starts[b]` on; what is behind them is junk."""
    out = np.full((len(lengths), width), junk, np.int32)
    for row, source, start, length in zip(out, rows, starts, lengths):
        row[:length] = text()[source, start : start + length]
    return out


# Compiling is most of what these tests take, and compiles fastest unoptimised.
FAST_TO_COMPILE = {"xla_backend_optimization_level": 0}


@contextlib.contextmanager
def fast_to_compile():
    """The same for programs that are jitted elsewhere."""
    jax.config.update("jax_disable_most_optimizations", True)
    try:
        yield
    finally:
        jax.config.update("jax_disable_most_optimizations", False)


def units_of(lengths, width):
    """Units of four tokens, and a question of two: for policies that keep whole units of a prompt."""
    at = jnp.arange(width)
    return jnp.where(at < jnp.asarray(lengths)[:, None] - 2, at // 4, -1)


traced: list[CachePolicy] = []  # the policies that `run` was traced with


@functools.partial(jax.jit, static_argnames=("config", "policy", "room", "write"), compiler_options=FAST_TO_COMPILE)
def run(config, policy, params, tokens, lengths, keys, cache=None, *, room=ROOM, write=True):
    traced.append(policy)
    units = units_of(lengths, tokens.shape[1]) if cache is None else None
    return forward(
        config, params, tokens, lengths=lengths, policy=policy, cache=cache, room=room, write=write, key=keys,
        unit_id=units,
    )  # fmt: skip


def forms(tree):
    """Tree, shapes and dtypes."""
    return jax.tree.map(lambda x: (x.shape, x.dtype), tree)


def assert_same(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    jax.tree.map(np.testing.assert_array_equal, a, b)


class CacheContract:
    """Drives `policy` through a tiny decoder with grouped heads, on three rows of unequal lengths."""

    policy: CachePolicy
    is_exact = True
    reference = CONFIG
    atol = ATOL

    def assert_close(self, a, b):
        np.testing.assert_allclose(np.asarray(a), np.asarray(b), atol=self.atol, rtol=0)

    def prefilled(self, config=CONFIG, keys_of=keys):
        tokens, lengths = cut((0, 0, 0), LENGTHS, T), jnp.asarray(LENGTHS, jnp.int32)
        return run(config, self.policy, params(), tokens, lengths, keys_of())

    def extended(self, cache, starts, lengths, rows=range(B), *, junk=CONFIG.vocab - 1, write=True):
        tokens = cut(starts, lengths, 1 if max(lengths) == 1 else PIECE, rows, junk)
        drawn = keys()[jnp.asarray(rows)]
        return run(CONFIG, self.policy, params(), tokens, jnp.asarray(lengths, jnp.int32), drawn, cache, write=write)

    def empty(self, room, dtype=jnp.float32):
        options: Any = {"spec": SPEC, "prompt": T, "new": room - T, "dtype": dtype}
        return Cache(tuple(self.policy.at(i).empty(B, **options) for i in range(CONFIG.layers)))

    def answer(self, cache):
        """What a cache says to the same three tokens in every row: tells caches apart by use."""
        n = cache.seen.shape[0]
        return self.extended(cache, [ROOM - 3] * n, [3] * n, rows=[0] * n).logits[:, :3]

    # --- what is known before anything runs

    def test_the_policy_is_a_static_value(self):
        twin = dataclasses.replace(self.policy)
        assert twin == self.policy and hash(twin) == hash(self.policy)
        assert jax.tree.leaves(self.policy) == [self.policy], "a policy is no pytree: it holds no arrays"
        for i in range(CONFIG.layers):
            assert self.policy.at(i) == self.policy.at(i) and isinstance(hash(self.policy.at(i)), int)

    def test_an_equal_policy_is_not_traced_again(self):
        cache = self.prefilled().cache
        self.extended(cache, LENGTHS, (1, 1, 1))
        count, twin = len(traced), type(self)()
        twin.policy = dataclasses.replace(self.policy)
        twin.extended(twin.prefilled().cache, LENGTHS, (1, 1, 1))
        assert len(traced) == count

    def forward_abstractly(self, config, width, cache=None):
        call = functools.partial(forward, config, policy=self.policy, room=ROOM)
        call = functools.partial(call, unit_id=jnp.zeros((B, width), jnp.int32))
        lengths, tokens = jnp.ones(B, jnp.int32), jnp.zeros((B, width), jnp.int32)
        return jax.eval_shape(call, params(), tokens, lengths=lengths, cache=cache, key=keys()).cache

    def test_bytes_are_predicted_by_eval_shape(self):
        predictions = self.forward_abstractly(CONFIG, T), jax.eval_shape(lambda: self.empty(ROOM))
        for predicted, held in zip(predictions, (self.prefilled().cache, self.empty(ROOM))):
            assert predicted.nbytes == held.nbytes == sum(x.nbytes for x in jax.tree.leaves(held)) > 0
            assert forms(predicted) == forms(held)

    def test_arrays_lead_with_the_batch_and_then_the_key_heads(self):
        for cache in (self.forward_abstractly(CONFIG, T), jax.eval_shape(lambda: self.empty(ROOM))):
            for leaf in jax.tree.leaves(cache.layers):
                assert leaf.shape[:1] == (B,), f"{leaf.shape} does not lead with the batch axis: rows cannot be taken"
                assert leaf.ndim < 3 or leaf.shape[1] == CONFIG.kv_heads, f"{leaf.shape}: key heads come second"

    # --- a loop can carry the state

    def test_extend_keeps_tree_shapes_and_dtypes(self):
        for config in (CONFIG, dataclasses.replace(CONFIG, dtype="bfloat16")):
            cache = self.forward_abstractly(config, T)
            empty = jax.eval_shape(functools.partial(self.empty, ROOM, jnp.dtype(config.dtype)))
            assert forms(cache.layers) == forms(empty.layers), "a prompt leaves what `empty` foretells"
            for width in (1, PIECE):
                assert forms(self.forward_abstractly(config, width, cache)) == forms(cache)

    def test_a_loop_with_a_donated_state_equals_steps_from_outside(self):
        tokens, weights = jnp.asarray(text()), params()

        @functools.partial(jax.jit, donate_argnames="cache", compiler_options=FAST_TO_COMPILE)
        def loop(cache, steps):
            def advance(i, carry):
                column = jax.lax.dynamic_slice_in_dim(tokens, i, 1, axis=1)
                out = forward(CONFIG, weights, column, policy=self.policy, cache=carry[0], key=keys())
                return out.cache, out.logits

            return jax.lax.fori_loop(0, steps, advance, (cache, jnp.zeros((B, 1, CONFIG.vocab))))

        inside, logits = loop(jax.tree.map(jnp.copy, self.prefilled().cache), 4)
        outside = self.prefilled().cache
        for i in range(4):
            out = self.extended(outside, (i,) * B, (1,) * B)
            outside = out.cache
        self.assert_close(logits, out.logits)
        assert inside.seen.tolist() == outside.seen.tolist() == [length + 4 for length in LENGTHS]
        self.assert_close(self.answer(inside), self.answer(outside))

    # --- the same numbers, however the tokens arrive

    def test_the_prompt_is_read_as_without_a_cache(self):
        if self.is_exact:
            for logits, expected, length in zip(self.prefilled().logits, logits_of_text(self.reference), LENGTHS):
                self.assert_close(logits[:length], expected[:length])

    def test_token_by_token_equals_one_forward(self):
        if self.is_exact:
            cache = self.prefilled().cache
            for i in range(2 * T // 3):
                starts = [length + i for length in LENGTHS]
                out = self.extended(cache, starts, (1, 1, 1))
                cache = out.cache
                self.assert_close(out.logits[:, 0], logits_of_text(self.reference)[np.arange(B), starts])

    def test_from_nothing_equals_one_forward(self):
        if self.is_exact:
            cache = self.empty(ROOM)
            for start in (0, 5, 10):
                out = self.extended(cache, (start,) * B, (5,) * B)
                cache = out.cache
                self.assert_close(out.logits, logits_of_text(self.reference)[:, start : start + 5])

    def test_several_tokens_equal_one_after_the_other(self):
        if self.is_exact:
            cache = self.prefilled().cache
            together = self.extended(cache, LENGTHS, (5, 5, 5))
            for i in range(5):
                alone = self.extended(cache, [length + i for length in LENGTHS], (1, 1, 1))
                self.assert_close(alone.logits[:, 0], together.logits[:, i])
                cache = alone.cache
            assert cache.seen.tolist() == together.cache.seen.tolist()
            self.assert_close(self.answer(cache), self.answer(together.cache))

    # --- reading and writing

    def test_reading_without_writing_changes_nothing(self):
        cache, lengths = self.prefilled().cache, (2, 1, 2)
        before = jax.tree.map(np.array, cache)
        read = self.extended(cache, LENGTHS, lengths, write=False)
        written = self.extended(cache, LENGTHS, lengths)
        assert_same(jax.tree.map(np.array, read.cache), before)
        for b, length in enumerate(lengths):
            self.assert_close(read.logits[b, :length], written.logits[b, :length])
        assert written.cache.seen.tolist() == [11, 5, 3]

    def test_seen_and_kept_positions_of_unequal_rows(self):
        cache = self.prefilled().cache
        later = self.extended(cache, LENGTHS, (2, 1, 3)).cache
        reach = self.reference.window or ROOM
        for held, seen in ((cache, LENGTHS), (later, (11, 5, 4)), (self.empty(ROOM), (0, 0, 0))):
            for state in held.layers:
                assert state.seen.tolist() == list(seen)
                kept = np.asarray(state.kept_positions)
                assert kept.shape[:2] == (B, CONFIG.kv_heads)
                for b, k in np.ndindex(kept.shape[:2]):
                    positions = kept[b, k][kept[b, k] >= 0].tolist()
                    assert len(set(positions)) == len(positions) and set(positions) <= set(range(seen[b]))
                    assert not self.is_exact or set(positions) >= set(range(max(0, seen[b] + 1 - reach), seen[b]))

    # --- rows do not know their neighbours

    def test_rows_are_gathered_reordered_and_repeated(self):
        cache = self.prefilled().cache
        said = self.answer(cache)
        for index in ([0, 1, 2], [2, 0, 1], [1, 1, 0], [1]):
            taken = cache.rows(jnp.asarray(index))
            assert taken.seen.tolist() == [LENGTHS[b] for b in index]
            self.assert_close(self.answer(taken), said[jnp.asarray(index)])
            for state, source in zip(taken.layers, cache.layers):
                assert_same(state.kept_positions, source.kept_positions[jnp.asarray(index)])

    def test_a_row_alone_equals_the_row_in_a_padded_batch(self):
        together = self.prefilled()
        said = self.answer(together.cache)
        for b, length in enumerate(LENGTHS):
            lone, one = cut([0], [length], max(LENGTHS), rows=[b]), jnp.asarray([length], jnp.int32)
            alone = run(CONFIG, self.policy, params(), lone, one, keys()[b : b + 1])
            self.assert_close(alone.logits[0, :length], together.logits[b, :length])
            self.assert_close(self.answer(alone.cache)[0], said[b])

    def test_a_row_that_is_given_nothing_stays_as_it_is(self):
        cache = self.prefilled().cache
        later = self.extended(cache, LENGTHS, (0, 2, 0)).cache
        assert later.seen.tolist() == [9, 6, 1]
        change = np.abs(np.asarray(self.answer(later) - self.answer(cache))).max(axis=(1, 2))
        assert change[0] <= self.atol and change[2] <= self.atol and change[1] > 1000 * ATOL

    def test_padding_of_an_extension_does_no_harm(self):
        cache, counts = self.prefilled().cache, (1, 4, 2)
        padded, other = (self.extended(cache, LENGTHS, counts, junk=junk) for junk in (CONFIG.vocab - 1, 0))
        whole, first = (self.extended(cache, LENGTHS, (n, n, n)) for n in (PIECE, 1))
        for b, count in enumerate(counts):
            self.assert_close(padded.logits[b, :count], other.logits[b, :count])
            self.assert_close(padded.logits[b, :count], whole.logits[b, :count])  # nor what comes later
        self.assert_close(padded.logits[:, 0], first.logits[:, 0])
        self.assert_close(self.answer(padded.cache), self.answer(other.cache))
        if self.is_exact:
            for b, count in enumerate(counts):
                one = cache.rows(jnp.asarray([b]))
                for i in range(count):
                    one = self.extended(one, [LENGTHS[b] + i], [1], rows=[b]).cache
                self.assert_close(self.answer(padded.cache)[b], self.answer(one)[0])

    # --- generation: part by part, then a loop

    def generated(self, rows):
        prompts = [text()[b, : LENGTHS[b]].tolist() for b in rows]
        options: Any = {"policy": self.policy, "room": ROOM, "key": keys()[jnp.asarray(rows)]}
        units = [np.asarray(units_of([len(prompt)], len(prompt)))[0].tolist() for prompt in prompts]
        with fast_to_compile():
            return engine.generate(CONFIG, params(), prompts, max_new_tokens=NEW, unit_ids=units, **options).tokens

    def test_prefill_by_parts_equals_the_whole(self):
        tokens, lengths = cut((0, 0, 0), LENGTHS, T), jnp.asarray(LENGTHS, jnp.int32)
        whole = self.prefilled()
        with fast_to_compile():
            logits, cache = engine.prefill(
                CONFIG, params(), tokens, lengths, policy=self.policy, room=ROOM, key=keys(),
                unit_id=units_of(lengths, T),
            )  # fmt: skip
        self.assert_close(logits, whole.logits[jnp.arange(B), lengths - 1])
        assert forms(cache) == forms(whole.cache)
        self.assert_close(self.answer(cache), self.answer(whole.cache))

    def test_generated_tokens_are_the_likeliest_and_those_of_each_row_alone(self):
        """Up to near ties, which the order of a sum may decide."""
        together, alone = np.array(self.generated(range(B))), [self.generated([b])[0] for b in range(B)]

        def drawn():
            return fold(keys(), engine.CACHE_STREAM)

        out, is_equal = self.prefilled(keys_of=drawn), np.ones(B, bool)
        logits, lengths = np.asarray(out.logits)[np.arange(B), np.asarray(LENGTHS) - 1], jnp.ones(B, jnp.int32)
        for i in range(NEW):
            second, first = np.sort(logits, axis=1)[:, -2:].T
            is_near = first - second < max(NEAR_TIE * logits.std(), 2 * (self.atol - ATOL))
            assert np.all((together[:, i] == logits.argmax(axis=1)) | is_near)
            same = together[:, i] == [row[i] for row in alone]
            assert np.all(same | is_near | ~is_equal)
            is_equal &= same
            out = run(CONFIG, self.policy, params(), together[:, i : i + 1], lengths, drawn(), out.cache)
            logits = np.asarray(out.logits[:, 0])
