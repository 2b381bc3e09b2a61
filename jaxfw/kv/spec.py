"""Methods by name: `snapkv(w=16)@keep=0.3`, `shotkv@keep=0.3,rd=0.4`, `h2o@budget=256,layers=pyramid(beta=10)`.

What stands in brackets sets the fields of the method's own parts. Behind the @ stand how much is kept (`keep`, the
share of the prompt that stays, or `budget`, tokens) and other values for an axis:

    by=tokens | chunks(size=10) | units(scope=global)
    layers=uniform | pyramid(beta=20)
    heads=even | ada(floor=0.2)
    kv=full | int2 | int4 | kivi(bits=4,group=32,residual=128) | int8 | fp8
    decode=grow | shots(rd=0.4) | heavy | newest | tova | slide(window=512,recent=256) | adaptive | discontinuous
    rd=0.4, short for decode=shots(rd=0.4)

Semicolons do as well as commas, which other command lines (lm-eval's) keep for themselves.

A method is a row of `METHODS`: its scorer, and the other axes where they are not the plain ones. Nothing that is
generated is forgotten unless the method does so (streaming, h2o, tova) or `decode` or `rd` says it. With keep=1 a cache
that keeps its size keeps everything.
"""

import dataclasses
import functools
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from jaxfw.core.errors import InputError, unknown
from jaxfw.kv import decoding, granularity, scorers, stores
from jaxfw.kv.budgets import LayerBudget, Pyramid, Uniform
from jaxfw.kv.cache import GROW, TOKENS, UNIFORM, KVCache
from jaxfw.kv.heads import Ada, Even, HeadBudget
from jaxfw.kv.pooled_cache import EVEN, FULL, PooledCache


@dataclasses.dataclass(frozen=True)
class Method:
    """The parts of a method at their defaults, and the paper."""

    scorer: scorers.Scorer
    by: granularity.Granularity = TOKENS
    layers: LayerBudget = UNIFORM
    heads: HeadBudget = EVEN
    decode: decoding.Decode = GROW
    reassign: bool = False


METHODS: Mapping[str, Method] = MappingProxyType({
    "streaming": Method(scorers.Sinks(), decode=decoding.Newest(), reassign=True),
    "random": Method(scorers.Random()),
    "knorm": Method(scorers.Knorm()),
    "keydiff": Method(scorers.KeyDiff()),
    "snapkv": Method(scorers.SnapKV()),
    "h2o": Method(scorers.HeavyHitters(), decode=decoding.Heavy()),
    "tova": Method(scorers.LastQuery(), decode=decoding.Tova()),
    "pyramidkv": Method(scorers.SnapKV(), layers=Pyramid()),
    "adakv": Method(scorers.SnapKV(), heads=Ada()),
    "critical": Method(scorers.Critical()),
    "expected": Method(scorers.ExpectedAttention()),
    "chunkkv": Method(scorers.SnapKV(kernel=1), by=granularity.Chunks()),
    "lagkv": Method(scorers.LagKV()),
    "shotkv": Method(scorers.QuestionMass(), by=granularity.Units()),
    "randomshot": Method(scorers.RandomUnits(), by=granularity.Units()),
    "oracleshot": Method(scorers.FirstUnits(), by=granularity.Units()),
})  # fmt: skip

# Known, and not built: a cache policy sees a layer's keys, not the hidden states that the next layer will read.
REFUSED: Mapping[str, str] = MappingProxyType({
    "pyramidinfer": "drops tokens between layers while a prompt is read, and a cache policy only what a layer keeps of "
    "it: take pyramidkv, whose upper layers keep less",
    "quest": "keeps everything and reads a part of it: it forgets nothing, and saves no memory",
})  # fmt: skip

AXES: Mapping[str, Mapping[str, Any]] = MappingProxyType({
    "by": {"tokens": granularity.Tokens, "chunks": granularity.Chunks, "units": granularity.Units},
    "layers": {"uniform": Uniform, "pyramid": Pyramid},
    "heads": {"even": Even, "ada": Ada},
    "kv": {
        "full": stores.Full, "kivi": stores.Kivi, "int2": functools.partial(stores.Kivi, 2),
        "int4": functools.partial(stores.Kivi, 4), "int8": functools.partial(stores.PerToken, "int8"),
        "fp8": functools.partial(stores.PerToken, "fp8"),
    },
    "decode": {
        "grow": decoding.Grow, "shots": decoding.Shots, "heavy": decoding.Heavy, "newest": decoding.Newest,
        "tova": decoding.Tova, "slide": decoding.Slide, "adaptive": decoding.Adaptive,
        "discontinuous": decoding.Discontinuous,
    },
})  # fmt: skip


