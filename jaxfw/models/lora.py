"""Adapters of low rank (LoRA: Hu et al. 2021, arXiv:2106.09685): which kernels, fresh ones, how they join a model.

Adapters are a tree with the nesting of the parameters, in which only adapted kernels appear:

    {"layers_0": {"attn": {"q": {"kernel": {"a": [D R], "b": [R F]}}}}, ...}

Stacked layers have {"layers": ...} with a leading axis L in both. Every key is folded with the number of the layer and
the name of the module, so that stacked layers draw what those apart draw.
"""

import dataclasses
import math
import re
import zlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict

from jaxfw.core.errors import InputError
from jaxfw.core.shapes import Array, PRNGKeyArray, PyTree
from jaxfw.ops.adapted import Adapted, low_rank
from jaxfw.ops.quant import Quantised

_LAYER = r"layers(_\d+)?/"
# Names for `LoRAConfig.targets`; the first is what the paper adapts.
TARGETS = {
    "qv": rf"{_LAYER}attn/[qv]/kernel",
    "attention": rf"{_LAYER}attn/[qkvo]/kernel",
    "all": rf"{_LAYER}(attn/[qkvo]|(mlp|moe/shared)/(gate|up|down))/kernel",
}
KERNELS = re.compile(rf"{_LAYER}(attn/[qkvo]|(mlp|moe/shared)/(gate|up|down)|moe/shared_gate)/kernel")


@dataclasses.dataclass(frozen=True)
class LoRAConfig:
    r"""How a model is adapted.

    Attributes:
        rank: R, columns of a and rows of b.
        alpha: the low-rank term counts alpha / rank, or, rank-stabilised, alpha / sqrt(rank).
        dropout: the probability that an input of the low-rank term is dropped in training.
        targets: which kernels: a name of `TARGETS`, or a regular expression that matches whole paths, such as
            r"layers_\d+/attn/[qv]/kernel".
        rank_stabilised: rsLoRA (Kalajdzievski 2023, arXiv:2312.03732).

    Raises:
        InputError: a value that is out of its range, by name.
    """

    rank: int = 8
    alpha: float = 16.0
    dropout: float = 0.0
    targets: str = "qv"
    rank_stabilised: bool = False

    def __post_init__(self):
        if not isinstance(self.rank, int) or isinstance(self.rank, bool) or self.rank < 1:
            raise InputError(f"lora.rank={self.rank!r} must be a whole number of at least 1, such as 8.")
        if not self.alpha > 0 or not math.isfinite(self.alpha):
            raise InputError(f"lora.alpha={self.alpha!r} must be above 0: twice the rank is usual.")
        if not 0 <= self.dropout < 1:
            raise InputError(f"lora.dropout={self.dropout!r} must be in [0, 1): the share of inputs that are dropped.")
        try:
            re.compile(self.pattern)
        except re.error as error:
            raise InputError(f"lora.targets={self.targets!r} is no regular expression: {error}.") from None

    @property
    def pattern(self) -> str:
        """The regular expression behind `targets`."""
        return TARGETS.get(self.targets, self.targets)

    @property
    def scale(self) -> float:
        """What the low-rank term is multiplied by."""
        return self.alpha / (math.sqrt(self.rank) if self.rank_stabilised else self.rank)

    def paths(self, params: PyTree) -> list[str]:
        """The kernels of a model that are adapted.

        Raises:
            InputError: `targets` matches nothing, or what is no kernel.
        """
        every = [path for path, _ in _leaves(params)]
        found = [path for path in every if re.fullmatch(self.pattern, path)]
        odd = [path for path in found if not KERNELS.fullmatch(path)]
        if odd:
            raise InputError(f"lora.targets={self.targets!r} matches {odd[0]}, {_why_not(odd[0])}")
        if not found:
            known = [path for path in every if KERNELS.fullmatch(path)]
            raise InputError(
                f"lora.targets={self.targets!r} matches no parameter. It is one of {', '.join(TARGETS)}, or a regular "
                f"expression for whole paths such as {', '.join(known[:4])}."
            )
        return found


def _why_not(path: str) -> str:
    if "/experts/" in path:
        what = "matrices of experts, which are not adapted"
    elif path.endswith("router/kernel"):
        what = "a router, which is not adapted"
    elif path.startswith(("embed/", "head/lm_head")):
        what = "a table of the vocabulary, which is not adapted"
    else:
        what = "which is no matrix"
    return f"{what}: adapt kernels of attention and of dense or shared feed-forwards (targets='all')."


def _leaves(params: PyTree) -> list[tuple[str, Any]]:
    """Path and leaf, a quantised matrix as one."""
    leaves: dict[str, Any] = flatten_dict(params, sep="/")
    return list(leaves.items())


