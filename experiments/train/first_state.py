"""What a run trains, laid out on its mesh: the model from its directory or fresh, adapters, optimiser, first state."""

import dataclasses
from pathlib import Path
from typing import Any

import jax
import optax
from jax.sharding import Mesh

import jaxfw
from experiments.train.settings import TrainingConfig
from jaxfw.core.checkpoint import Checkpoints
from jaxfw.core.errors import InputError
from jaxfw.core.mesh import make_mesh, parse_mesh
from jaxfw.core.shapes import PyTree
from jaxfw.core.sharding import shardings, state_shardings
from jaxfw.generate import LM
from jaxfw.models import DecoderConfig, init, stack_layers, unstack_layers
from jaxfw.models.sharding import ROUTER_STATES, decoder_rules
from jaxfw.train import LossFn, NextTokenLoss, TrainState, init_state, make_optimizer
from jaxfw.train.average import averaged_params
from jaxfw.train.lora import LoRALoss, adapt, init_adapters
from jaxfw.train.resume import resume
from jaxfw.train.step import FROZEN, with_frozen
from jaxfw.weights import load_config
from jaxfw.weights.exporting import model_folder
from jaxfw.weights.layout import flat_shapes


def mesh_of(c: TrainingConfig) -> Mesh:
    """The mesh that is asked for; by default, everything cut over all devices (`fsdp`)."""
    sizes: Any = parse_mesh(c.mesh) or {"fsdp": jax.device_count()}
    return make_mesh(**sizes)


def model_config(c: TrainingConfig) -> DecoderConfig:
    """The decoder in the dtypes of the run; of a directory, only headers are read.

    Raises:
        InputError: `model` and `init` are both given and differ in their parameters.
    """
    if not c.init:
        assert c.model is not None
        dtypes = {"param_dtype": c.param_dtype or c.model.param_dtype, "dtype": c.dtype or c.model.dtype}
        return dataclasses.replace(c.model, **dtypes)
    found = load_config(model_folder(Path(c.init)), param_dtype=_loaded_dtype(c), dtype=c.dtype or None)
    if c.model is not None:
        _check_same_parameters(c.model, found, c.init)
    return found


def _loaded_dtype(c: TrainingConfig) -> str | None:
    """A base under adapters is not trained: it stays as it is stored."""
    return None if c.lora else c.param_dtype or None


def _check_same_parameters(wanted: DecoderConfig, found: DecoderConfig, where: str) -> None:
    ours, theirs = flat_shapes(wanted), flat_shapes(found)
    problems = [
        *(f"missing {name} {list(ours[name])}" for name in sorted(set(ours) - set(theirs))),
        *(f"unexpected {name} {list(theirs[name])}" for name in sorted(set(theirs) - set(ours))),
        *(
            f"{name} is {list(theirs[name])}, wanted {list(ours[name])}"
            for name in sorted(set(ours) & set(theirs))
            if tuple(ours[name]) != tuple(theirs[name])
        ),
    ]
    if problems:
        more = f" and {len(problems) - 5} more" if len(problems) > 5 else ""
        raise InputError(
            f"config.init={where!r} holds another model than config.model: {'; '.join(problems[:5])}{more}. Leave out "
            "config.model to take that of the directory."
        )


@dataclasses.dataclass(frozen=True)
class Start:
    """What is trained and how, the state to go on from, and the model that it came from, without its parameters."""

    lm: LM | None
    loss: NextTokenLoss
    loss_fn: LossFn
    optimizer: optax.GradientTransformation
    state: TrainState


def start(
    c: TrainingConfig, mesh: Mesh, config: DecoderConfig, checkpoints: Checkpoints, *, steps: int, data: dict[str, Any]
) -> Start:
    """Restored, loaded or fresh, in this order (`jaxfw.train.resume`); runs under `jax.set_mesh(mesh)`."""
    loss = NextTokenLoss(
        config, router_losses=c.loss.router_losses, chunk=c.loss.chunk or None, remat=c.loss.remat or None
    )
    loss_fn: LossFn = loss if c.lora is None else LoRALoss(loss, c.lora)
    optimizer, key = make_optimizer(c.optimizer, steps=steps), jax.random.fold_in(jax.random.key(c.seed), 0)
    lm = _load(c, mesh) if c.init else None
    base = lm.params if lm else None
    lm = lm and dataclasses.replace(lm, params={})

    def first(base: PyTree) -> TrainState:
        if c.lora is not None:
            params = init_adapters(c.lora, base, key)
        else:
            params = init(config, key) if base is None else base
            params = stack_layers(params) if c.stack_layers else params
        return init_state(params, optimizer, state=loss.init_state())

    shapes = jax.eval_shape(first, base)
    places = shardings(decoder_rules(config), mesh, shapes.params)
    layout = state_shardings(places, shapes.params, shapes, rules=ROUTER_STATES)
    like = jax.tree.map(lambda x, at: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=at), shapes, layout)
    if c.lora is not None:
        like = with_frozen(like, base)
    elif checkpoints.latest_step is not None:
        base = None  # frees it: everything that is trained is in the checkpoint
    state = resume(checkpoints, like, data=data, other=c.resume)
    if state is None:
        made = jax.jit(first, out_shardings=layout, donate_argnums=() if c.lora else 0)(base)
        state = with_frozen(made, base if c.lora else None)
    return Start(lm, loss, loss_fn, optimizer, state)


def _load(c: TrainingConfig, mesh: Mesh) -> LM:
    return jaxfw.load(
        model_folder(Path(c.init)), mesh=mesh, param_dtype=_loaded_dtype(c), dtype=c.dtype or None,
        quantise=c.quantise or None,
    )  # fmt: skip


def trained(c: TrainingConfig, state: TrainState) -> PyTree:
    """What a run is about, parameters or adapters: averaged where the optimiser averages, a key per layer."""
    params = state.params if c.optimizer.average is None else averaged_params(state.opt_state, state.params)
    return unstack_layers(params) if c.stack_layers else params


def model_params(c: TrainingConfig, state: TrainState) -> PyTree:
    """The model's parameters with what was trained: adapters stand beside the frozen ones."""
    params = trained(c, state)
    return params if c.lora is None else adapt(state.state[FROZEN], params, c.lora)
