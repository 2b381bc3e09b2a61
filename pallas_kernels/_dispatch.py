"""Which body of an operation runs: chosen for the platform that a program is lowered for, not for the machine's own.

So a program compiled for GPUs on a machine without any is the one that the GPUs will run. `jax.lax.platform_dependent`
traces the bodies of all platforms, therefore a kernel's body is added only where its `supports` finds no obstacle.
"""

import functools
import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
from jax.sharding import AxisType, PartitionSpec

PLATFORM = {"triton": "cuda", "mosaic": "cuda"}  # what a kernel is lowered for; of several, the first that can run
IMPLS = ("xla", *PLATFORM, "interpret")
ROW_AXES, HEAD_AXES = ("data", "fsdp", "expert"), ("tensor",)  # the mesh axes that cut rows of a batch, and heads

Supports = Callable[[str], str | None]  # the reason why an impl cannot run, or None
Choice = tuple[tuple[str, str], ...]  # (platform, impl) pairs; hashable


def dispatch_plan(op: str, supports: Supports, impl: str | None = None) -> dict[str, str]:
    """{platform: the impl that it gets, or why it gets no kernel and runs what "default" does}.

    >>> dispatch_plan("scale", lambda impl: None)
    {'cuda': 'triton', 'default': 'xla'}
    >>> dispatch_plan("scale", lambda impl: None if impl == "xla" else "it is not written")
    {'cuda': 'triton: it is not written; mosaic: it is not written', 'default': 'xla'}

    Raises:
        ValueError: an `impl` that is unknown, or that cannot run, with the reason.
    """
    if impl not in (None, *IMPLS):
        raise ValueError(f"{op} impl={impl!r} is unknown. Known: {', '.join(IMPLS)}; None chooses by platform.")
    reason = supports(impl or "xla")
    if reason:
        raise ValueError(f"{op} impl={impl!r} cannot run: {reason}.")
    if impl is not None:
        return {PLATFORM.get(impl, "default"): impl}
    return {platform: _kernel(platform, supports) for platform in PLATFORM.values()} | {"default": "xla"}


def _kernel(platform: str, supports: Supports) -> str:
    reasons = {name: supports(name) for name, where in PLATFORM.items() if where == platform}
    able = [name for name, reason in reasons.items() if reason is None]
    return able[0] if able else "; ".join(f"{name}: {reason}" for name, reason in reasons.items())


def choose(op: str, supports: Supports, impl: str | None) -> Choice:
    """The pairs of `dispatch_plan` that name an impl; a platform that gets no kernel is logged."""
    plan = dispatch_plan(op, supports, impl)
    for platform, name in plan.items():
        if name not in IMPLS:
            _say_fallback(op, platform, name)
    return tuple((platform, name) for platform, name in plan.items() if name in IMPLS)


@functools.cache
def _say_fallback(op: str, platform: str, reason: str) -> None:
    """A warning in the log, once for each reason."""
    logging.getLogger("pallas_kernels").warning("%s runs on %s without a kernel (%s).", op, platform, reason)


def run_chosen(choice: Choice, bodies: Mapping[str, Callable[..., Any]], *args: Any) -> Any:
    """The chosen one of `bodies`, called with `args`; of several, that of the platform which is lowered for."""
    chosen = {platform: bodies[name] for platform, name in choice}
    if len(chosen) == 1:
        (body,) = chosen.values()
        return body(*args)
    return jax.lax.platform_dependent(*args, **chosen)


def divisors(size: int, axes: Sequence[str]) -> tuple[str, ...]:
    """Those of the mesh `axes` that cut `size` evenly, each together with those before it.

    The mesh is the one of the moment (`jax.set_mesh`); axes that it lacks, and those that a `shard_map` around has
    taken, are left out.
    """
    sizes, kept = _free_axes(), []
    for axis in axes:
        if axis in sizes and size % sizes[axis] == 0:
            kept.append(axis)
            size //= sizes[axis]
    return tuple(kept)


def on_each_device(
    body: Callable[..., Any], shards: Mapping[str, tuple[str, ...]], inputs: tuple[Any, ...], outputs: Any
) -> Callable[..., Any]:
    """`body` on the shards that each device holds: XLA cannot partition a kernel, it would gather all arguments.

    The trees `inputs` and `outputs` name array axes by letters, as in "B K S d"; `shards` says over which mesh axes a
    letter is cut. What cuts nothing is replicated. Without a mesh it is `body` itself.
    """
    names = set(_free_axes())
    if not names:
        return body

    def spec(letters: str) -> PartitionSpec:
        return PartitionSpec(*(shards.get(letter) or None for letter in letters.split()))

    in_specs, out_specs = jax.tree.map(spec, inputs), jax.tree.map(spec, outputs)
    return jax.shard_map(body, in_specs=in_specs, out_specs=out_specs, axis_names=names, check_vma=False)


def _free_axes() -> dict[str, int]:
    mesh = jax.sharding.get_abstract_mesh()
    kinds = zip(mesh.axis_names, mesh.axis_types)
    return {name: mesh.shape[name] for name, kind in kinds if kind != AxisType.Manual}
