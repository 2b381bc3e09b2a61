"""Which family reads a config.json, and which one can write a configuration."""

import dataclasses
import importlib
import json
from types import ModuleType
from typing import Any

from jaxfw.core.errors import InputError, unknown
from jaxfw.nn.config import DecoderConfig

# model_type -> module, imported when asked for. `choose` takes the first that can express a configuration.
FAMILIES = {
    name: f"jaxfw.models.{name}"
    for name in (
        "llama", "mistral", "qwen2", "qwen3", "gpt2", "mixtral", "qwen2_moe", "qwen3_moe", "olmoe", "deepseek",
    )
}  # fmt: skip


def family(model_type: Any, field: str = "config.json: model_type") -> ModuleType:
    """The module of a family.

    Raises:
        InputError: the family is unknown.
    """
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        raise unknown(field, model_type, FAMILIES)
    return importlib.import_module(FAMILIES[model_type])


def choose(config: DecoderConfig, model_type: str | None = None) -> ModuleType:
    """The family to save a configuration under: the given one, or the first of `FAMILIES` that can express it.

    A family expresses a configuration if it reads back from its config.json what was written there.

    Raises:
        InputError: a field that the given family, or every family, would lose.
    """
    if model_type is not None:
        module = family(model_type, "model_type")
        lost = _lost(module, config)
        if lost:
            raise InputError(_says(model_type, lost))
        return module
    losses: dict[str, list[str]] = {}
    for name in FAMILIES:
        lost = _lost(family(name), config)
        if not lost:
            return family(name)
        losses[name] = lost
    nearest = min(losses, key=lambda name: len(losses[name]))
    raise InputError(
        f"no family of the Hub can express this model; the nearest is {nearest!r}: {_says(nearest, losses[nearest])} "
        "Change the model, or keep it in a checkpoint of jaxfw.core.checkpoint."
    )


def _lost(module: ModuleType, config: DecoderConfig) -> list[str]:
    """What the family's config.json would not keep: fields, or what the family says itself."""
    dtypes = {name: getattr(config, name) for name in ("param_dtype", "dtype", "softmax_dtype")}
    try:
        written = json.loads(json.dumps(module.write_config(config)))
        again = module.read_config(written, **dtypes)
    except InputError as error:
        return [str(error)]
    given, read = _plain(config), _plain(again)
    if config.moe and all(config.moe.is_in(i) for i in range(config.layers)):
        del given["model.ffn"]  # no layer is that wide
    return [f"{name}={value!r} would become {read[name]!r}" for name, value in given.items() if value != read[name]]


def _plain(config: DecoderConfig) -> dict[str, Any]:
    """Fields by their dotted names, defaults that mean the same made explicit, permissions left out."""
    fields = {f"model.{name}": value for name, value in vars(config).items()}
    if config.moe is not None:
        moe = config.moe
        renormalize = moe.per_token > 1 if moe.renormalize is None else moe.renormalize
        fields["model.moe"] = dataclasses.replace(moe, renormalize=renormalize, allow_noncausal=False)
    return fields


def _says(model_type: str, lost: list[str]) -> str:
    if len(lost) == 1 and " would become " not in lost[0]:
        return lost[0]
    return f"a config.json of model_type {model_type!r} cannot express this model: {'; '.join(lost)}."