def init_adapters(lora: LoRAConfig, params: PyTree, key: PRNGKeyArray) -> PyTree:
    """Fresh adapters in float32, which change nothing yet: b is zeros, a uniform in +-1/sqrt(D), as PEFT draws it.

    Args:
        lora: what is adapted.
        params: the model's, or their shapes; quantised or not, stacked or not.
        key: another gives another `a`.
    """
    shapes, adapters = dict(_leaves(params)), {}
    for path in lora.paths(params):
        *stack, D, F = shapes[path].shape
        bound = D**-0.5

        def draw(key: PRNGKeyArray, D: int = D, bound: float = bound) -> Array:
            return jax.random.uniform(key, (D, lora.rank), jnp.float32, -bound, bound)

        keys = _module_key(key, path, stack)
        a = jax.vmap(draw)(keys) if stack else draw(keys)
        adapters[path] = {"a": a, "b": jnp.zeros((*stack, lora.rank, F), jnp.float32)}
    return unflatten_dict(adapters, sep="/")


def _module_key(key: PRNGKeyArray, path: str, stack: list[int]) -> PRNGKeyArray:
    """The key of one module; of stacked ones, those of all layers."""
    layer, _, name = path.partition("/")
    key = jax.random.fold_in(key, zlib.crc32(name.encode()))
    if stack:
        return jax.vmap(jax.random.fold_in, in_axes=(None, 0))(key, jnp.arange(stack[0]))
    return jax.random.fold_in(key, int(layer.removeprefix("layers_")))


def adapt(params: PyTree, adapters: PyTree, lora: LoRAConfig, key: PRNGKeyArray | None = None) -> PyTree:
    """The model with its adapters beside its kernels, for `jaxfw.forward` and all that calls it.

    Args:
        params: the model's, quantised or not.
        adapters: of `init_adapters`, a training run or a file.
        lora: their scale and dropout; ranks are those of the adapters.
        key: of what is dropped; None, as in evaluation and generation, drops nothing.

    Raises:
        InputError: the adapters are of another model.
    """

    def join(path: str, kernel: Any, pair: dict[str, Array]) -> Adapted:
        drawn = None if key is None or not lora.dropout else _module_key(key, path, list(kernel.shape[:-2]))
        return Adapted(kernel, pair["a"], pair["b"], drawn, lora.scale, lora.dropout)

    return _joined(params, adapters, join)


def merge(params: PyTree, adapters: PyTree, lora: LoRAConfig) -> PyTree:
    """Plain parameters that compute what `adapt` does: W + scale * a @ b, summed in float32, in W's own dtype.

    Raises:
        InputError: a kernel is quantised; the adapters are of another model.
    """

    def join(path: str, kernel: Any, pair: dict[str, Array]) -> Array:
        if isinstance(kernel, Quantised):
            raise InputError(
                f"{path} is quantised, and its sum with an adapter would not be: load the model without quantise= and "
                "merge into that, or keep the two apart (adapt)."
            )
        return (kernel.astype(jnp.float32) + low_rank(pair["a"], pair["b"], lora.scale)).astype(kernel.dtype)

    return _joined(params, adapters, join)


def _joined(params: PyTree, adapters: PyTree, join: Callable[[str, Any, dict[str, Array]], Any]) -> PyTree:
    flat = dict(_leaves(params))
    for path, pair in adapter_pairs(adapters).items():
        if path not in flat:
            raise InputError(f"the adapters hold {path}, which the model lacks: they are of another one.")
        if isinstance(flat[path], Adapted):
            raise InputError(f"{path} has an adapter already: merge that one first.")
        *stack, D, F = flat[path].shape
        R = pair["a"].shape[-1]
        wanted, given = [(*stack, D, R), (*stack, R, F)], [tuple(pair["a"].shape), tuple(pair["b"].shape)]
        if given != wanted:
            raise InputError(
                f"the adapter of {path} is {given[0]} and {given[1]}, the kernel [{D} {F}] wants {wanted[0]} and "
                f"{wanted[1]}: it is of another model."
            )
        flat[path] = join(path, flat[path], pair)
    return unflatten_dict(flat, sep="/")


def adapter_pairs(adapters: PyTree) -> dict[str, dict[str, Array]]:
    """Path of each adapted kernel -> its {"a", "b"}.

    Raises:
        InputError: this is no tree of adapters.
    """
    pairs: dict[str, dict[str, Array]] = {}
    leaves: dict[str, Any] = flatten_dict(adapters, sep="/")
    for path, leaf in leaves.items():
        kernel, _, name = path.rpartition("/")
        pairs.setdefault(kernel, {})[name] = leaf
    odd = [kernel for kernel, pair in pairs.items() if set(pair) != {"a", "b"} or not KERNELS.fullmatch(kernel)]
    if odd or not pairs:
        raise InputError(
            f"these are no adapters ({odd[0] or 'a leaf' if odd else 'they are empty'}): give what init_adapters or "
            "load_adapters returned, {'layers_0': {'attn': {'q': {'kernel': {'a': ..., 'b': ...}}}}}."
        )
    return pairs
