"""Configuration at the door: mini-arguments of config files, and ConfigDicts to frozen dataclasses.

A config file `configs/X.py` defines `get_config(arg="")`, which returns a locked ConfigDict. What follows the colon of
`--config=configs/X.py:smoke,depth=4` is `arg`. Inside jaxfw only the dataclasses are used: frozen, hashable, checked.
"""

import dataclasses
import types
import typing
from collections.abc import Mapping
from typing import Any, TypeVar

from jaxfw.core.errors import InputError, unknown

T = TypeVar("T")


def parse_arg(arg: str, **defaults: bool | int | float | str) -> types.SimpleNamespace:
    """Mini-arguments `name=value,flag`: each takes the type of its default, a bare name means True.

    >>> parse_arg("smoke,depth=4", smoke=False, depth=2, lr=0.1)
    namespace(smoke=True, depth=4, lr=0.1)

    Raises:
        InputError: a name without default, a name twice, or a value that is not of the default's type.
    """
    found: dict[str, Any] = {}
    for piece in filter(None, arg.split(",")):
        name, equals, text = piece.partition("=")
        if name not in defaults:
            raise unknown("mini-argument", name, defaults)
        if name in found:
            raise InputError(f"mini-argument {name!r} is given twice in {arg!r}.")
        found[name] = _typed(name, text if equals else "true", type(defaults[name]))
    return types.SimpleNamespace(**defaults | found)


def _typed(name: str, text: str, kind: type) -> Any:
    if kind is bool:
        if text.lower() not in ("true", "false"):
            raise InputError(f"mini-argument {name}={text!r} must be true or false.")
        return text.lower() == "true"
    try:
        return kind(text)
    except ValueError:
        raise InputError(f"mini-argument {name}={text!r} must be of type {kind.__name__}, as in {name}=1.") from None


def check_override(config: Any, path: str) -> None:
    """Raise an `InputError` with the nearest known name unless the dotted `path` leads to a field of `config`."""
    node, seen = config, "config"
    for name in path.split("."):
        if not hasattr(node, "items"):
            raise InputError(f"--{seen} is a value, not a group: --config.{path} cannot be set.")
        if name not in node:
            raise unknown(f"--config.{path}: field of {seen}", name, sorted(node))
        node, seen = node[name], f"{seen}.{name}"


def to_plain(config: Any) -> Any:
    """Nested plain dicts and lists, as JSON has them, from a ConfigDict or any nest of mappings and sequences."""
    if hasattr(config, "items"):
        return {name: to_plain(value) for name, value in config.items()}
    if isinstance(config, list | tuple):
        return [to_plain(value) for value in config]
    return config


def changed_fields(old: Mapping[str, Any], new: Mapping[str, Any], prefix: str = "") -> list[str]:
    """What differs between two plain configs, one `name: old -> new` a field.

    >>> changed_fields({"lr": 0.1, "model": {"layers": 2}}, {"lr": 0.1, "model": {"layers": 4}})
    ['model.layers: 2 -> 4']
    """
    changes = []
    for name in sorted(set(old) | set(new)):
        before, after = old.get(name), new.get(name)
        if isinstance(before, Mapping) and isinstance(after, Mapping):
            changes += changed_fields(before, after, f"{prefix}{name}.")
        elif before != after or (name in old) != (name in new):
            changes.append(f"{prefix}{name}: {before!r} -> {after!r}")
    return changes


def to_dataclass(cls: type[T], config: Any, *, path: str = "config") -> T:
    """A frozen dataclass from a ConfigDict or mapping: every name known, every value of its field's type.

    Integers become floats and lists become tuples where the field says so; nested dataclasses are built likewise.

    Raises:
        InputError: an unknown or missing field, or a value of another type; `path` leads its name.
    """
    fields = {field.name: field for field in dataclasses.fields(typing.cast(Any, cls)) if field.init}
    given = dict(config.items())
    for name in given:
        if name not in fields:
            raise unknown(f"{path}: field", name, fields)
    required = [
        name
        for name, field in fields.items()
        if field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
    ]
    missing = [name for name in required if name not in given]
    if missing:
        raise InputError(f"{path} lacks {', '.join(missing)}, which {cls.__name__} needs.")
    hints = typing.get_type_hints(cls)
    return cls(**{name: _convert(value, hints[name], f"{path}.{name}") for name, value in given.items()})


def _convert(value: Any, hint: Any, path: str) -> Any:
    if hint is Any:
        return value
    origin, options = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return _convert_union(value, options, path)
    if origin is tuple and isinstance(value, list | tuple):
        if len(options) == 2 and options[1] is Ellipsis:
            return tuple(_convert(item, options[0], f"{path}[{i}]") for i, item in enumerate(value))
        if len(options) == len(value):
            return tuple(_convert(item, kind, f"{path}[{i}]") for i, (item, kind) in enumerate(zip(value, options)))
    elif dataclasses.is_dataclass(hint):
        if isinstance(value, typing.cast(type, hint)):
            return value
        if hasattr(value, "items"):
            return to_dataclass(typing.cast(type, hint), value, path=path)
    elif hint is float and isinstance(value, int | float) and not isinstance(value, bool):
        return float(value)
    elif isinstance(hint, type) and isinstance(value, hint) and (hint is bool or not isinstance(value, bool)):
        return value
    raise InputError(f"{path}={value!r} must be {_say(hint)}.")


def _convert_union(value: Any, options: tuple[Any, ...], path: str) -> Any:
    if value is None and type(None) in options:
        return None
    kinds = [option for option in options if option is not type(None)]
    for kind in kinds[:-1]:
        try:
            return _convert(value, kind, path)
        except InputError:
            continue
    return _convert(value, kinds[-1], path)


def _say(hint: Any) -> str:
    return hint.__name__ if isinstance(hint, type) and not typing.get_args(hint) else str(hint)
