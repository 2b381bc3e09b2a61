"""Taps: read or change a named value inside the model, in one trace for all layers.

A tap is data, not a closure. Its layers and positions may be traced, its value is differentiable and can be vmapped,
and an equal new one does not retrace. A value passes its site once in every layer; the taps of a forward act on it in
the order in which they are given, so that a `Collect` behind an `Edit` sees what the edit made. docs/taps.md has the
table of sites with the names that other libraries give them.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxfw.core.errors import InputError, unknown
from jaxfw.core.shapes import Array, Bool, Float, Int
from jaxfw.models.cache.policy import Step
from jaxfw.nn.config import DecoderConfig

EDITS = ("set", "add", "scale", "lerp")
REDUCTIONS = (None, "mean", "second_moment")


class Site(NamedTuple):
    """A row of the table: the axes behind [B T], whether there is one a layer, and what may be done there.

    `kind` is what its numbers are: activations in the compute dtype, float32 statistics, or ids.
    """

    axes: str
    in_layers: bool = True
    can_edit: bool = True
    kind: str = "activation"

    @property
    def reductions(self) -> tuple[str | None, ...]:
        return (None,) if self.kind == "id" else REDUCTIONS


SITES = {
    "embed": Site("D", in_layers=False),
    "resid/in": Site("D"),
    "attn/in": Site("D"),
    "attn/q_pre": Site("H d"),
    "attn/k_pre": Site("K d"),
    "attn/q": Site("H d"),
    "attn/k": Site("K d"),
    "attn/v": Site("K d"),
    "attn/lse": Site("H", can_edit=False, kind="statistic"),
    "attn/head_out": Site("H d"),
    "attn/out": Site("D"),
    "resid/mid": Site("D"),
    "mlp/in": Site("D"),
    "moe/probs": Site("E", can_edit=False, kind="statistic"),
    "moe/ids": Site("k", can_edit=False, kind="id"),
    "mlp/key": Site("F"),
    "mlp/out": Site("D"),
    "resid/out": Site("D"),
    "final": Site("D", in_layers=False),
}


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Edit:
    """Change what passes a site.

    Attributes:
        site: a name of the table.
        value: what to set, add, scale by, or move towards. It broadcasts to [B T ...] and the site's axes, or with
            `pos` to [B P ...].
        op: "set" x = value, "add" x + value, "scale" x * value, "lerp" x + weight * (value - x).
        layers: first and last layer, both included; None is all.
        pos: true positions of each row to change, -1 for none; None is all tokens.
        rows: which rows to change; None is all.
        weight: of "lerp", a number or an array that broadcasts like `value`.
    """

    site: str = dataclasses.field(metadata={"static": True})
    value: Float[Array, "..."]
    op: str = dataclasses.field(default="set", metadata={"static": True})
    layers: tuple[Int, Int] | None = None
    pos: Int[Array, "B P"] | None = None
    rows: Bool[Array, "B"] | None = None
    weight: Float[Array, "..."] | None = None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Collect:
    """Return what passes a site: `Output.taps` holds one entry for each `Collect`, in order.

    Attributes:
        site: a name of the table.
        layers: first and last layer, both included; None is all. Static: n layers are returned.
        reduce: None returns [n B T ...] (junk where a token is padding); "mean" and "second_moment" reduce over the
            valid tokens of the batch in float32 and return a `Moment`, with a site of several axes flattened to F.
        pos: true positions to take, [B P], -1 for none: returns [n B P ...], zeros where a position is not among the
            tokens of this call; a reduction takes these tokens only.

    Sites outside of the layers (embed, final) have no axis n. A layer that lacks the site (moe/probs in a dense one,
    mlp/key in one with experts) has zeros.
    """

    site: str = dataclasses.field(metadata={"static": True})
    layers: tuple[int, int] | None = dataclasses.field(default=None, metadata={"static": True})
    reduce: str | None = dataclasses.field(default=None, metadata={"static": True})
    pos: Int[Array, "B P"] | None = None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Moment:
    """A mean over `count` tokens: of x [n F], or of its products with itself [n F F].

    Without the axis n where the site is outside of the layers. The sum of two batches' is that of all their tokens.
    """

    value: Float[Array, "n ..."]
    count: Float[Array, "n"]

    def __add__(self, other: "Moment") -> "Moment":
        """The mean over the tokens of both."""
        count = self.count + other.count
        share = other.count / jnp.maximum(count, 1)
        share = share.reshape(*share.shape, *[1] * (self.value.ndim - share.ndim))
        return Moment(self.value + share * (other.value - self.value), count)


Tap = Edit | Collect
Taps = Sequence[Tap]


def validate(config: DecoderConfig, taps: Taps, B: int, T: int) -> None:
    """Check every tap against the table and the shapes of this call.

    Raises:
        InputError: an unknown site, operation or reduction, layers that the model lacks, a value of the wrong shape.
    """
    if isinstance(taps, Edit | Collect):
        raise InputError(f"taps={taps!r:.80} must be a list of taps: put it in brackets.")
    for i, tap in enumerate(taps):
        name = f"taps[{i}]"
        if not isinstance(tap, Edit | Collect):
            raise InputError(f"{name}={tap!r:.80} must be an Edit or a Collect of jaxfw.models.")
        if tap.site not in SITES:
            raise unknown(f"{name}.site", tap.site, SITES)
        _check_layers(config, name, tap)
        _check_array(
            f"{name}.pos", tap.pos, np.integer, ((B, None), (1, None)), f"[B P] = [{B}, P] true positions, -1 for none"
        )
        if isinstance(tap, Collect):
            _check_reduction(name, tap)
        else:
            _check_edit(config, name, tap, B, T)


def _check_array(field: str, x: Any, kind: type, shapes: Sequence[tuple[int | None, ...]], wanted: str) -> None:
    """Refuse what is no array of this kind and of one of these shapes; None stands for any size."""
    if x is None:
        return
    given = getattr(x, "shape", None)
    if given is None:
        raise InputError(f"{field}={x!r:.80} must be an array: give {wanted}.")
    fits = any(len(given) == len(s) and all(b in (a, None) for a, b in zip(given, s)) for s in shapes)
    if not fits or not jnp.issubdtype(x.dtype, kind):
        raise InputError(f"{field} is {x.dtype} of shape {list(given)}: give {wanted}.")


def _check_reduction(name: str, tap: Collect) -> None:
    known = SITES[tap.site].reductions
    if tap.reduce not in known:
        takes = ", ".join(map(repr, known))
        raise InputError(f"{name}.reduce={tap.reduce!r} is not possible at {tap.site!r}: it takes {takes}.")


def _check_edit(config: DecoderConfig, name: str, tap: Edit, B: int, T: int) -> None:
    if tap.op not in EDITS:
        raise unknown(f"{name}.op", tap.op, EDITS)
    if not SITES[tap.site].can_edit:
        raise InputError(f"{name}: {tap.site!r} can only be collected, not edited (op={tap.op!r}).")
    if (tap.op == "lerp") != (tap.weight is not None):
        raise InputError(f"{name}: op='lerp' and weight= go together; got op={tap.op!r}, weight={tap.weight!r:.40}.")
    _check_array(f"{name}.rows", tap.rows, np.bool_, ((B,),), f"one boolean for each of {B} rows")
    tokens, axis = (T, "T") if tap.pos is None else (tap.pos.shape[1], "P")
    wanted = (B, tokens, *_dims(config, tap.site))
    for field in ("value", "weight"):
        x = getattr(tap, field)
        if not (x is None or hasattr(x, "shape") or isinstance(x, int | float)) or jnp.iscomplexobj(x):
            raise InputError(f"{name}.{field}={x!r:.60} must be a number or a real array: wrap it in jnp.asarray.")
        given = () if x is None else np.shape(x)
        if not _broadcasts(given, wanted):
            raise InputError(
                f"{name}.{field} has shape {list(given)}, which does not broadcast to "
                f"[B {axis} {SITES[tap.site].axes}] = {list(wanted)} of {tap.site!r}."
            )


def _broadcasts(given: tuple[int, ...], wanted: tuple[int, ...]) -> bool:
    try:
        return np.broadcast_shapes(given, wanted) == wanted
    except ValueError:
        return False


def _check_layers(config: DecoderConfig, name: str, tap: Tap) -> None:
    layers, known = tap.layers, []
    if layers is not None:
        if not SITES[tap.site].in_layers:
            raise InputError(f"{name}.layers={layers}: {tap.site!r} is outside of the layers; leave layers out.")
        if not isinstance(layers, tuple | list) or len(layers) != 2:
            raise InputError(f"{name}.layers={layers!r} must be (first, last), both included.")
        known = [x for x in layers if isinstance(x, int | np.integer)]
        if isinstance(tap, Collect) and len(known) != 2:
            raise InputError(f"{name}.layers={layers!r} of a Collect are static: give two whole numbers.")
        if any(not 0 <= x < config.layers for x in known) or (len(known) == 2 and known[0] > known[1]):
            raise InputError(f"{name}.layers={layers!r} must be (first, last) within 0..{config.layers - 1}.")
    first, last = known if len(known) == 2 else (0, config.layers - 1)
    if not any(_is_at(config, tap.site, i) for i in range(first, last + 1)):
        lacks = "experts" if tap.site.startswith("moe/") else "a dense feed-forward"
        raise InputError(f"{name}: no layer of {first}..{last} has {tap.site!r}, since none has {lacks}.")


def _is_at(config: DecoderConfig, site: str, layer: int) -> bool:
    """Whether a layer passes a site: routers are in some layers, dense feed-forwards in the others."""
    if site == "mlp/key" or site.startswith("moe/"):
        has_experts = config.moe is not None and config.moe.is_in(layer)
        return has_experts == site.startswith("moe/")
    return True


def _dims(config: DecoderConfig, site: str) -> tuple[int, ...]:
    """The sizes behind [B T] at a site."""
    c = config
    sizes = {"D": c.width, "H": c.heads, "K": c.kv_heads, "d": c.head_dim, "F": c.ffn}
    if c.moe is not None:
        sizes |= {"E": c.moe.experts, "k": c.moe.per_token}
    return tuple(sizes[axis] for axis in SITES[site].axes.split())


def wants(taps: Taps, site: str) -> bool:
    """Whether any tap is at this site: what only taps read is not computed without one."""
    return any(tap.site == site for tap in taps)


def empty(config: DecoderConfig, taps: Taps, B: int, T: int) -> tuple[Any, ...]:
    """Where the layers put what each `Collect` takes: zeros of the final shapes."""
    kinds = {"activation": jnp.dtype(config.dtype), "statistic": jnp.dtype("float32"), "id": jnp.dtype("int32")}
    out = []
    for tap in taps:
        if isinstance(tap, Collect):
            site, dims = SITES[tap.site], _dims(config, tap.site)
            n = (_count_layers(config, tap),) if site.in_layers else ()
            F = int(np.prod(dims))
            if tap.reduce is None:
                P = T if tap.pos is None else tap.pos.shape[1]
                out.append(jnp.zeros((*n, B, P, *dims), kinds[site.kind]))
            else:
                shape = (F,) if tap.reduce == "mean" else (F, F)
                out.append(Moment(jnp.zeros((*n, *shape), jnp.float32), jnp.zeros(n, jnp.float32)))
    return tuple(out)


def _count_layers(config: DecoderConfig, tap: Collect) -> int:
    first, last = tap.layers or (0, config.layers - 1)
    return last - first + 1


class Sites:
    """The sites of one layer (or of what is outside of them): lives within a trace, and holds what was collected."""

    def __init__(self, taps: Taps, step: Step, collected: tuple[Any, ...] = ()):
        self.taps, self.step, self.collected = taps, step, list(collected)

    def __call__(self, site: str, x: Array) -> Array:
        """What goes on behind the site, [B T ...]."""
        if not self.taps:
            return x
        number = 0
        for tap in self.taps:
            if isinstance(tap, Edit):
                if tap.site == site:
                    x = _edited(tap, x, self.step)
            else:
                if tap.site == site:
                    self.collected[number] = _collected(tap, x, self.step, self.collected[number])
                number += 1
        return x


def _edited(edit: Edit, x: Array, step: Step) -> Array:
    B, T, *dims = x.shape
    value = edit.value
    weight = jnp.float32(1) if edit.weight is None else edit.weight  # only read by "lerp", which has one
    if edit.pos is None:
        is_edited = jnp.ones((B, T), bool)
    else:
        found = step.positions[:, :, None] == edit.pos[:, None, :]
        is_edited = jnp.any(found, axis=-1)
        value, weight = (_at(field, found, dims) for field in (value, weight))
    if edit.layers is not None:
        first, last = edit.layers
        is_edited &= (first <= step.layer) & (step.layer <= last)
    if edit.rows is not None:
        is_edited &= jnp.asarray(edit.rows)[:, None]
    if edit.op == "set":
        new = jnp.broadcast_to(value, x.shape)
    elif edit.op == "add":
        new = x + value
    elif edit.op == "scale":
        new = x * value
    else:
        new = x + weight * (value - x)
    return jnp.where(is_edited.reshape(B, T, *[1] * len(dims)), new.astype(x.dtype), x)


def _at(value: Array, found: Bool[Array, "B T P"], dims: Sequence[int]) -> Array:
    """What of `value` [B P ...] belongs to each of the T tokens."""
    B, T, P = found.shape
    value = jnp.broadcast_to(value, (B, P, *dims))
    index = jnp.argmax(found, axis=-1).reshape(B, T, *[1] * len(dims))
    return jnp.take_along_axis(value, index, axis=1)


def _collected(tap: Collect, x: Array, step: Step, held: Any) -> Any:
    """`held` with this layer's part in its place, unchanged where the layer is not asked for."""
    if not SITES[tap.site].in_layers:
        return _taken(tap, x, step)
    first, last = tap.layers or (0, None)
    n = jax.tree.leaves(held)[0].shape[0]
    last = first + n - 1 if last is None else last

    def put(held: Any) -> Any:
        at = jnp.clip(step.layer - first, 0, n - 1)
        parts = _taken(tap, x, step)
        if jax.tree.map(jnp.shape, parts) != jax.tree.map(lambda buffer: buffer.shape[1:], held):
            raise InputError(
                f"{tap.site!r} holds {list(x.shape)} here, not what the config says: collect ids by the config's own "
                "router, whose k is model.moe.per_token."
            )
        return jax.tree.map(lambda buffer, part: buffer.at[at].set(part.astype(buffer.dtype)), held, parts)

    if isinstance(step.layer, int | np.integer):
        return put(held) if first <= step.layer <= last else held
    return jax.lax.cond((first <= step.layer) & (step.layer <= last), put, lambda held: held, held)


def _taken(tap: Collect, x: Array, step: Step) -> Any:
    B, T, *dims = x.shape
    valid = step.valid
    if tap.pos is not None:
        found = (step.positions[:, None, :] == tap.pos[:, :, None]) & valid[:, None, :]
        valid = jnp.any(found, axis=-1)
        index = jnp.argmax(found, axis=-1).reshape(B, -1, *[1] * len(dims))
        x = jnp.where(valid.reshape(*valid.shape, *[1] * len(dims)), jnp.take_along_axis(x, index, axis=1), 0)
    if tap.reduce is None:
        return x
    count = jnp.sum(valid, dtype=jnp.float32)
    flat = x.astype(jnp.float32).reshape(*x.shape[:2], -1)
    flat = jnp.where(valid[..., None], flat, 0)  # padding may hold anything, infinities too
    if tap.reduce == "mean":
        total = jnp.sum(flat, axis=(0, 1))
    else:
        total = jnp.einsum("BTF,BTf->Ff", flat, flat, precision="highest")
    return Moment(total / jnp.maximum(count, 1), count)
