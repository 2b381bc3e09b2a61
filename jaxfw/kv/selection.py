"""From scores to positions: which tokens of a prompt stay.

All is sorting along a row of one head, which a mesh leaves where it is. A tie goes to the earlier token, among
protected ones to the later; a score that is NaN is the lowest.
"""

import jax
import jax.numpy as jnp

from jaxfw.core.shapes import Array, Bool, Float, Int


def highest(
    score: Float[Array, "B #K T"],
    protected: Bool[Array, "B T"] | None,
    lengths: Int[Array, "B"],
    budget: Int[Array, "B"],
    C: int,
) -> Int[Array, "B #K C"]:
    """Positions of the `budget` <= C highest scores of each row and head, in ascending order, -1 behind them.

    Protected tokens come first, the newest of them before all; tokens from `lengths` on are none.
    """
    T = score.shape[2]
    position = jnp.broadcast_to(jnp.arange(T, dtype=jnp.int32), score.shape)
    order, second = jnp.where(jnp.isnan(score), jnp.inf, -score), position
    if protected is not None:
        protected = protected[:, None]
        order = jnp.where(protected, -jnp.inf, jnp.maximum(order, jnp.finfo(order.dtype).min))
        second = jnp.where(protected, -position, position)
    is_none = (position >= lengths[:, None, None]).astype(jnp.int32)
    *_, best = jax.lax.sort((is_none, order, second, position), num_keys=3)
    count = jnp.minimum(budget, lengths)[:, None, None]
    return ascending(jnp.where(jnp.arange(min(C, T)) < count, best[..., :C], -1), C)


def of_mask(keep: Bool[Array, "B T"], C: int, room: Int[Array, "B"] | None = None) -> Int[Array, "B 1 C"]:
    """Positions of the tokens that stay, the last `room` <= C of them where there are more, ascending, -1 behind."""
    T = keep.shape[1]
    newer = jnp.cumsum(keep[:, ::-1], axis=1)[:, ::-1]
    most = C if room is None else room[:, None]
    position = jnp.where(keep & (newer <= most), jnp.arange(T, dtype=jnp.int32), -1)
    return ascending(position[:, None], C)


def ascending(positions: Int[Array, "B K n"], C: int) -> Int[Array, "B K C"]:
    """Sorted, with -1 behind the others, cut or filled up to C."""
    last = jnp.iinfo(jnp.int32).max
    found = jnp.sort(jnp.where(positions < 0, last, positions), axis=-1)[..., :C]
    found = jnp.pad(found, ((0, 0), (0, 0), (0, C - found.shape[-1])), constant_values=last)
    return jnp.where(found == last, -1, found)


def marked(positions: Int[Array, "B K C"], T: int) -> Bool[Array, "B K T"]:
    """Which of T places are among the positions; -1 is none."""

    def mark(row: Int[Array, "C"]) -> Bool[Array, "T"]:
        return jnp.zeros(T, bool).at[jnp.where(row < 0, T, row)].set(True, mode="drop")

    return jax.vmap(jax.vmap(mark))(positions)
