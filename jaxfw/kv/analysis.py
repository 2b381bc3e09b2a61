"""What a model's attention looks at (arXiv:2502.01941, section 3), and what of it a cache keeps.

Attention is that of a span of queries, the question's tokens: the mean p(t) of their weights, of every layer and head.
The paper gives curves and no formulas. RECONSTRUCTED: the first 4 tokens are left out and the rest divided by its sum,
as they take most of the attention whatever the text; entropy is that over ln of the number of tokens, so that 1 is
even; the curve is the mass of the most attended x % of the tokens. A layer's rows are recomputed from its queries, keys
and log-sums, one layer after another: no [T T] of any layer is ever held.
"""

import dataclasses
import functools
import itertools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from jaxfw.core.errors import InputError
from jaxfw.core.shapes import Array, Bool, Float, Int, PyTree
from jaxfw.models import Collect, DecoderConfig, attention_spec, final, forward
from jaxfw.models.cache import Cache, FullCache
from jaxfw.ops.attention_rows import attention_rows
from jaxfw.report.contents import Interval

SHARES = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)
SPAN = 32  # queries, where none are named
RESAMPLES = 10_000


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class AttentionProfile:
    """Of every layer, row and head, what the mean attention of the queries is like.

    Without the first tokens, but for the fields that end in `all`. NaN where attention is on the first tokens alone.

    Attributes:
        entropy: over ln of the number of tokens: 0 is one token, 1 all of them evenly.
        area: under the cumulative curve, 1/2 (even) up to 1.
        curve: mass of the most attended tokens, at each of X shares of the tokens.
        curve_all: the same of all tokens.
        regions: mass on each region.
        regions_all: the same of all tokens.
    """

    entropy: Float[Array, "L B H"]
    area: Float[Array, "L B H"]
    curve: Float[Array, "L B H X"]
    curve_all: Float[Array, "L B H X"]
    regions: Float[Array, "L B H R"]
    regions_all: Float[Array, "L B H R"]


def attention_profile(
    config: DecoderConfig,
    params: PyTree,
    tokens: Int[np.ndarray, "B T"],
    lengths: Int[np.ndarray, "B"],
    regions: Int[np.ndarray, "B T"],
    *,
    n_regions: int,
    queries: Int[np.ndarray, "B P"] | None = None,
    sinks: int = 4,
    shares: Sequence[float] = SHARES,
) -> AttentionProfile:
    """What the attention of each row's queries is like, in one compiled program a shape.

    Args:
        config: the model.
        params: its parameters.
        tokens: ids.
        lengths: valid tokens of each row.
        regions: of each token its region 0..n_regions-1 (instruction, shots, question, say), -1 for none.
        n_regions: how many there are.
        queries: positions of the queries, -1 for none; by default the last 32 of each row.
        sinks: first tokens to leave out.
        shares: of the tokens, in [0, 1], at which curves are taken.

    Raises:
        InputError: a row without queries, with queries beyond its length, or with fewer than two tokens behind the
            first ones; shares outside of [0, 1].
    """
    lengths = np.asarray(lengths, np.int32)
    last = np.maximum(lengths[:, None] + np.arange(-SPAN, 0, dtype=np.int32), -1)
    queries = last if queries is None else np.asarray(queries, np.int32)
    _check(lengths, queries, sinks, shares)
    at = np.asarray(shares, np.float32)
    return _profile(config, params, tokens, lengths, regions, queries, np.int32(sinks), at, n_regions=n_regions)


def _check(lengths: np.ndarray, queries: np.ndarray, sinks: int, shares: Sequence[float]) -> None:
    B = len(lengths)
    if queries.ndim != 2 or len(queries) != B:
        raise InputError(f"queries has shape {list(queries.shape)}: give [B P] = [{B}, P] positions, -1 for none.")
    for b, (row, length) in enumerate(zip(queries, lengths, strict=True)):
        if length < sinks + 2:
            raise InputError(f"row {b} has {length} tokens: give at least two more than the first sinks={sinks}.")
        if not 0 <= row.max(initial=-1) < length:
            raise InputError(
                f"row {b} has {length} tokens and queries at {row.tolist()}: give some of 0..{length - 1}."
            )
    if not all(0 <= share <= 1 for share in shares):
        raise InputError(f"shares={tuple(shares)} must lie in [0, 1].")


