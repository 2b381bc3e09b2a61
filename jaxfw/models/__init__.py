"""One decoder body, its caches, routers, experts and taps, and the model families as thin translations of configs."""

from jaxfw.models.decoder import (
    LayerOutput,
    attend_half,
    attention_spec,
    default_router,
    embed,
    final,
    first_step,
    head,
    init,
    layer,
    mlp_half,
    route,
    router_states,
    run_experts,
    vocabulary,
)
from jaxfw.models.stacked import stack_layers, unstack_layers
from jaxfw.models.taps import Collect, Edit, Moment
from jaxfw.models.whole import Output, finish, forward, remat_layer, trunk
from jaxfw.nn.config import DecoderConfig, MoEConfig
from jaxfw.ops.rope import Rope

__all__ = [
    "Collect", "DecoderConfig", "Edit", "LayerOutput", "MoEConfig", "Moment", "Output", "Rope", "attend_half",
    "attention_spec", "default_router", "embed", "final", "finish", "first_step", "forward", "head", "init", "layer",
    "mlp_half", "remat_layer", "route", "router_states", "run_experts", "stack_layers", "trunk", "unstack_layers",
    "vocabulary",
]  # fmt: skip
