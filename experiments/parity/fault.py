"""One planted fault, and what faults of several families are made of."""

import dataclasses
import re
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any
from unittest import mock

from flax.traverse_util import flatten_dict, unflatten_dict

from jaxfw.models import DecoderConfig, decoder

ConfigEdit = Callable[[DecoderConfig], DecoderConfig]
ParamsEdit = Callable[[Any], Any]
Patch = tuple[Any, str, Callable[[Any], Any]]


@dataclasses.dataclass(frozen=True)
class Fault:
    """One thing changed in our side: the config, the parameters, or a function of jaxfw replaced.

    `patch` is an owner, the name of its function, and what makes the faulty function from the real one.
    """

    name: str
    case: str
    config: ConfigEdit = lambda config: config
    params: ParamsEdit = lambda params: params
    patch: Patch | None = None
    shows_in: str = "logits"

    def planted(self) -> Any:
        """A context in which the fault is there."""
        if self.patch is None:
            return nullcontext()
        owner, attribute, spoil = self.patch
        return mock.patch.object(owner, attribute, spoil(getattr(owner, attribute)))


def config_with(**changes: Any) -> ConfigEdit:
    """The configuration with other fields."""
    return lambda config: dataclasses.replace(config, **changes)


def rope_with(**changes: Any) -> ConfigEdit:
    """The configuration with other fields of its rotary embedding."""
    return lambda config: dataclasses.replace(config, rope=_replace(config.rope, changes))


def moe_with(**changes: Any) -> ConfigEdit:
    """The configuration with other fields of its mixture."""
    return lambda config: dataclasses.replace(config, moe=_replace(config.moe, changes))


def _replace(part: Any, changes: dict[str, Any]) -> Any:
    return dataclasses.replace(part, **changes)


def scaled_by(factor: Callable[[DecoderConfig], float]) -> Patch:
    """Attention logits scaled by another number."""

    def spoil(real):
        return lambda config: dataclasses.replace(real(config), scale=factor(config))

    return decoder, "attention_spec", spoil


def params_where(pattern: str, change: Callable[[Any], Any]) -> ParamsEdit:
    """Every parameter whose whole path matches, changed."""

    def edit(params):
        flat = flatten_dict(params, sep="/")
        named = [path for path in flat if re.fullmatch(pattern, path)]
        assert named, f"no parameter is named {pattern}"
        return unflatten_dict({**flat, **{path: change(flat[path]) for path in named}}, sep="/")

    return edit


def params_without(pattern: str) -> ParamsEdit:
    """The parameters less those whose whole path matches."""

    def edit(params):
        flat = flatten_dict(params, sep="/")
        kept = {path: value for path, value in flat.items() if not re.fullmatch(pattern, path)}
        assert len(kept) < len(flat), f"no parameter is named {pattern}"
        return unflatten_dict(kept, sep="/")

    return edit


def params_with(path: str, make: Callable[[Any], Any]) -> ParamsEdit:
    """The parameters and one more, made from all of them."""

    def edit(params):
        return unflatten_dict({**flatten_dict(params, sep="/"), path: make(params)}, sep="/")

    return edit


def in_turn(*edits: ParamsEdit) -> ParamsEdit:
    """One edit after the other."""

    def edit(params):
        for each in edits:
            params = each(params)
        return params

    return edit


def swapped(one: str, other: str) -> ParamsEdit:
    """The parameters with two parts of paths taken for each other."""

    def edit(params):
        flat = flatten_dict(params, sep="/")
        mark = {one: other, other: one}
        pattern = re.compile(f"{re.escape(one)}|{re.escape(other)}")
        return unflatten_dict({pattern.sub(lambda m: mark[m[0]], k): v for k, v in flat.items()}, sep="/")

    return edit
