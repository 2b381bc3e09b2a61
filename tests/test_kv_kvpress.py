"""What stays of a prompt is what kvpress 0.5.5 keeps: fixtures by tests/oracle_kv/kvpress_cases.py, in float64."""

import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxfw.kv import parse
from jaxfw.kv.pooled_cache import PooledCache
from jaxfw.kv.scorers import Context
from jaxfw.models.cache import QKV, AttentionSpec, Step
from jaxfw.ops.rope import Rope

FIXTURES = Path(__file__).parent / "fixtures" / "kv"
ARCHITECTURES, LENGTHS, REMOVED = ("llama", "qwen2", "qwen3"), (200, 203, 512), (0.1, 0.3, 0.5, 0.7, 0.9)
LAYERS, STORED, K = 4, (1, 3), 2
SPEC = AttentionSpec(K, 8, 8**-0.5, Rope(), "float32")
METHODS = (
    "streaming", "knorm", "keydiff", "snapkv(w=16)", "h2o(recent=0,normalise=true)", "tova", "expected",
    "expected(epsilon=0.01)", "pyramidkv(w=16)", "chunkkv(w=16,kernel=5,size=20,rule=count)", "lagkv(lag=8)",
    "critical(w=8)", "adakv(w=8)",
)  # fmt: skip
# Ranks within parts: tokens of different parts have the same rank, and torch.topk takes any of them.
HAS_TIES = ("lagkv(lag=8)",)


@functools.cache
def fixture(name, T):
    return np.load(FIXTURES / f"{name}_{T}.npz")


def context(name, T, layer, budget):
    arrays = {part: jnp.asarray(fixture(name, T)[f"{layer}/{part}"])[None] for part in ("q", "q_pre", "k", "v")}
    w_o = jnp.asarray(fixture(name, T)[f"{layer}/w_o"])
    assert arrays["q"].dtype == jnp.float64
    nothing = jnp.zeros((1, T, 1))
    qkv = QKV(arrays["q"], arrays["k"], arrays["v"], arrays["q_pre"], arrays["k"], nothing, w_o)
    lengths = jnp.asarray([T], jnp.int32)
    step = Step(jnp.arange(T, dtype=jnp.int32)[None], lengths, jnp.int32(layer))
    return Context(qkv, step, SPEC, jnp.asarray(budget)[None])


def policy(method, T, removed, layer):
    """With as many tokens as kvpress keeps, which it computes with a rounding error: int(200 * (1 - 0.9)) is 19."""
    share = (
        f"keep={1 - removed:.1f}" if method.startswith(("pyramidkv", "chunkkv")) else f"budget={int(T * (1 - removed))}"
    )
    return parse(f"{method}@{share}", layers=LAYERS).at(layer)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_the_tokens_that_stay_are_those_of_kvpress(name, method):
    with jax.enable_x64(True):
        for T in LENGTHS:
            for layer in STORED:
                for removed in REMOVED:
                    case = f"{name} {T} {layer} {removed}"
                    ours, score = kept(name, method, T, layer, removed)
                    packed = fixture(name, T)[f"{layer}/kept/{method}/{removed}"]
                    theirs = np.unpackbits(packed, axis=1)[:, :T].astype(bool)
                    assert ours.sum() == theirs.sum(), case
                    if method not in HAS_TIES:
                        np.testing.assert_array_equal(ours, theirs, err_msg=case)
                        continue
                    for head in range(K):
                        swapped = score[head][ours[head] != theirs[head]]
                        assert swapped.size == 0 or np.ptp(swapped) == 0, case


def kept(name, method, T, layer, removed):
    made = policy(method, T, removed, layer)
    budget = made.kept(T)[T]
    c = context(name, T, layer, budget)
    scores = made.scorer(c)
    if isinstance(made, PooledCache):
        return np.asarray(made.heads.choose(scores, c.step, c.budget, R=1)[0]), np.asarray(scores.value[0])
    positions = made.granularity.choose(scores, c.step, c.budget, made.granularity.slots(made.kept(T)))
    found = np.zeros((K, T), bool)
    for head, row in enumerate(np.broadcast_to(positions[0], (K, positions.shape[2]))):
        found[head, row[row >= 0]] = True
    return found, np.asarray(scores.value[0])
