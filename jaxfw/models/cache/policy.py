"""The contract between a decoder and what remembers its keys and values.

A policy is static (frozen, hashable, no arrays); a state is a pytree, one per layer. `prefill` sees a whole prompt and
returns the first state; `extend` adds tokens to a state and keeps its tree and shapes, so that a decode loop can carry
it. Rows are canonical: each row's valid tokens come first, `Step.lengths` says how many.

Every array of a state leads with the batch axis, and one of three axes or more has its key heads second: that is how
rows are taken and how states are laid out on a mesh, whatever the policy.
"""

import dataclasses
from typing import Any, Protocol

import jax
import jax.numpy as jnp

from jaxfw.core.shapes import Array, Bool, Float, Int, PRNGKeyArray, PyTree
from jaxfw.ops.rope import Rope

State = Any  # a pytree; each policy has its own


@dataclasses.dataclass(frozen=True)
class AttentionSpec:
    """What is static about a layer's attention: K key heads of width d, the scale, the rotation, the precision.

    A query reads the last `window` positions, its own among them; None is all.
    """

    kv_heads: int
    head_dim: int
    scale: float
    rope: Rope | None
    softmax_dtype: str
    window: int | None = None

    @property
    def options(self) -> dict[str, Any]:
        """The keywords of `attend` (`jaxfw.ops.attention`), `attend_first` and `attend_slots` (`jaxfw.ops.slots`)."""
        return {"scale": self.scale, "softmax_dtype": jnp.dtype(self.softmax_dtype), "window": self.window}


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class QKV:
    """What a policy may read of a layer; jit drops what it does not.

    `q_pre` and `k_pre` are before rotation, `hidden` is the layer's normalised input, `w_o` the output projection.
    """

    q: Float[Array, "B T H d"]
    k: Float[Array, "B T K d"]
    v: Float[Array, "B T K d"]
    q_pre: Float[Array, "B T H d"]
    k_pre: Float[Array, "B T K d"]
    hidden: Float[Array, "B T D"]
    w_o: Float[Array, "H*d D"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Step:
    """The tokens of one call: their true positions, how many of each row are valid, which layer reads this.

    `unit_id` says which unit (a shot, a sentence) a token belongs to, -1 for none. `key` holds a random key a row, the
    same for all calls of a generation: a policy that draws folds in the layer and the position, so that a row draws
    the same alone, in a batch, at once or token by token.

    `segment_ids` number the documents of packed rows, 0 is padding: positions restart in each, and a query reads its
    own document only. Such a step goes without a cache.
    """

    positions: Int[Array, "B T"]
    lengths: Int[Array, "B"]
    layer: Int[Array, ""]
    tokens: Int[Array, "B T"] | None = None
    unit_id: Int[Array, "B T"] | None = None
    key: PRNGKeyArray | None = None
    segment_ids: Int[Array, "B T"] | None = None

    @property
    def valid(self) -> Bool[Array, "B T"]:
        """Which tokens are not padding."""
        within = jnp.arange(self.positions.shape[1]) < self.lengths[:, None]
        return within if self.segment_ids is None else within & (self.segment_ids > 0)

    @property
    def starts(self) -> Int[Array, "B T"] | None:
        """The column at which each token's document begins; None where rows are one document each."""
        if self.segment_ids is None:
            return None
        return jnp.arange(self.positions.shape[1], dtype=jnp.int32) - self.positions


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Cache:
    """The states of all layers, and what they share (None for most policies), whose arrays lead with B like theirs."""

    layers: tuple[State, ...]
    shared: PyTree | None = None

    @property
    def seen(self) -> Int[Array, "B"]:
        """Tokens that each row has been given: the position of its next one."""
        return self.layers[0].seen

    @property
    def nbytes(self) -> int:
        """Bytes of every array held, from shapes alone (works on abstract values)."""
        return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(self))

    def rows(self, index: Int[Array, "B2"]) -> "Cache":
        """The cache of the rows `index`, each 0..B-1: gathered, reordered or repeated (beams, shared prefixes)."""
        return jax.tree.map(lambda x: jnp.take(x, index, axis=0), self)


class CachePolicy(Protocol):
    """What `jaxfw.models.forward`, `layer` and `jaxfw.generate` ask of a policy."""

    @property
    def reads_previous(self) -> bool:
        """Whether a layer looks at the state of the one below. If not, it is given None: one trace for all layers."""
        ...

    def at(self, layer: int) -> "CachePolicy":
        """The policy of one layer. Equal policies share one compiled layer."""
        ...

    def empty(self, batch: int, *, spec: AttentionSpec, prompt: int, new: int, dtype: Any) -> State:
        """A layer's state with nothing seen and room for `prompt` + `new` tokens."""
        ...

    def prefill(
        self, qkv: QKV, step: Step, *, spec: AttentionSpec, room: int, previous: State | None = None
    ) -> tuple[Float[Array, "B T H d"], State]:
        """Attention over a prompt, and a state with room for `room` tokens in all (a static number).

        A policy with the attribute `keeps_part` = True is given the width T that the prompt is padded to and `room` - T
        tokens behind it at most; others may have more behind a prompt that is shorter than T.

        `previous` is the state of the layer below, for policies that reuse its choice; None in the first layer.
        """
        ...

    def extend(
        self,
        state: State,
        qkv: QKV,
        step: Step,
        *,
        spec: AttentionSpec,
        previous: State | None = None,
        shared: PyTree | None = None,
        write: bool = True,
    ) -> tuple[Float[Array, "B T H d"], State]:
        """Attention of T >= 1 further tokens to what is kept and to each other; same tree and shapes.

        `shared` is what `finish` left for all layers, read only. With `write` False the state that comes back is the
        one that was given. A state whose `seen` was taken back by one is given its last token once more, to be read in
        place of what is held of it.
        """
        ...

    def finish(self, states: tuple[State, ...], step: Step) -> Cache:
        """Called once after a prefill with the states of all layers, for budgets across layers and shared pools."""
        ...
