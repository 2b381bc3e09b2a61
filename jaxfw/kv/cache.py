"""The cache policy: a prompt is read in full, what a method chooses of it stays; then text is generated behind that.

Four axes, each a value: what scores tokens, in which pieces they are cut, how layers share a budget, and what is
forgotten while generating.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxfw.core.errors import InputError, unknown
from jaxfw.core.shapes import Array, Bool, Float, Int
from jaxfw.kv.budgets import LayerBudget, Uniform, wanted
from jaxfw.kv.decoding import Decode, Grow, Newest
from jaxfw.kv.forgetting import attend_step, forget
from jaxfw.kv.granularity import Chunks, Granularity, Tokens, Units
from jaxfw.kv.scorers import Context, Scorer, Scores, Sinks
from jaxfw.kv.scorers.mass import column_mass
from jaxfw.kv.selection import ascending
from jaxfw.kv.state import KVState, padded, taken, written
from jaxfw.kv.units import SEGMENTERS, Spans
from jaxfw.models.cache import QKV, AttentionSpec, Cache, Step
from jaxfw.models.cache.full import check_room
from jaxfw.ops.attention import attend
from jaxfw.ops.rope import rotate, rotation
from jaxfw.ops.slots import attend_first, attend_slots, write_slots

TOKENS, UNIFORM, GROW = Tokens(), Uniform(), Grow()


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PendingState:
    """A layer's whole prompt, until all layers have been read; `value` are scores of tokens."""

    k: Float[Array, "B K T d"]
    v: Float[Array, "B K T d"]
    value: Float[Array, "B #K T"]
    protected: Bool[Array, "B T"] | None
    seen: Int[Array, "B"]
    new: int = dataclasses.field(metadata={"static": True})