@functools.partial(jax.jit, static_argnames=("config", "n_regions"))
def _profile(
    config: DecoderConfig, params: PyTree, tokens: Array, lengths: Array, regions: Array, queries: Array, sinks: Array,
    shares: Array, *, n_regions: int,
) -> AttentionProfile:  # fmt: skip
    taps = [Collect("attn/q", pos=queries), Collect("attn/k"), Collect("attn/lse", pos=queries)]
    q, k, lse = forward(config, params, tokens, lengths=lengths, taps=taps, run_head=final).taps
    T, scale = tokens.shape[1], attention_spec(config).scale
    windows = jnp.asarray([config.at(i).window or T for i in range(config.layers)], jnp.int32)
    at = jnp.arange(T)
    is_held = (at < lengths[:, None])[:, None]
    is_in = jax.nn.one_hot(regions, n_regions, dtype=jnp.float32)
    count = jnp.sum(queries >= 0, axis=1)[:, None, None]

    def of_layer(parts):
        q, k, lse, window = parts
        keys = jnp.swapaxes(k, 1, 2)
        rows = attention_rows(q, keys, lse, positions=queries, scale=scale, window=window)
        p = jnp.sum(rows, axis=2) / count
        without = _share(p, is_held & (at >= sinks))
        entropy, area, curve = concentration(p, is_held & (at >= sinks), shares)
        _, _, curve_all = concentration(p, is_held, shares)
        on, on_all = (jnp.einsum("BHT,BTR->BHR", x, is_in, precision="highest") for x in (without, p))
        return AttentionProfile(entropy, area, curve, curve_all, on, on_all)

    return jax.lax.map(of_layer, (q, k, lse, windows))


def concentration(
    mass: Float[Array, "*B T"], counts: Bool[Array, "*#B T"], shares: Array | Sequence[float] = SHARES
) -> tuple[Float[Array, "*B"], Float[Array, "*B"], Float[Array, "*B X"]]:
    """Entropy over its largest value, area under the cumulative curve, and the curve at `shares`.

    Of the N tokens that count, divided by their sum. The curve is linear between whole numbers of tokens.
    """
    p = _share(mass, counts)
    N = jnp.sum(jnp.broadcast_to(counts, p.shape), axis=-1)
    entropy = jnp.sum(jax.scipy.special.entr(p), axis=-1) / jnp.log(N)
    curve = jnp.cumsum(-jnp.sort(-p, axis=-1), axis=-1)
    curve = jnp.concatenate([jnp.zeros_like(curve[..., :1]), curve], axis=-1)  # C(0), C(1), ...
    steps = (curve[..., 1:] + curve[..., :-1]) / 2
    area = jnp.sum(jnp.where(jnp.arange(p.shape[-1]) < N[..., None], steps, 0), axis=-1) / N
    at = jnp.asarray(shares) * N[..., None]
    low = jnp.floor(at).astype(jnp.int32)
    below, above = (jnp.take_along_axis(curve, jnp.minimum(i, p.shape[-1]), axis=-1) for i in (low, low + 1))
    return entropy, area, below + (at - low) * (above - below)


def _share(mass: Array, counts: Array) -> Array:
    """Of the mass that counts; NaN where there is none."""
    mass = jnp.where(counts, mass, 0)
    return mass / jnp.sum(mass, axis=-1, keepdims=True)


def summary(values: Float[Array, "L B H"], *, seed: int = 0, resamples: int = RESAMPLES) -> Interval:
    """The mean over layers, heads and rows, with the percentile bootstrap over rows (Efron 1979).

    NaN is left out of a row's mean.

    >>> summary(np.full((2, 3, 4), 0.5))
    Interval(value=0.5, low=0.5, high=0.5)
    """
    of_rows = np.nanmean(np.asarray(values, np.float64), axis=(0, 2))
    B = len(of_rows)
    drawn = np.random.default_rng(seed).multinomial(B, np.full(B, 1 / B), resamples)
    low, high = np.quantile(drawn @ of_rows / B, [0.025, 0.975])
    return Interval(float(of_rows.mean()), float(low), float(high))


