"""How far our side is from transformers', with a fault planted or without."""

from collections.abc import Callable
from importlib import import_module
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict

from experiments.parity.case import Oracle
from experiments.parity.fault import Fault
from jaxfw.models import DecoderConfig, forward
from jaxfw.ops.losses import token_log_probs

TOLERANCE = {"logits": 1e-5, "gradients": 1e-4}
VISIBLE = 100  # a planted fault must exceed the tolerance by this factor
# A fault's size does not hang on how well its program was optimised, and compiling is most of what it takes.
_FAULTY = {"xla_backend_optimization_level": 0}


def logits_error(oracle: Oracle, fault: Fault | None = None) -> float:
    """The largest difference of valid logits in units of their deviation, with a fault planted or without."""
    ours = _with(fault, oracle, _our_logits)
    return float(np.abs(ours - oracle.logits)[oracle.valid].max() / oracle.deviation)


def gradient_errors(oracle: Oracle, fault: Fault | None = None) -> dict[str, float]:
    """By parameter: the largest difference of its gradient in units of the largest gradient of what is stored with it.

    Mostly that is the parameter alone. Where several share one tensor, they share its largest gradient too: that of
    GPT-2's key bias is zero but for rounding, as adding one vector to all keys moves no attention weight.
    """
    ours: dict[str, Any] = flatten_dict(_with(fault, oracle, _our_gradients), sep="/")
    theirs: dict[str, Any] = flatten_dict(oracle.gradients, sep="/")
    assert set(ours) == set(theirs), sorted(set(ours) ^ set(theirs))
    family = import_module(f"jaxfw.models.{oracle.case.model_type}")
    stored = {path: stored.names for path, stored in family.tensors(oracle.config).items()}
    largest: dict[Any, float] = {}
    for path, gradient in theirs.items():
        largest[stored[path]] = max(largest.get(stored[path], 0.0), float(np.abs(gradient).max()))
    return {path: float(np.abs(ours[path] - theirs[path]).max() / largest[stored[path]]) for path in theirs}


def fault_error(oracle: Oracle, fault: Fault) -> float:
    """The error, of the kind in which the fault shows."""
    if fault.shows_in == "logits":
        return logits_error(oracle, fault)
    return max(gradient_errors(oracle, fault).values())


def _with(fault: Fault | None, oracle: Oracle, compute: Callable[..., Any]) -> Any:
    if fault is None:
        return compute(oracle.config, oracle.params, oracle)
    with fault.planted():
        return compute(fault.config(oracle.config), fault.params(oracle.params), oracle, compiler_options=_FAULTY)


def _our_logits(config: DecoderConfig, params: Any, oracle: Oracle, **options: Any) -> np.ndarray:
    # A new function for every call: what was traced before a fault was planted is not used again.
    def logits(params, tokens, lengths):
        return forward(config, params, tokens, lengths=lengths).logits

    return np.asarray(jax.jit(logits, **options)(params, oracle.tokens, oracle.lengths), np.float32)


def _our_gradients(config: DecoderConfig, params: Any, oracle: Oracle, **options: Any) -> Any:
    tokens, lengths, counted = (jnp.asarray(x) for x in (oracle.tokens, oracle.lengths, oracle.valid[:, 1:]))

    def loss(params):
        logits = forward(config, params, tokens, lengths=lengths).logits
        return -jnp.sum(token_log_probs(logits[:, :-1], tokens[:, 1:]) * counted) / counted.sum()

    return jax.tree.map(np.asarray, jax.jit(jax.grad(loss), **options)(params))
