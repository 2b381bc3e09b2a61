"""What decode policies hold after each of 200 steps is what plain simulators of the published rules hold.

The simulators are lists of tokens in the order of the text and numpy softmax; they know of no slots and no masks.
"""

import dataclasses
import functools
import math
from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxfw.kv import parse
from jaxfw.models.cache import QKV, AttentionSpec, Step
from jaxfw.ops.rope import Rope

B, K, G, D, T, STEPS, LENGTHS = 2, 2, 2, 8, 24, 200, (24, 17)
N = T + STEPS
SPEC = AttentionSpec(K, D, D**-0.5, Rope(), "float32")


# --- streams of queries, keys and values


def rotated(x, positions):
    """x [..., n, d] at positions [n]: pairs (i, i + d/2) turn by position / 10000^(2i/d)."""
    angle = np.asarray(positions)[:, None] * 10000.0 ** (-2 * np.arange(D // 2) / D)
    first, second = np.split(np.asarray(x, np.float64), 2, axis=-1)
    cos, sin = np.cos(angle), np.sin(angle)
    return np.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)


def _stream():
    rng = np.random.default_rng(0)
    q, k, v = (rng.normal(size=(B, heads, N, D)) for heads in (K * G, K, K))
    q *= 2  # sharper attention: fewer near ties
    return {"q_pre": q, "k_pre": k, "v": v, "q": rotated(q, range(N)), "k": rotated(k, range(N))}


STREAM = _stream()  # [B heads N d]; token i of a row stands at position i


def part(columns):
    """The tokens at columns [B n] of the stream, as a layer hands them over."""
    at = jnp.asarray(columns)[:, None, :, None]
    taken = {name: jnp.take_along_axis(jnp.asarray(x, jnp.float32), at, 2) for name, x in STREAM.items()}
    found = {name: jnp.swapaxes(x, 1, 2) for name, x in taken.items()}
    nothing = jnp.zeros((B, at.shape[2], 1))
    return QKV(found["q"], found["k"], found["v"], found["q_pre"], found["k_pre"], nothing, nothing)


def prefilled(policy, lengths=LENGTHS):
    columns = jnp.broadcast_to(jnp.arange(T, dtype=jnp.int32), (B, T))
    step = Step(columns, jnp.asarray(lengths, jnp.int32), jnp.int32(0), key=jax.random.split(jax.random.key(0), B))
    return policy.prefill(part(columns), step, spec=SPEC, room=N)[1]


def extended(policy, state, counts, width=1, **options):
    columns = state.seen[:, None] + jnp.arange(width)
    step = Step(columns, jnp.asarray(counts, jnp.int32), jnp.int32(0))
    return policy.extend(state, part(columns), step, spec=SPEC, **options)


# Compiling is most of what these tests take.
fast = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


def recorded(text):
    """Outputs [STEPS B H d] and which positions are held [STEPS B K N] after each step."""
    policy = parse(text)

    @fast
    def run():
        def one(state, _):
            out, state = extended(policy, state, (1, 1))
            return state, (out[:, 0], state.kept_positions, state.held)

        return jax.lax.scan(one, prefilled(policy), None, length=STEPS)[1]

    outs, kept, held = map(np.asarray, run())
    is_held = np.any(kept[..., None] == np.arange(N), axis=3)
    assert (is_held.sum(axis=-1) == held[..., None]).all(), "as many tokens as a row counts, none of them twice"
    return outs, is_held


# --- simulators


@dataclasses.dataclass
class Token:
    position: int
    mass: float = 0.0  # attention of the newest query, summed over the query heads of the group
    score: float = 0.0  # of all queries


def softmax(x):
    x = np.exp(x - x.max(axis=-1, keepdims=True))
    return x / x.sum(axis=-1, keepdims=True)


def prompt_attention(b, length):
    """[K G T T] of a row's prompt."""
    q, k = (STREAM[name][b, :, :length].reshape(K, -1, length, D) for name in ("q", "k"))
    logits = q @ k.swapaxes(-1, -2) / math.sqrt(D)
    return softmax(np.where(np.tril(np.ones((length, length), bool)), logits, -np.inf))


def top(tokens, count, value):
    """The `count` tokens of highest value, in the order of the text."""
    best = sorted(tokens, key=value, reverse=True)[: max(count, 0)]
    return sorted(best, key=lambda token: token.position)


def mass(token):
    return token.mass


def score(token):
    return token.score


def simulated(start, rule, is_reassigned=False):
    """Outputs and held positions as `recorded` has them.

    `start(b, length)` is what a prompt leaves to each head; `rule(heads, t, row)` what step t = 1, 2, ... leaves of
    it, after its own token has been added and attended by. With `is_reassigned` a token stands at its place in the
    list, as does the query.
    """
    outs, is_held = np.zeros((STEPS, B, K * G, D)), np.zeros((STEPS, B, K, N), bool)
    for b, length in enumerate(LENGTHS):
        heads, row = start(b, length), Row(b, length)
        for t in range(1, STEPS + 1):
            now = length + t - 1
            for h, tokens in enumerate(heads):
                tokens.append(Token(now))
                group, at = slice(h * G, (h + 1) * G), [token.position for token in tokens]
                q, k = STREAM["q"][b, group, now], STREAM["k"][b, h, at]
                if is_reassigned:
                    q = rotated(STREAM["q_pre"][b, group, now, None], [len(at) - 1])[:, 0]
                    k = rotated(STREAM["k_pre"][b, h, at], range(len(at)))
                weights = softmax(q @ k.T / math.sqrt(D))
                outs[t - 1, b, group] = weights @ STREAM["v"][b, h, at]
                for token, seen in zip(tokens, weights.sum(axis=0), strict=True):
                    token.mass, token.score = seen, token.score + seen
            heads = rule(heads, t, row)
            for h, tokens in enumerate(heads):
                is_held[t - 1, b, h, [token.position for token in tokens]] = True
    return outs, is_held


@dataclasses.dataclass
class Row:
    """Which row of the batch, the tokens of its prompt, and steps for which a policy has waited."""

    b: int
    prompt: int
    waited: int = 0


def each(rule):
    """A rule for the tokens of one head, for all heads alike."""
    return lambda heads, t, row: [rule(tokens, t, row) for tokens in heads]


def shortest_keys(count):
    """What knorm leaves."""

    def start(b, length):
        norms = np.linalg.norm(STREAM["k"][b, :, :length], axis=-1)
        return [[Token(int(i)) for i in sorted(np.argsort(row)[:count])] for row in norms]

    return start


def h2o(sizes, *, share=0.5, weight=1.0):
    """H2O's real_drop: running sums of attention; half of each row's size for the heaviest, half for the newest."""

    def cut(tokens, size):
        newest = int(size * share)
        old = len(tokens) - newest
        return tokens if len(tokens) <= size else top(tokens[:old], size - newest, score) + tokens[old:]

    def start(b, length):
        sums = prompt_attention(b, length).sum(axis=(1, 2)) * weight
        return [cut([Token(i, 0.0, row[i]) for i in range(length)], sizes[b]) for row in sums]

    return start, each(lambda tokens, t, row: cut(tokens, sizes[row.b]))


def tova(sizes, *, newest=0):
    """TOVA: the tokens of highest attention of the newest query, averaged over all heads of the layer."""

    def start(b, length):
        last = prompt_attention(b, length)[:, :, -1].mean(axis=(0, 1))
        # The last one stays, as in kvpress.
        kept = {*np.argsort(-last[:-1])[: min(sizes[b], length) - 1].tolist(), length - 1}
        return [[Token(i) for i in sorted(kept)] for _ in range(K)]

    def rule(heads, t, row):
        mean = {token.position: np.mean([one[i].mass / G for one in heads]) for i, token in enumerate(heads[0])}
        old, size = len(heads[0]) - newest, sizes[row.b] - newest
        return [top(tokens[:old], size, lambda token: mean[token.position]) + tokens[old:] for tokens in heads]

    return start, rule


def streaming(sizes, sinks):
    """StreamingLLM: the first tokens and the newest; a cache no larger than the sinks still takes the newest in."""

    def cut(tokens, size, first):
        return tokens if len(tokens) <= size else tokens[:first] + tokens[len(tokens) - (size - first) :]

    def start(b, length):
        return [cut([Token(i) for i in range(length)], sizes[b], min(sinks, sizes[b] - 1)) for _ in range(K)]

    return start, each(lambda tokens, t, row: cut(tokens, sizes[row.b], min(sinks, sizes[row.b] - 1)))


def best_of_generated(tokens, size, recent, row, value):
    """The prompt's part, and of what was generated the `recent` newest and the best others, `size` in all."""
    prompt = [token for token in tokens if token.position < row.prompt]
    generated = tokens[len(prompt) :]
    if len(generated) <= size:
        return tokens
    return prompt + top(generated[:-recent], size - recent, value) + generated[-recent:]


def scope(limit, recent, wait=0):
    """SCOPE's update_kv_in_decoding: what the newest query looks at; `wait` is the delta of "discontinuous"."""

    def rule(heads, t, row):
        size, held = limit(t), sum(token.position >= row.prompt for token in heads[0])
        if held < size:
            return heads
        if row.waited < wait:
            row.waited += 1
            return heads
        row.waited = 0
        return [best_of_generated(tokens, size, recent, row, mass) for tokens in heads]

    return rule


def shots(rd, recent, value=mass):
    """ShotKV, Alg. 1: of t generated tokens max(recent, ceil(rd t)) stay, chosen by the attention of all heads."""

    def rule(heads, t, row):
        total = {token.position: sum(value(one[i]) for one in heads) for i, token in enumerate(heads[0])}
        heads = [best_of_generated(one, size(t), recent, row, lambda token: total[token.position]) for one in heads]
        return heads

    def size(t):
        return max(recent, math.ceil(rd * t))

    return rule


# --- policies against them


def shared_prompt(count):
    """What streaming leaves, where all heads hold the same."""
    return streaming((count, count), 4)[0]


WHOLE = {  # the size of each row
    "h2o@budget=21": h2o((21, 21)),  # the second row's prompt is shorter
    "h2o@keep=0.5": h2o((12, 8)),
    "tova@budget=40": tova((40, 40)),
    "tova@keep=0.5": tova((12, 8)),
    "streaming(reassign=false)@budget=12": streaming((12, 12), 4),
    "streaming(reassign=false)@budget=3": streaming((3, 3), 4),
    "streaming(reassign=false,sinks=0)@keep=0.5": streaming((12, 8), 0),
}
GENERATED = {
    "slide(window=12,recent=5)": scope(lambda t: 12, 5),
    "adaptive(recent=5,delta=7)": scope(lambda t: 5 + (t - 1) // 7, 5),
    "discontinuous(recent=5,delta=7)": scope(lambda t: 5 + (t - 1) // 7, 5, wait=7),
}


@pytest.mark.parametrize("text", WHOLE)
def test_caches_of_one_size_hold_what_their_papers_say(text):
    assert_same(recorded(text), simulated(*WHOLE[text]))


@pytest.mark.parametrize("decode", GENERATED)
def test_what_is_generated_is_forgotten_as_scope_does(decode):
    assert_same(recorded(f"knorm@budget=8,decode={decode}"), simulated(shortest_keys(8), GENERATED[decode]))


@pytest.mark.parametrize(
    ("rd", "recent", "value"), [(Fraction(2, 5), 1, mass), (Fraction(1, 10), 4, score), (Fraction(1), 1, mass)]
)
def test_a_share_of_what_is_generated_stays_as_in_shotkv(rd, recent, value):
    decode = f"shots(rd={float(rd)},recent={recent},score={'mass' if value is mass else 'sum'})"
    ours = recorded(f"streaming@budget=8,decode={decode}")
    assert_same(ours, simulated(shared_prompt(8), shots(rd, recent, value)))
    for b, length in enumerate(LENGTHS):
        held = ours[1][:, b, :, length:].sum(axis=-1)
        for t in range(1, STEPS + 1):
            assert (held[t - 1] == min(t, max(recent, math.ceil(rd * t)))).all(), t
        assert (ours[1][:, b, :, :length].sum(axis=-1) == 8).all()


@pytest.mark.parametrize(("size", "sinks"), [(12, 4), (3, 4), (40, 2)])
def test_reassigned_positions_are_places_in_the_cache(size, sinks):
    ours = recorded(f"streaming(sinks={sinks})@budget={size}")
    assert_same(ours, simulated(*streaming((size, size), sinks), is_reassigned=True))


def test_a_prompts_last_token_that_is_read_once_more_stands_at_its_place_too():
    policy, size, sinks = parse("streaming@budget=12"), 12, 4

    @fast
    def run():
        state = prefilled(policy)
        return extended(policy, dataclasses.replace(state, seen=state.seen - 1), (1, 1), write=False)[0]

    outs = run()
    for b, length in enumerate(LENGTHS):
        at = [*range(sinks), *range(length - size + sinks, length)]
        q = rotated(STREAM["q_pre"][b, :, length - 1, None], [size - 1]).reshape(K, G, D)
        k = rotated(STREAM["k_pre"][b][:, at], range(size))
        expected = softmax(q @ k.swapaxes(-1, -2) / math.sqrt(D)) @ STREAM["v"][b][:, at]
        np.testing.assert_allclose(outs[b, 0], expected.reshape(K * G, D), atol=1e-5, rtol=0)


RIGHT_AND_WRONG = {
    "h2o does not protect the newest": (h2o((12, 12)), h2o((12, 12), share=0)),
    "h2o averages over a group in the prompt and sums in a step": (h2o((12, 12)), h2o((12, 12), weight=1 / G)),
    "h2o forgets the prompt's sums": (h2o((12, 12)), h2o((12, 12), weight=1e-9)),
    "tova protects the newest": (tova((10, 10)), tova((10, 10), newest=1)),
    "streaming has one sink less": (streaming((12, 12), 4), streaming((12, 12), 3)),
    "scope protects the very newest alone": tuple((shortest_keys(8), scope(lambda t: 12, n)) for n in (5, 1)),
    "the window grows a step early": tuple(
        (shortest_keys(8), scope(lambda t, early=early: 5 + (t - 1 + early) // 7, 5)) for early in (0, 1)
    ),
    "waiting begins beyond the window": tuple(
        (shortest_keys(8), scope(lambda t: 5 + (t - 1) // 7, 5, wait=n)) for n in (7, 8)
    ),
    "shotkv sums over all steps": tuple((shared_prompt(8), shots(Fraction(2, 5), 1, value)) for value in (mass, score)),
}


@pytest.mark.parametrize("wrong", RIGHT_AND_WRONG)
def test_a_wrong_rule_would_be_seen(wrong):
    one, other = (simulated(*rules)[1] for rules in RIGHT_AND_WRONG[wrong])
    assert (one != other).any(axis=(1, 2, 3)).mean() > 0.2


def assert_same(ours, theirs):
    where = np.argwhere((ours[1] != theirs[1]).any(axis=(1, 2, 3)))
    assert where.size == 0, f"step {where[0, 0] + 1}"
    np.testing.assert_allclose(ours[0], theirs[0], atol=2e-5, rtol=0)


# --- several tokens at once, tokens that are not written, rows without one

POLICIES = (
    "h2o@budget=12", "tova@budget=10", "streaming@budget=12", "knorm@budget=8",
    *(f"streaming@budget=8,decode={name}" for name in ("shots(rd=0.4)", "discontinuous(recent=5,delta=3)")),
)  # fmt: skip


@pytest.mark.parametrize("text", POLICIES)
def test_tokens_at_once_one_by_one_unwritten_and_missing(text):
    policy, width, counts = parse(text), 20, jnp.asarray((20, 13))

    @fast
    def run():
        def one(state, t):
            out, after = extended(policy, state, t < counts)
            seen, unwritten = extended(policy, state, (1, 1), write=False)
            return after, (out[:, 0], seen[:, 0], unwritten.kept_positions, state)

        start = prefilled(policy)
        end, steps = jax.lax.scan(one, start, jnp.arange(width))
        at_once = extended(policy, start, counts, width)
        return start, end, steps, at_once, extended(policy, start, counts, width, write=False)

    start, end, (outs, seen, kept, states), (at_once, together), (unwritten, before) = run()
    assert_equal_states(together, end)
    assert_equal_states(before, start)
    np.testing.assert_array_equal(kept, states.kept_positions)
    np.testing.assert_array_equal(end.seen, np.asarray(LENGTHS) + counts)
    for b, count in enumerate(counts):
        for found in (at_once[b, :count], unwritten[b, :count], seen[:count, b]):
            np.testing.assert_allclose(found, outs[:count, b], atol=2e-6, rtol=0)
    # The second row has been given nothing since its 13th token.
    assert_equal_states(*(jax.tree.map(lambda x, t=t: x[t, 1:], states) for t in (13, 19)))


def assert_equal_states(ours, theirs):
    """But for what empty slots hold."""
    np.testing.assert_array_equal(ours.kept_positions, theirs.kept_positions)
    # First tokens that move are rotated anew for every step.
    is_held = np.asarray(ours.kept_positions) >= (0 if ours.sinks is None else ours.sinks.shape[2])
    for name in ("k", "v", "score"):
        one, other = getattr(ours, name), getattr(theirs, name)
        if one is not None:
            np.testing.assert_allclose(np.asarray(one)[is_held], np.asarray(other)[is_held], atol=2e-6, rtol=0)
    for name in ("held", "seen", "prompt", "prompt_held", "limit", "free", "waited", "sinks"):
        np.testing.assert_array_equal(getattr(ours, name), getattr(theirs, name), err_msg=name)