@dataclasses.dataclass(frozen=True)
class KVCache:
    """Keeps of each prompt a share `keep`, or `budget` tokens, in a model of `layers` layers.

    A prompt is attended to in full. Budgets are of each row's own length. `reassign` puts the first tokens right before
    the others, as StreamingLLM does: their keys are rotated anew as the text goes on. `units` says how texts are cut,
    where whole units stay (`jaxfw.kv.units`).
    """

    scorer: Scorer
    granularity: Granularity = TOKENS
    layer_budget: LayerBudget = UNIFORM
    decode: Decode = GROW
    keep: float | None = None
    budget: int | None = None
    reassign: bool = False
    units: str = "blocks"
    layers: int = 1
    layer: int = 0
    keeps_part = True

    def __post_init__(self):
        if (self.keep is None) == (self.budget is None):
            raise InputError(
                f"keep={self.keep!r} and budget={self.budget!r}: give one of them, as in @keep=0.3 (the share of the "
                "prompt that stays) or @budget=256 (tokens)."
            )
        if self.keep is not None and not 0 < self.keep <= 1:
            raise InputError(f"keep={self.keep} must lie in (0, 1]: the share of the prompt that stays, not that goes.")
        if self.budget is not None and self.budget < 1:
            raise InputError(f"budget={self.budget} must be at least 1 token.")
        if self.units not in SEGMENTERS:
            raise unknown("units", self.units, SEGMENTERS)
        slides = isinstance(self.decode, Newest) and self.scorer == Sinks(self.decode.sinks)
        if self.reassign and not (slides and isinstance(self.granularity, Tokens)):
            raise InputError(
                "reassign=True moves the first tokens along with a sliding window: it needs the method streaming, "
                f"token by token, and decode=newest with as many sinks; this is {self.scorer}, {self.granularity}, "
                f"{self.decode}: or take reassign=false."
            )
        if self._is_global and self.decode.score == "sum":
            raise InputError(
                f"scope=global does not go with {self.decode}, which sums attention: take scope=layer, or decode=grow."
            )
        if self._reuse > 1 and self.layer_budget.by_layer:
            raise InputError(
                f"reuse={self._reuse} takes over the choice of the layer below, and layers={self.layer_budget} keeps "
                "another number in each: take reuse=1, or layers=uniform."
            )
        if self._is_global and self.layer_budget.by_layer:
            raise InputError(
                f"scope=global is one choice for all layers, and layers={self.layer_budget} wants as many as there are "
                "layers: take scope=layer, or layers=uniform."
            )

    @property
    def reads_previous(self) -> bool:
        """Whether layers take over the choice of the one below."""
        return self._reuse > 1

    @property
    def _reuse(self) -> int:
        return self.granularity.reuse if isinstance(self.granularity, Chunks) else 1

    @property
    def _is_global(self) -> bool:
        return isinstance(self.granularity, Units) and self.granularity.scope == "global"

    def spans(self, text: str) -> Spans:
        """Where the units of a text lie, for `LM.generate`.

        Raises:
            InputError: it has none, and whole units are to stay.
        """
        found = SEGMENTERS[self.units](text)
        if not found and isinstance(self.granularity, Units):
            others = " or ".join(name for name in SEGMENTERS if name != self.units)
            raise InputError(
                f"the text {text[-40:]!r} has no {self.units} that end, and {self.scorer} chooses among whole ones: "
                f"take units={others} in the method's brackets, give units=, or take a method that keeps tokens."
            )
        return found

    def at(self, layer: int) -> "KVCache":
        """The policy of one layer; where layers do not differ, it is the same."""
        if self.layer_budget.by_layer:
            if layer >= self.layers:
                raise InputError(
                    f"layers={self.layer_budget} shares a budget among {self.layers} layers, and the model has layer "
                    f"{layer}: give their number, as in parse(text, layers=config.layers)."
                )
            return dataclasses.replace(self, layer=layer)
        return dataclasses.replace(self, layer=layer % self._reuse)

    def kept(self, T: int) -> Int[np.ndarray, "T+1"]:
        """Tokens that this layer keeps of prompts of 0..T tokens: at least one, at most all."""
        share = wanted(self.keep, self.budget, T)
        table = self.layer_budget.table(share, layer=self.layer, layers=self.layers)
        table = self.granularity.rounded(table if self.layer_budget.by_layer else share, table)
        return np.clip(table, 1, np.maximum(np.arange(T + 1), 1)).astype(np.int32)

    def empty(self, batch: int, *, spec: AttentionSpec, prompt: int, new: int, dtype) -> KVState:
        """Nothing seen, with the slots that a prompt of `prompt` tokens and `new` more take."""
        B, K, d, C = batch, spec.kv_heads, spec.head_dim, self._slots(prompt)
        S = self._size(C, prompt, new)
        nothing, zero = jnp.full((B, K, S), -1, jnp.int32), jnp.zeros(B, jnp.int32)
        kv = jnp.zeros((B, K, S, d), dtype)
        state = KVState(kv, kv, nothing, zero, zero, zero, zero, jnp.full(B, self.budget or C, jnp.int32))
        sinks = jnp.zeros((B, K, self.decode.sinks, d), dtype) if self.reassign else None
        return self._with_extras(state, jnp.zeros((B, K, S), jnp.float32), sinks)

    def prefill(self, qkv: QKV, step: Step, *, spec: AttentionSpec, room: int, previous: Any = None):
        """Causal attention over the prompt; then only what is chosen of it stays, with slots for what may follow."""
        T = qkv.k.shape[1]
        k, v = (jnp.swapaxes(x, 1, 2) for x in (qkv.k, qkv.v))
        out = attend(qkv.q, k, v, **spec.options)
        c = Context(qkv, step, spec, jnp.asarray(self.kept(T))[step.lengths])
        if self._is_global:
            scores = self.scorer(c)
            return out, PendingState(k, v, scores.value, scores.protected, step.lengths, room - T)
        return out, self._held(c, k, v, room - T, previous)

    def extend(
        self, state: KVState, qkv: QKV, step: Step, *, spec: AttentionSpec, previous=None, shared=None, write=True
    ):
        """Attention to what is held and to the new tokens; then what the decode policy forgets is gone.

        Several tokens are read as one after another. With `write` False a token at a position that is held already is
        read in place of that one.
        """
        k, v = (jnp.swapaxes(x, 1, 2) for x in (qkv.k, qkv.v))
        if not self.decode.evicts:
            return self._appended(state, qkv, k, v, step, spec, write)
        if k.shape[2] == 1:
            return self._stepped(state, qkv.q, k, v, qkv.k_pre, step.positions, step.valid, spec, write)

        def one(state: KVState, parts):
            q, k, v, k_pre, at, valid = parts
            k, v = k[:, :, None], v[:, :, None]
            out, state = self._stepped(state, q[:, None], k, v, k_pre[:, None], at[:, None], valid[:, None], spec, True)
            return state, out[:, 0]

        q, k_pre, at, valid = (jnp.moveaxis(x, 1, 0) for x in (qkv.q, qkv.k_pre, step.positions, step.valid))
        parts = (q, *(jnp.moveaxis(x, 2, 0) for x in (k, v)), k_pre, at, valid)
        after, outs = jax.lax.scan(one, state, parts)
        return jnp.moveaxis(outs, 0, 1), after if write else state

    def finish(self, states: tuple[Any, ...], step: Step) -> Cache:
        """One choice of units for all layers, where that was asked for."""
        if not self._is_global:
            return Cache(states)
        T = states[0].k.shape[2]
        budget = jnp.asarray(self.kept(T))[step.lengths]
        value = functools.reduce(jnp.add, (state.value for state in states))
        scores = Scores(value, states[0].protected)
        positions = self.granularity.choose(scores, step, budget, self._slots(T))
        return Cache(tuple(self._compacted(one.k, one.v, positions, step, one.new, None) for one in states))

    def _held(self, c: Context, k: Array, v: Array, new: int, previous: Any) -> Any:
        """The state of a layer whose prompt has been read."""
        positions = self._chosen(c, previous)
        if self.decode.is_shared and self.decode.region == "all" and positions.shape[1] > 1:
            raise InputError(
                f"{self.decode} makes one choice for all heads, and {self.scorer} keeps other tokens of the prompt in "
                "each: take the method tova, another decode=, or by=chunks."
            )
        return self._compacted(k, v, positions, c.step, new, c.qkv.k_pre, self._sums(c))

    def _chosen(self, c: Context, previous: Any) -> Int[Array, "B #K C"]:
        """The positions that stay, or those of the layer below."""
        C = self._slots(c.qkv.k.shape[1])
        if self.layer and not self.layer_budget.by_layer:
            assert previous is not None
            return ascending(previous.kept_positions[:, :1], C)
        return self.granularity.choose(self.scorer(c), c.step, c.budget, C)

    def _sums(self, c: Context) -> Float[Array, "B K T"] | None:
        """Attention that each token received, if decoding goes on from there: summed over a group, as a step's is."""
        return column_mass(c) * (c.qkv.q.shape[2] // c.spec.kv_heads) if self.decode.score == "sum" else None

    def _slots(self, T: int) -> int:
        return self.granularity.slots(self.kept(T))

    def _size(self, C: int, T: int, new: int) -> int:
        """Slots in all."""
        if self.decode.region == "all" and self.budget is not None:
            C = max(C, min(self.budget, T + new))
        return C + self.decode.room(new)

    def _compacted(
        self, k: Array, v: Array, positions: Int[Array, "B #K C"], step: Step, new: int, k_pre: Array | None,
        sums: Array | None = None,
    ) -> KVState:  # fmt: skip
        """The state that holds the tokens at `positions` of a prompt."""
        T = k.shape[2]
        S = self._size(positions.shape[2], T, new)
        held = jnp.sum(positions[:, 0] >= 0, axis=1, dtype=jnp.int32)
        kept = padded(jnp.broadcast_to(positions, (*k.shape[:2], positions.shape[2])), S, -1)
        limit = held if self.budget is None else jnp.maximum(held, self.budget)
        state = KVState(
            padded(taken(k, positions), S), padded(taken(v, positions), S), kept, held, step.lengths, step.lengths,
            held, limit,
        )  # fmt: skip
        score = jnp.zeros(kept.shape, jnp.float32) if sums is None else padded(taken(sums, positions), S)
        sinks = None
        if k_pre is not None and self.reassign:
            first = jnp.swapaxes(k_pre[:, : self.decode.sinks], 1, 2)
            sinks = padded(first, self.decode.sinks)
        return self._with_extras(state, score.astype(jnp.float32), sinks)

    def _with_extras(self, state: KVState, score: Array, sinks: Array | None) -> KVState:
        decode, heads = self.decode, state.k.shape[:2]
        return dataclasses.replace(
            state,
            free=jnp.broadcast_to(state.held[:, None, None], (*heads, 1)) if decode.evicts else None,
            score=score if decode.score == "sum" else None,
            waited=jnp.zeros_like(state.held) if decode.wait else None,
            sinks=sinks,
        )

    def _appended(self, state: KVState, new: QKV, k: Array, v: Array, step: Step, spec: AttentionSpec, write: bool):
        if not write:
            return _read_beside(state, state.k, new.q, k, v, step.positions, spec), state
        check_room(state.held, step.lengths, state.S)
        after = written(state, k, v, step.positions, step.valid)
        if k.shape[2] == 1 and spec.window is None:
            return attend_first(new.q, after.k, after.v, state.held + 1, **spec.options), after
        return attend_slots(new.q, after.k, after.v, after.kept_positions, step.positions, **spec.options), after

    def _stepped(
        self, state: KVState, q: Array, k: Array, v: Array, k_pre: Array, at: Int[Array, "B 1"],
        valid: Bool[Array, "B 1"], spec: AttentionSpec, write: bool,
    ) -> tuple[Float[Array, "B 1 H d"], KVState]:  # fmt: skip
        """One token: written, attended by, and something forgotten."""
        if not write:
            return _read_beside(state, self._keys(state, spec), q, k, v, at, spec), state
        after = written(state, k, v, at, valid)
        if after.sinks is not None:
            slot = jnp.where(valid & (at < self.decode.sinks), at, self.decode.sinks)[:, None]
            after = dataclasses.replace(after, sinks=write_slots(after.sinks, jnp.swapaxes(k_pre, 1, 2), slot))
            after = dataclasses.replace(after, k=self._keys(after, spec))
        out, mass = attend_step(q, after, state.held + 1, at, spec, with_mass=self.decode.score != "age")
        return out, forget(after, self.decode, mass, valid[:, 0])

    def _keys(self, state: KVState, spec: AttentionSpec) -> Array:
        """Keys, the first of them where they would stand had nothing between them and the others been forgotten."""
        if state.sinks is None:
            return state.k
        if spec.rope is None or spec.rope.kind == "dynamic":
            kind = "no rotary embedding" if spec.rope is None else "one that stretches with the text"
            raise InputError(
                f"reassign=True rotates keys anew, and this model has {kind}: take streaming(reassign=false)."
            )
        n = min(self.decode.sinks, state.S)
        at = state.kept_positions
        # A token that is read once more is held, and not seen.
        count = jnp.sum((at[:, 0] >= 0) & (at[:, 0] < state.seen[:, None]), axis=1)
        places = (state.seen - count)[:, None] + jnp.arange(n)
        cos, sin = rotation(spec.rope, places, width=spec.head_dim, seq_len=state.seen)
        turned = jnp.swapaxes(rotate(jnp.swapaxes(state.sinks[:, :, :n], 1, 2), cos, sin), 1, 2)
        slots = jnp.where(at[..., :n] == jnp.arange(n), jnp.arange(n), state.S + jnp.arange(n))
        return write_slots(state.k, turned, slots)


def _read_beside(state: KVState, held_k: Array, q, k, v, at: Int[Array, "B T"], spec: AttentionSpec):
    """Attention to what is held before the first of the new tokens, and to these, none of which is written."""
    held = jnp.where(state.kept_positions < at[:, :1, None], state.kept_positions, -1)
    positions = jnp.concatenate([held, jnp.broadcast_to(at[:, None], k.shape[:3])], axis=2)
    k, v = jnp.concatenate([held_k, k], axis=2), jnp.concatenate([state.v, v], axis=2)
    return attend_slots(q, k, v, positions, at, **spec.options)
