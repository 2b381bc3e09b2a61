"""Errors that speak to a user: the field, the value that was given, what is accepted, and what to do."""

import difflib
from collections.abc import Iterable
from typing import Any


class InputError(ValueError):
    """Something the user gave cannot be used; the launcher prints the message without a traceback."""


class RunError(RuntimeError):
    """A run failed for a reason that it can name; the launcher prints the message without a traceback."""


class Preempted(RuntimeError):
    """A run was told to stop, saved, and ended early: the same command goes on; the launcher exits with 143."""


def unknown(field: str, value: Any, known: Iterable[Any]) -> InputError:
    """The error for a value outside a closed set, with the nearest known one.

    >>> unknown("model.rope.kind", "lama3", ["default", "llama3"]).args[0]
    "model.rope.kind='lama3' is unknown. Known: default, llama3. Did you mean 'llama3'?"
    """
    names = [str(name) for name in known]
    near = difflib.get_close_matches(str(value), names, n=1)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    return InputError(f"{field}={value!r} is unknown. Known: {', '.join(names)}.{hint}")
