"""Programs of a model as shapes on a mesh: what `jaxfw.core.aot` compiles, and what its arguments are."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding

from jaxfw.core import aot
from jaxfw.core.errors import InputError
from jaxfw.core.mesh import BATCH_AXES, fit
from jaxfw.core.shapes import PyTree
from jaxfw.core.sharding import shardings, state_shardings
from jaxfw.generate.compression import with_policy
from jaxfw.models import DecoderConfig, attention_spec, first_step, forward, init, layer, stack_layers
from jaxfw.models.cache import Cache, FullCache
from jaxfw.models.routing import Experts
from jaxfw.models.sharding import ROUTER_STATES, batch_shardings, cache_shardings, decoder_rules
from jaxfw.train import NextTokenLoss, OptimizerConfig, init_state, make_optimizer, make_step
from jaxfw.weights import abstract_params

SPARE = 128  # slots behind a prompt, as generation leaves them


@dataclasses.dataclass(frozen=True, eq=False)
class Program:
    """A jitted function with abstract, placed arguments; `parts` names what of them a device holds.

    `what` says in words what it is, `flops` what a model needs for it, on all devices together.
    """

    what: str
    fn: Callable[..., Any]
    arguments: tuple[Any, ...]
    parts: Mapping[str, PyTree]
    mesh: Mesh

    def compile(self, options: Mapping[str, Any] | None = None) -> aot.Compiled:
        """For the devices of its mesh, with the streams that it would use there."""
        return aot.compile(self.fn, *self.arguments, mesh=self.mesh, compiler_options=options, dump_streams=True)


def train_step(
    config: DecoderConfig,
    mesh: Mesh,
    *,
    batch: int,
    length: int,
    optimizer: OptimizerConfig | None = None,
    remat: str | None = None,
    chunk: int | None = None,
    experts: Experts | None = None,
    stacked: bool = False,
) -> Program:
    """One update of `batch` rows of `length` tokens, on all devices together; the state is donated.

    Raises:
        InputError: a batch that the mesh cannot share out, or longer rows than the model has positions.
    """
    _check_length(config, length)
    _check_rows(mesh, batch)
    made = make_optimizer(optimizer or OptimizerConfig(), steps=10_000)
    loss = NextTokenLoss(config, experts=experts, remat=remat, chunk=chunk)

    def first() -> Any:
        params = init(config, jax.random.key(0))
        return init_state(stack_layers(params) if stacked else params, made, state=loss.init_state())

    shapes = jax.eval_shape(first)
    places = shardings(decoder_rules(config), mesh, shapes.params)
    state = placed(shapes, state_shardings(places, shapes.params, shapes, rules=ROUTER_STATES))
    tokens = {"tokens": jax.ShapeDtypeStruct((batch, length + 1), jnp.int32)}
    tokens = placed(tokens, batch_shardings(mesh, tokens))
    key = jax.eval_shape(lambda: jax.random.key(0))
    return Program(
        f"training step, {batch} x {length} tokens", make_step(loss, made), (state, tokens, key),
        {"parameters": state.params, "optimiser": state.opt_state, "batch": tokens}, mesh,
    )  # fmt: skip


def decode_step(
    config: DecoderConfig, mesh: Mesh, *, batch: int, length: int, quantise: str | None = None, kv: str | None = None
) -> Program:
    """One token for each of `batch` rows, behind a cache of `length` tokens, which is donated.

    `kv` says what the cache keeps of them, and in how many bits; None keeps everything.
    """
    _check_length(config, length)
    policy = with_policy({"kv": kv}, config.layers)["policy"] or FullCache()
    params = placed_params(config, mesh, quantise)
    asked = {"spec": attention_spec(config), "prompt": length - 1, "new": 1, "dtype": config.dtype}
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        cache = jax.eval_shape(lambda: Cache(tuple(policy.at(i).empty(batch, **asked) for i in range(config.layers))))
    cache = placed(cache, cache_shardings(mesh, cache))
    tokens = jax.ShapeDtypeStruct((batch, 1), jnp.int32)
    tokens = placed(tokens, batch_shardings(mesh, tokens))

    def step(params, tokens, cache):
        out = forward(config, params, tokens, policy=policy, cache=cache)
        return jnp.argmax(out.logits[:, 0], axis=-1), out.cache

    return Program(
        f"decode step, {batch} rows behind {length} tokens", jax.jit(step, donate_argnums=2), (params, tokens, cache),
        {"parameters": params, "cache": cache}, mesh,
    )  # fmt: skip


def prefill_layer(config: DecoderConfig, mesh: Mesh, *, batch: int, length: int) -> Program:
    """One layer over prompts of `length` tokens, as a host loop runs it for all; the residual is donated."""
    _check_length(config, length)
    x = jax.ShapeDtypeStruct((batch, length, config.width), config.dtype)
    x = placed(x, NamedSharding(mesh, fit(mesh.shape, x.shape, (BATCH_AXES, None, None))))
    step = jax.eval_shape(lambda: first_step(jnp.full(batch, length, jnp.int32), length))
    params = placed_params(config, mesh)["layers_0"]

    def run(params, x, step):
        out = layer(config, params, x, step, policy=FullCache(), room=length + SPARE)
        return out.x, out.state

    return Program(
        f"prefill of a layer, {batch} x {length} tokens", jax.jit(run, donate_argnums=1), (params, x, step),
        {"parameters": params, "residual": x}, mesh,
    )  # fmt: skip


def placed_params(config: DecoderConfig, mesh: Mesh, quantise: str | None = None) -> PyTree:
    """Parameters as shapes, laid out by the rules."""
    shapes = abstract_params(config, quantise=quantise)
    return placed(shapes, shardings(decoder_rules(config), mesh, shapes))


def placed(shapes: PyTree, places: PyTree) -> PyTree:
    """Shapes with where they lie."""
    return jax.tree.map(lambda x, at: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=at), shapes, places)


def _check_length(config: DecoderConfig, length: int) -> None:
    if not 1 <= length <= config.context:
        raise InputError(f"length={length} must be from 1 to the model's {config.context} positions.")


def _check_rows(mesh: Mesh, batch: int) -> None:
    shares = 1
    for axis in BATCH_AXES:
        shares *= mesh.shape[axis]
    if batch < 1 or batch % shares:
        raise InputError(
            f"batch={batch} rows cannot be shared out over {shares} devices (data x fsdp x expert): give a multiple."
        )
