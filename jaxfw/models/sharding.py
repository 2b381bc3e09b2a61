"""Where a decoder's parameters, caches and batches live on a mesh (axes: `jaxfw.core.mesh`).

Matrices are cut twice: the axis that meets the residual over `fsdp`, the other (heads, feed-forward width, vocabulary)
over `tensor`, so that a layer needs one sum over `tensor` behind attention and one behind the feed-forward. A head is
never cut: where heads do not divide, their projections are whole on every device of `tensor`. A vocabulary that does
not divide is cut by width instead; experts that do not, likewise.
"""

import jax
from jax.sharding import AbstractMesh, Mesh, NamedSharding

from jaxfw.core.mesh import BATCH_AXES, fit
from jaxfw.core.shapes import PyTree
from jaxfw.core.sharding import Rule, Spec
from jaxfw.nn.config import DecoderConfig

# "layers_3/..." and, stacked, "layers/..."
_LAYER = r"layers(_\d+)?/"
# Of a quantised matrix, which has its axes in both.
_PARTS = "(/values|/scale)?"
_SMALL = "small"
_INTO: tuple[Spec, ...] = (("fsdp", "tensor"), ("fsdp", None), (None, "tensor"), (None, None))
_OUT_OF: tuple[Spec, ...] = (("tensor", "fsdp"), (None, "fsdp"), ("tensor", None), (None, None))
_TABLE: tuple[Spec, ...] = (
    ("tensor", "fsdp"), (None, ("fsdp", "tensor")), ("tensor", None), (None, "fsdp"), (None, "tensor"), (None, None),
)  # fmt: skip
_VECTOR: tuple[Spec, ...] = (("tensor",), (None,))
# Of an adapter, whose other axis is its rank: as the kernel's inputs lie, and as its outputs do.
_A = {"fsdp": (("fsdp", None), (None, None)), "tensor": (("tensor", None), (None, None))}
_B = {"fsdp": ((None, "fsdp"), (None, None)), "tensor": ((None, "tensor"), (None, None))}


def _experts(into: bool) -> tuple[Spec, ...]:
    """For [E D F] or, out of the experts, [E F D]: E over `expert`, else D over it too."""
    cuts = (
        ("expert", "fsdp", "tensor"), (None, ("fsdp", "expert"), "tensor"), ("expert", "fsdp", None),
        (None, ("fsdp", "expert"), None), ("expert", None, "tensor"), (None, "fsdp", "tensor"), ("expert", None, None),
        (None, "fsdp", None), (None, None, "tensor"), (None, None, None),
    )  # fmt: skip
    return tuple((e, d, f) if into else (e, f, d) for e, d, f in cuts)


def decoder_rules(config: DecoderConfig) -> tuple[Rule, ...]:
    """The rules for every parameter of a decoder and of its adapters, dense or with experts, layers apart or stacked.

    A router with parameters of its own names needs a `Rule` beside these.
    """
    H, K = config.heads, config.kv_heads
    return (
        Rule(rf"embed/(embedding|positions)|head/lm_head{_PARTS}", _TABLE),
        Rule(rf"({_LAYER}(attn|mlp)_norm|head/norm)/(scale|bias)", ((None,),), why=_SMALL),
        Rule(rf"{_LAYER}attn/[qk]_norm/scale", ((None,),), why=_SMALL),
        Rule(rf"{_LAYER}attn/q/kernel{_PARTS}", _INTO, units=(None, H)),
        Rule(rf"{_LAYER}attn/[kv]/kernel{_PARTS}", _INTO, units=(None, K)),
        Rule(rf"{_LAYER}attn/o/kernel(/values)?", _OUT_OF, units=(H, None)),
        Rule(rf"{_LAYER}attn/o/kernel/scale", _OUT_OF),
        Rule(rf"{_LAYER}attn/q/bias", _VECTOR, units=(H,)),
        Rule(rf"{_LAYER}attn/[kv]/bias", _VECTOR, units=(K,)),
        Rule(rf"{_LAYER}(mlp|moe/shared)/(gate|up)/kernel{_PARTS}", _INTO),
        Rule(rf"{_LAYER}(mlp|moe/shared)/down/kernel{_PARTS}", _OUT_OF),
        Rule(rf"{_LAYER}mlp/(gate|up)/bias", _VECTOR),
        Rule(rf"{_LAYER}(attn/o|mlp/down)/bias", ((None,),), why=_SMALL),
        Rule(rf"{_LAYER}moe/(router|shared_gate)/kernel", (("fsdp", None), (None, None)), why=_SMALL),
        Rule(rf"{_LAYER}moe/router/scale", ((),), why=_SMALL),
        Rule(rf"{_LAYER}moe/experts/(gate|up){_PARTS}", _experts(into=True)),
        Rule(rf"{_LAYER}moe/experts/down{_PARTS}", _experts(into=False)),
        Rule(rf"{_LAYER}(attn/[qkv]|(mlp|moe/shared)/(gate|up)|moe/shared_gate)/kernel/a", _A["fsdp"]),
        Rule(rf"{_LAYER}attn/q/kernel/b", _B["tensor"], units=(None, H)),
        Rule(rf"{_LAYER}attn/[kv]/kernel/b", _B["tensor"], units=(None, K)),
        Rule(rf"{_LAYER}(mlp|moe/shared)/(gate|up)/kernel/b", _B["tensor"]),
        Rule(rf"{_LAYER}attn/o/kernel/a", _A["tensor"], units=(H, None)),
        Rule(rf"{_LAYER}(mlp|moe/shared)/down/kernel/a", _A["tensor"]),
        Rule(rf"{_LAYER}(attn/o|(mlp|moe/shared)/down)/kernel/b", _B["fsdp"]),
        Rule(rf"{_LAYER}moe/shared_gate/kernel/b", ((None, None),), why=_SMALL),
    )


# What routers remember of training, under `TrainState.state`: for `state_shardings(..., rules=ROUTER_STATES)`.
ROUTER_STATES = (Rule(r"routers/layers_\d+/\w+", ((None,),), why=_SMALL),)


def batch_shardings(mesh: Mesh | AbstractMesh, batch: PyTree) -> PyTree:
    """Rows, the first axis of every array, over `BATCH_AXES` as far as they divide (tokens, lengths, windows)."""
    return jax.tree.map(lambda x: NamedSharding(mesh, fit(mesh.shape, x.shape, _rows(x.ndim))), batch)


def state_spec(axes: int) -> Spec:
    """The layout of an array of a cache's state: it leads with rows, and one of three axes or more has heads second."""
    return (BATCH_AXES, "tensor", *[None] * (axes - 2)) if axes >= 3 else _rows(axes)


def cache_shardings(mesh: Mesh | AbstractMesh, cache: PyTree) -> PyTree:
    """Rows over `BATCH_AXES`, key heads over `tensor`, as far as they divide: see `state_spec`."""
    return jax.tree.map(lambda x: NamedSharding(mesh, fit(mesh.shape, x.shape, state_spec(x.ndim))), cache)


def _rows(axes: int) -> Spec:
    return (BATCH_AXES, *[None] * (axes - 1)) if axes else ()
