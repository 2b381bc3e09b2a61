"""How a prompt is read into a cache that keeps a part of it: the method, the units, and what the first token sees.

Three protocols, which answer different questions. "full": the prompt is read and then compressed; its first new token
is drawn from what was read, before anything was forgotten. "refeed": the last token of the prompt is read once more
through the compressed cache, so that the first new token sees no more than the others. "ctx": the context alone is
compressed, and the question, which stands behind the last unit, is read through that: the method does not know what
will be asked.
"""

import importlib
from collections.abc import Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

from jaxfw.core.errors import InputError, unknown

PROTOCOLS = ("full", "refeed", "ctx")
METHODS = "jaxfw.kv"  # by name, as a config names its experiment: what runs without compression does not load it
Spans = Sequence[tuple[int, int]]


@runtime_checkable
class CutsTexts(Protocol):
    """A policy that says where the units of a text lie."""

    def spans(self, text: str) -> Spans:
        """Characters [begin, end) of each."""
        ...


def with_policy(values: Mapping[str, Any], layers: int) -> dict[str, Any]:
    """The values with the policy of `policy` or `kv` (None if there is neither), and without `kv`.

    Raises:
        InputError: both are given, or the method is none.
    """
    policy, kv = values.get("policy"), values.get("kv")
    if kv is not None:
        if policy is not None:
            raise InputError(f"kv={kv!r} and policy={policy!r} are given: both say what the cache keeps, give one.")
        policy = importlib.import_module(METHODS).parse(kv, layers=layers)
    return {name: value for name, value in values.items() if name != "kv"} | {"policy": policy}


def check_units(texts: Sequence[str], units: Sequence[Spans]) -> None:
    """Raise an `InputError` unless these are spans of the texts, in order, none over another."""
    if len(units) != len(texts):
        raise InputError(f"units has {len(units)} lists of spans for {len(texts)} prompts: give one for each.")
    for i, (text, spans) in enumerate(zip(texts, units, strict=True)):
        before = 0
        for begin, end in spans:
            if not before <= begin < end <= len(text):
                raise InputError(
                    f"units[{i}] has the span ({begin}, {end}) behind character {before} of a text of {len(text)}: "
                    "spans [begin, end) stand in order, inside of the text, and do not overlap."
                )
            before = end


def reading(protocol: str, unit_ids: Sequence[Sequence[int]] | None) -> dict[str, Any]:
    """The keywords of `generate_tokens` for a protocol.

    Raises:
        InputError: the protocol is unknown, or needs units to know where the question begins.
    """
    if protocol not in PROTOCOLS:
        raise unknown("protocol", protocol, PROTOCOLS)
    found: dict[str, Any] = {"unit_ids": unit_ids, "refeed": protocol == "refeed", "contexts": None}
    if protocol == "ctx":
        if unit_ids is None:
            raise InputError("protocol='ctx' needs units, behind the last of which the question begins: give units=.")
        found["contexts"] = [context_length(row) for row in unit_ids]
        for i, (n, row) in enumerate(zip(found["contexts"], unit_ids, strict=True)):
            if not n:
                raise InputError(
                    f"protocol='ctx' compresses what stands up to the last unit, and prompt {i} has none: give units=, "
                    "or a policy that cuts texts otherwise, such as shotkv(units=lines)."
                )
            if n == len(row):
                raise InputError(
                    f"protocol='ctx' reads the question through the compressed context, and nothing of prompt {i} "
                    "stands behind the last unit: end the prompt with a question, or take protocol='refeed'."
                )
    return found


def context_length(unit_ids: Sequence[int]) -> int:
    """Tokens up to the end of the last unit.

    >>> context_length([-1, 0, 0, 1, -1, -1])
    4
    """
    return max((i + 1 for i, unit in enumerate(unit_ids) if unit >= 0), default=0)