def jaccard(one: Int[np.ndarray, "*B C"], other: Int[np.ndarray, "*B c"]) -> Float[np.ndarray, "*B"]:
    """Of two sets of positions (-1 is none), the share of their union that is in both; 1 if both are empty.

    >>> float(jaccard(np.array([3, 1, -1]), np.array([1, 2])))
    0.3333333333333333
    """
    T = int(max(x.max(initial=-1) for x in (one, other))) + 1
    one, other = _is_kept(one, T), _is_kept(other, T)
    both, either = (np.sum(found, axis=-1) for found in (one & other, one | other))
    return np.where(either > 0, both / np.maximum(either, 1), 1.0)


def _is_kept(positions: Int[np.ndarray, "*B C"], T: int) -> Bool[np.ndarray, "*B T"]:
    """Which of the positions 0..T-1 are among these."""
    found = np.zeros((*positions.shape[:-1], T + 1), bool)
    inside = np.where((positions >= 0) & (positions < T), positions, T)
    np.put_along_axis(found, inside, True, axis=-1)
    return found[..., :T]


def _prompt_positions(cache: Cache, lengths: Int[np.ndarray, "B"]) -> list[Int[np.ndarray, "B K C"]]:
    """Of each layer the positions in its slots, -1 for what is empty or was generated."""
    ends = np.asarray(lengths)[:, None, None]
    kept = (np.asarray(state.kept_positions) for state in cache.layers)
    return [np.where(positions < ends, positions, -1) for positions in kept]


def layer_jaccard(cache: Cache, lengths: Int[np.ndarray, "B"]) -> float:
    """How alike neighbouring layers choose of prompts: the mean of `jaccard` over pairs of them, heads and rows.

    Raises:
        InputError: there is one layer only.
    """
    if len(cache.layers) < 2:
        raise InputError("the cache has one layer: neighbours need two.")
    kept = _prompt_positions(cache, lengths)
    return float(np.mean([jaccard(below, above) for below, above in itertools.pairwise(kept)]))


def kept_map(cache: Cache, length: int, *, row: int = 0) -> Float[np.ndarray, "T"]:
    """Of each token of a row's prompt of `length` tokens, the share of layers and heads that hold it."""
    found = [_is_kept(np.asarray(state.kept_positions[row]), length) for state in cache.layers]
    return np.mean(found, axis=(0, 1))


@dataclasses.dataclass(frozen=True)
class KeptShare:
    """What a cache holds of prompts, beside the full cache.

    Attributes:
        tokens: the share of each prompt that a layer holds, mean over heads.
        bytes: each layer's bytes, everything counted, over the full cache's.
        nbytes: of all layers, and what they share.
        full_nbytes: the full cache's.
    """

    tokens: Float[np.ndarray, "L B"]
    bytes: Float[np.ndarray, "L"]
    nbytes: int
    full_nbytes: int


def kept_share(config: DecoderConfig, cache: Cache, lengths: Int[np.ndarray, "B"], *, room: int) -> KeptShare:
    """Tokens and bytes of a cache, beside a full one of `room` slots: as many as this one's prefill was told."""
    kept = _prompt_positions(cache, lengths)
    tokens = np.array([np.sum(positions >= 0, axis=2).mean(axis=1) for positions in kept]) / np.asarray(lengths)
    empty = functools.partial(FullCache().empty, len(lengths), prompt=room, new=0)
    full = Cache((jax.eval_shape(lambda: empty(spec=attention_spec(config), dtype=config.dtype)),)).nbytes
    of_layers = np.array([Cache((state,)).nbytes for state in cache.layers]) / full
    return KeptShare(tokens, of_layers, cache.nbytes, full * config.layers)
