"""Keywords that several methods of `LM` share, and what they return when more than text is asked for."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, Literal, TypedDict

import numpy as np

from jaxfw.core.errors import InputError
from jaxfw.core.shapes import Float, PRNGKeyArray, PyTree
from jaxfw.generate.prefix import Prefix
from jaxfw.models import Edit
from jaxfw.models.cache import CachePolicy
from jaxfw.models.routing import Experts, Router
from jaxfw.ops.sampling import Sampling

OnText = Callable[[int, str], None]  # row and piece


class ModelValues(TypedDict, total=False):
    """What goes to the model as it is.

    Keys:
        policy: what the cache keeps (`jaxfw.models.cache`); None keeps everything.
        kv: the same by name, "snapkv@keep=0.3" (`jaxfw.kv`).
        room: slots of the cache. Calls with one batch size and one `room` share a compiled decode loop, whatever their
            prompts; None takes what the longest prompt's bucket and `max_new_tokens` need.
        router: who decides which experts a token goes to; None is the config's.
        router_states: what a router with a bias remembers of training.
        experts: who runs a mixture's experts (`jaxfw.models.routing`); None is `Sorted()`.
        taps: edits of what passes inside of the model (`jaxfw.models.taps`).
    """

    policy: CachePolicy | None
    kv: str | None
    room: int | None
    router: Router | None
    router_states: PyTree | None
    experts: Experts | None
    taps: Sequence[Edit]


class Options(ModelValues, total=False):
    """What `generate` and `chat` take alike, described at `generate`."""

    max_new_tokens: int
    temperature: float | None
    top_k: int | None
    top_p: float | None
    min_p: float | None
    repetition_penalty: float | None
    key: PRNGKeyArray | None
    stop: str | Sequence[str]
    prefix: Prefix | None
    protocol: str
    on_text: OnText | None


@dataclasses.dataclass(frozen=True)
class Answer:
    """A text that was generated, and how.

    Attributes:
        text: without what ended it.
        tokens: its ids, and what ended it: the stop id, or the rest of a stop string.
        logprobs: of each token, float32, in the model's own distribution: before penalty, temperature and filters.
        finish_reason: "stop" at a stop id or stop string, "length" at `max_new_tokens`.
        prefill_seconds: that reading the prompts of the whole call took, with compilation where it was the first.
        decode_seconds: that the rest of the call took.
    """

    text: str
    tokens: tuple[int, ...]
    logprobs: Float[np.ndarray, "n"] = dataclasses.field(repr=False)
    finish_reason: Literal["stop", "length"]
    prefill_seconds: float
    decode_seconds: float


def take_sampling(options: dict[str, Any]) -> Sampling:
    """A `Sampling` from the options that belong to one, which are taken out; temperature 0 is greedy as well."""
    names = [field.name for field in dataclasses.fields(Sampling)]
    given = {name: options.pop(name) for name in names if name in options}
    return Sampling(**given | ({"temperature": None} if given.get("temperature") == 0 else {}))


def check_texts(texts: Any, name: str) -> list[str]:
    """`texts` as a list.

    Raises:
        InputError: it is no list of texts, or an empty one.
    """
    if not isinstance(texts, list | tuple) or not all(isinstance(text, str) for text in texts):
        raise InputError(f"{name}={texts!r:.80} must be a str or a list of str.")
    if not texts:
        raise InputError(f"{name} is an empty list: give at least one text.")
    return list(texts)
