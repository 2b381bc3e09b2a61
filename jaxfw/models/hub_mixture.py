"""What the config.json files of several families say alike of their experts."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from jaxfw.core.errors import InputError
from jaxfw.models.hub_config import attribute
from jaxfw.nn.config import DecoderConfig, MoEConfig

# What says in the Qwen families which layers have experts.
SPARSE_LAYERS = frozenset(("decoder_sparse_step", "mlp_only_layers"))


def mixture(config: DecoderConfig, model_type: str) -> MoEConfig:
    """`config.moe`, with `renormalize` either true or false; `InputError` where there are no experts."""
    moe = config.moe
    if moe is None:
        raise InputError(f"model.moe is None, but a config.json of model_type {model_type!r} describes experts.")
    return dataclasses.replace(moe, renormalize=moe.per_token > 1 if moe.renormalize is None else moe.renormalize)


def read_sparse_layers(attributes: Mapping[str, Any]) -> dict[str, Any]:
    """The fields `first`, `every` and `dense` of a `MoEConfig` from the attributes `SPARSE_LAYERS`.

    Experts are in every layer whose number, counted from 1, is a multiple of the step, unless it is listed (from 0 on).

    >>> read_sparse_layers({"decoder_sparse_step": 2, "mlp_only_layers": [3]})
    {'first': 1, 'every': 2, 'dense': (3,)}
    """
    step = attribute(attributes, "decoder_sparse_step", int, 1)
    if step < 1:
        raise InputError(
            f"config.json: decoder_sparse_step={step} must be from 1 on: every how many layers has experts."
        )
    dense = attributes.get("mlp_only_layers") or []
    if not isinstance(dense, list) or not all(type(i) is int and i >= 0 for i in dense):
        raise InputError(f"config.json: mlp_only_layers={dense!r:.80} must be a list of layers, [0, 3] say, or [].")
    return {"first": step - 1, "every": step, "dense": tuple(dense)}


def write_sparse_layers(moe: MoEConfig) -> dict[str, Any]:
    """The attributes `SPARSE_LAYERS`.

    Raises:
        InputError: the first layer with experts is another than a step says.
    """
    if moe.first != moe.every - 1:
        raise InputError(
            f"model.moe.first={moe.first} with model.moe.every={moe.every} cannot be written: here the first layer "
            f"with experts is number every-1={moe.every - 1}, counted from 0. Set model.moe.first to that, or list "
            "layers without experts in model.moe.dense."
        )
    return {"decoder_sparse_step": moe.every, "mlp_only_layers": list(moe.dense)}