def parse(text: str, *, layers: int = 1) -> KVCache:
    """The cache policy that a string names, for a model of so many layers.

    Raises:
        InputError: an unknown method, option or value, with the nearest known one; what cannot be used.

    >>> parse("snapkv(w=16)@keep=0.3").scorer
    SnapKV(w=16, kernel=5, pool='avg')
    >>> parse("shotkv@keep=0.5,rd=0.4").decode
    Shots(rd=0.4, recent=1, score='mass')
    """
    if not isinstance(text, str):
        raise InputError(f"kv={text!r:.60} must be a string such as 'snapkv@keep=0.3'.")
    head, at, tail = text.strip().partition("@")
    name, fields = _call(head, text)
    if name in REFUSED:
        raise InputError(f"kv={text!r}: {name} {REFUSED[name]}.")
    if name not in METHODS:
        raise unknown("kv method", name, METHODS)
    options = _options(tail, text)
    if not at or not {"keep", "budget"} & set(options):
        raise InputError(f"kv={text!r} does not say how much stays: add @keep=0.3 (a share) or @budget=256 (tokens).")
    method = METHODS[name]
    parts: dict[str, Any] = {
        "scorer": method.scorer, "by": method.by, "layers": method.layers, "heads": method.heads, "kv": FULL,
        "decode": method.decode,
    }  # fmt: skip
    given = {axis: _axis(axis, options.pop(axis), text) for axis in AXES if axis in options}
    parts |= given
    if "rd" in options:
        given["decode"] = parts["decode"] = _decode_share(options.pop("rd"), parts["decode"], text)
    more: dict[str, Any] = {"reassign": method.reassign and isinstance(parts["decode"], decoding.Newest)}
    own = {"units": "blocks"} if isinstance(parts["by"], granularity.Units) else {}
    own |= {"reassign": True} if isinstance(parts["decode"], decoding.Newest) else {}
    its_own = {axis: part for axis, part in parts.items() if axis not in given}
    found, more = _with_fields(name, its_own, own, fields, more, text)
    parts |= found
    for option, kind in (("keep", float), ("budget", int)):
        if option in options:
            more[option] = _value(option, options.pop(option), kind, text)
    if options:
        raise unknown(f"kv={text!r}: option", next(iter(options)), ("keep", "budget", "rd", *AXES))
    if more.get("keep") == 1 and parts["decode"].region == "all":
        parts["decode"], more["reassign"] = decoding.Grow(), False
    more |= {"scorer": parts["scorer"], "granularity": parts["by"], "layer_budget": parts["layers"],
             "decode": parts["decode"], "layers": layers}  # fmt: skip
    if parts["heads"] == EVEN and parts["kv"] == FULL:
        return KVCache(**more)
    return PooledCache(heads=parts["heads"], store=parts["kv"], **more)


def _with_fields(
    name: str, parts: dict[str, Any], own: dict[str, Any], fields: dict[str, str], more: dict[str, Any], text: str
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The parts with the fields in brackets, each in every part that has it."""
    found: dict[str, dict[str, Any]] = {axis: {} for axis in parts}
    for field, value in fields.items():
        if field in own:
            more = more | {field: _value(field, value, type(own[field]), text)}
        having = [axis for axis, part in parts.items() if field in _fields(part)]
        for axis in having:
            found[axis][field] = _value(field, value, type(_fields(parts[axis])[field]), text)
        if not having and field not in own:
            known = sorted({*own, *(field for part in parts.values() for field in _fields(part))})
            if not known:
                raise InputError(f"kv={text!r}: {name} takes nothing in brackets, and {field} was given.")
            raise unknown(f"kv={text!r}: field of {name}", field, known)
    return {axis: dataclasses.replace(part, **found[axis]) for axis, part in parts.items()}, more


def _fields(part: Any) -> dict[str, Any]:
    return {field.name: getattr(part, field.name) for field in dataclasses.fields(part)}


def _axis(axis: str, value: str, text: str) -> Any:
    name, fields = _call(value, text)
    if name not in AXES[axis]:
        raise unknown(f"kv={text!r}: {axis}", name, AXES[axis])
    found, _ = _with_fields(name, {axis: AXES[axis][name]()}, {}, fields, {}, text)
    return found[axis]


def _decode_share(rd: str, decode: Any, text: str) -> decoding.Shots:
    if not isinstance(decode, decoding.Grow):
        raise InputError(
            f"kv={text!r}: rd={rd} is short for decode=shots(rd={rd}), and this forgets by {decode}: give one of both."
        )
    return decoding.Shots(_value("rd", rd, float, text))


def _call(piece: str, text: str) -> tuple[str, dict[str, str]]:
    """`name(a=1,b=2)` -> its name and fields."""
    name, bracket, rest = piece.strip().partition("(")
    if not bracket:
        return name.strip(), {}
    if not rest.endswith(")"):
        raise InputError(f"kv={text!r}: the bracket behind {name!r} is not closed.")
    return name.strip(), _options(rest[:-1], text)


def _options(tail: str, text: str) -> dict[str, str]:
    """`a=1,b=f(c=2)` -> names and values, cut at commas or semicolons that stand in no bracket."""
    pieces, depth = [""], 0
    for letter in tail:
        depth += (letter == "(") - (letter == ")")
        if letter in ",;" and depth == 0:
            pieces.append("")
        else:
            pieces[-1] += letter
    if depth:
        raise InputError(f"kv={text!r}: {tail!r} has brackets that do not match: write name(field=value,...).")
    found: dict[str, str] = {}
    for piece in filter(None, (piece.strip() for piece in pieces)):
        name, equals, value = (part.strip() for part in piece.partition("="))
        if not equals or not value:
            raise InputError(f"kv={text!r}: {piece!r} must be name=value.")
        if name in found:
            raise InputError(f"kv={text!r}: {name} is given twice: give it once.")
        found[name] = value
    return found


def _value(name: str, value: str, kind: type, text: str) -> Any:
    if kind is bool:
        if value.lower() not in ("true", "false"):
            raise InputError(f"kv={text!r}: {name}={value} must be true or false.")
        return value.lower() == "true"
    try:
        return kind(value)
    except ValueError:
        wanted = {int: "a whole number", float: "a number"}[kind]
        raise InputError(f"kv={text!r}: {name}={value} must be {wanted}.") from None
