"""What decode policies hold after each of 200 steps is what plain simulators of the published rules hold.

The simulators are lists of tokens in the order of the text and numpy softmax; they know of no slots and no masks.
"""

import dataclasses
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


def recorded(text):
    """Outputs [STEPS B H d] and which positions are held [STEPS B K N] after each step."""
    policy = parse(text)

    @jax.jit
    def run():
        def one(state, _):
            out, state = extended(policy, state, (1, 1))
            return state, (out[:, 0], state.kept_positions, state.held)

        return jax.lax.scan(one, prefilled(policy), None, length=STEPS)[1]

    outs, kept, held = map(np.asarray, run())
    is_held = np.any(kept[..., None] == np.arange(N), axis=3)
    np.testing.assert_array_equal(is_held.sum(-1), np.broadcast_to(held[..., None], is_held.shape[:3]))
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
                    q = rotated(STREAM["q_pre"][b, group, now : now + 1], [len(at) - 1])[:, 0]
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


def h2o(sizes):
    """H2O's real_drop: running sums of attention; half of each row's size for the heaviest, half for the newest."""

    def cut(tokens, size):
        newest = len(tokens) - size // 2
        return tokens if len(tokens) <= size else top(tokens[:newest], size - size // 2, score) + tokens[newest:]

    def start(b, length):
        sums = prompt_attention(b, length).sum(axis=(1, 2))
        return [cut([Token(i, 0.0, row[i]) for i in range(length)], sizes[b]) for row in sums]

    return start, each(lambda tokens, t, row: cut(tokens, sizes[row.b]))


def tova(sizes):
    """TOVA: the tokens of highest attention of the newest query, averaged over all heads of the layer."""

    def start(b, length):
        last = prompt_attention(b, length)[:, :, -1].mean(axis=(0, 1))
        # The last one stays, as in kvpress.
        kept = {*np.argsort(-last[:-1])[: min(sizes[b], length) - 1].tolist(), length - 1}
        return [[Token(i) for i in sorted(kept)] for _ in range(K)]

    def rule(heads, t, row):
        mean = {token.position: np.mean([one[i].mass / G for one in heads]) for i, token in enumerate(heads[0])}
        return [top(tokens, sizes[row.b], lambda token: mean[token.position]) for tokens in heads]

    return start, rule


def streaming(sinks, *, budget=0, keep=None):
    """StreamingLLM: the first tokens and the newest; a cache no larger than the sinks has a place for the newest."""

    def start(b, length):
        size = budget if keep is None else max(1, int(length * keep))
        first = min(sinks, size, length)
        kept = sorted({*range(first), *range(length - max(0, min(size, length) - first), length)})
        return [[Token(i) for i in kept] for _ in range(K)]

    def rule(tokens, t, notes):
        size = max(notes["held"], budget)
        first = min(sinks, size - 1)
        return tokens if len(tokens) <= size else tokens[:first] + tokens[len(tokens) - (size - first) :]

    return start, each(rule)


def window_cut(tokens, notes, window, recent):
    """SCOPE's choice: the prompt's part, the newest, and of what lies between the best by the newest query."""
    held, old = notes["held"], len(tokens) - recent
    return tokens[:held] + top(tokens[held:old], window - recent, mass) + tokens[old:]


def slide(window, recent):
    def rule(tokens, t, notes):
        is_full = len(tokens) - notes["held"] >= window
        return window_cut(tokens, notes, window, recent) if is_full else tokens

    return shortest_keys(10), each(rule)


def adaptive(recent, delta):
    def rule(tokens, t, notes):
        window = recent + (t - 1) // delta
        is_full = len(tokens) - notes["held"] >= window
        return window_cut(tokens, notes, window, recent) if is_full else tokens

    return shortest_keys(10), each(rule)


def discontinuous(recent, delta):
    """In SCOPE's code, `jump_step` counts the steps in which the window was full."""

    def rule(heads, t, notes):
        window = recent + (t - 1) // delta
        if len(heads[0]) - notes["held"] < window:
            return heads
        if notes["jump_step"] < delta:
            notes["jump_step"] += 1
            return heads
        notes["jump_step"] = 0
        return [window_cut(tokens, notes, window, recent) for tokens in heads]

    return shortest_keys(10), rule


def shots(rd, *, recent=1, value=mass):
    """ShotKV's decoding: of t generated tokens the max(recent, ceil(rd t)) of highest value, summed over all heads."""

    def rule(heads, t, notes):
        held, size = notes["held"], max(recent, math.ceil(Fraction(rd) * t))
        generated = [tokens[held:] for tokens in heads]
        if len(generated[0]) <= size:
            return heads
        total = {token.position: sum(value(row[i]) for row in generated) for i, token in enumerate(generated[0])}

        def kept(tokens):
            old = len(tokens) - recent
            return top(tokens[:old], size - recent, lambda token: total[token.position]) + tokens[old:]

        return [tokens[:held] + kept(tokens[held:]) for tokens in heads]

    return shortest_keys(10), rule


PROMPT = "knorm@budget=10"
CASES = {
    "h2o@budget=20": h2o(20),
    "h2o@budget=13": h2o(13),
    "tova@budget=12": tova(12),
    "tova@budget=20": tova(20),
    "streaming(reassign=false)@budget=20": streaming(4, budget=20),
    "streaming(reassign=false,sinks=0)@keep=0.5": streaming(0, keep=0.5),
    "streaming(reassign=false,sinks=9)@keep=0.4": streaming(9, keep=0.4),
    f"{PROMPT},decode=slide(window=16,recent=6)": slide(16, 6),
    f"{PROMPT},decode=adaptive(recent=6,delta=7)": adaptive(6, 7),
    f"{PROMPT},decode=discontinuous(recent=6,delta=7)": discontinuous(6, 7),
    f"{PROMPT},rd=0.3": shots("0.3"),
    f"{PROMPT},decode=shots(rd=0.2,recent=5)": shots("0.2", recent=5),
    f"{PROMPT},decode=shots(rd=0.3,score=sum)": shots("0.3", value=score),
}


@pytest.mark.parametrize("text", CASES)
def test_the_tokens_held_after_each_step_are_those_of_the_published_rule(text):
    outs, is_held = recorded(text)
    expected_outs, expected = simulated(*CASES[text])
    np.testing.assert_array_equal(is_held, expected)
    np.testing.assert_allclose(outs, expected_outs, atol=1e-5)


WRONG = {
    "h2o@budget=20": {"recent": 1},  # the newest are not protected
    "h2o@budget=13": {"prompt_weight": 1 / G},  # averages in the prompt beside sums in steps
}
