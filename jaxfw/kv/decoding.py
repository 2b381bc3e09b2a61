"""What is forgotten while text is generated: at most one token a step, whose slot the next one takes.

After the attention of a step, a policy says how many tokens of its region may stay; if there are more, the one of
lowest score goes, never one of the newest or of the sinks. Keys are rotated, so that their slots have no order:
overwriting one is all that eviction costs.
"""

import dataclasses
import math
from fractions import Fraction
from typing import Literal

import jax.numpy as jnp

from jaxfw.core.errors import InputError, unknown
from jaxfw.core.shapes import Array, Int

Score = Literal["mass", "sum", "age"]
SCORES = ("mass", "sum")


class Decode:
    """What all policies of decoding share; each is a frozen dataclass. This one's attributes forget nothing.

    Attributes:
        evicts: whether anything is forgotten.
        region: what may go: "generated", what follows the prompt, or "all" that is held.
        is_shared: one choice for all heads of a layer.
        score: "mass", the attention of this step's query; "sum", of all queries so far; "age", the oldest goes.
        sinks: so many of the first tokens stay.
        wait: steps with a full region before it is cut back; it grows beyond its limit meanwhile.
    """

    evicts: bool = True
    region: Literal["generated", "all"] = "generated"
    is_shared: bool = False
    score: Score = "mass"
    sinks: int = 0
    wait: int = 0

    def room(self, new: int) -> int:
        """Slots for what follows the prompt, of which there are `new` tokens at most."""
        raise NotImplementedError

    def limit(self, t: Int[Array, "B"], kept: Int[Array, "B"]) -> Int[Array, "B"]:
        """Tokens of the region that stay after t generated ones; `kept` is what the whole cache may hold."""
        raise NotImplementedError

    def newest(self, kept: Int[Array, "B"]) -> Int[Array, "B"]:
        """How many of the newest tokens cannot go."""
        return jnp.ones_like(kept)


@dataclasses.dataclass(frozen=True)
class Grow(Decode):
    """Nothing is forgotten."""

    evicts = False

    def room(self, new: int) -> int:
        """A slot each."""
        return new


@dataclasses.dataclass(frozen=True)
class Shots(Decode):
    """ShotKV's decoding (arXiv:2502.01941, Alg. 1): of t generated tokens ceil(`rd` t) stay, all heads the same.

    The prompt's part is left alone. AMBIGUOUS: read to the letter, the share is taken of what the step before left, and
    soon nothing is; here t counts every generated token.
    """

    rd: float = 1.0
    recent: int = 1
    score: Score = "mass"
    is_shared = True

    def __post_init__(self):
        if not 0 < self.rd <= 1:
            raise InputError(f"rd={self.rd} must lie in (0, 1]: the share of generated tokens that stay.")
        if self.score not in SCORES:
            raise unknown("score", self.score, SCORES)
        _check_recent(self.recent)

    @property
    def _share(self) -> Fraction:
        return Fraction(self.rd).limit_denominator(10_000)

    def room(self, new: int) -> int:
        """What stays of all, and the newest."""
        return min(new, max(self.recent, math.ceil(self._share * new)) + 1)

    def limit(self, t: Int[Array, "B"], kept: Int[Array, "B"]) -> Int[Array, "B"]:
        """ceil(rd t), in whole numbers."""
        return jnp.maximum(self.recent, -(-self._share.numerator * t // self._share.denominator))

    def newest(self, kept: Int[Array, "B"]) -> Int[Array, "B"]:
        """A fixed number."""
        return jnp.full_like(kept, self.recent)


@dataclasses.dataclass(frozen=True)
class Slide(Decode):
    """SCOPE (arXiv:2412.13649): of what is generated, `window` tokens stay, the `recent` newest among them."""

    window: int = 512
    recent: int = 256

    def __post_init__(self):
        _check_recent(self.recent)
        if self.window <= self.recent:
            raise InputError(f"window={self.window} must exceed recent={self.recent}: nothing could be chosen.")

    def room(self, new: int) -> int:
        """The window, and the newest."""
        return min(new, self.window + 1)

    def limit(self, t: Int[Array, "B"], kept: Int[Array, "B"]) -> Int[Array, "B"]:
        """The window."""
        return jnp.full_like(t, self.window)

    def newest(self, kept: Int[Array, "B"]) -> Int[Array, "B"]:
        """A fixed number."""
        return jnp.full_like(kept, self.recent)


@dataclasses.dataclass(frozen=True)
class Adaptive(Decode):
    """SCOPE's growing window: the `recent` newest, and one more for every `delta` steps."""

    recent: int = 256
    delta: int = 15

    def __post_init__(self):
        _check_recent(self.recent)
        if self.delta < 1:
            raise InputError(f"delta={self.delta} must be at least 1 step.")

    def room(self, new: int) -> int:
        """The largest window, and the newest."""
        return min(new, self.recent + new // self.delta + 1)

    def limit(self, t: Int[Array, "B"], kept: Int[Array, "B"]) -> Int[Array, "B"]:
        """The window after t steps; the first of them has none behind it."""
        return self.recent + jnp.maximum(t - 1, 0) // self.delta

    def newest(self, kept: Int[Array, "B"]) -> Int[Array, "B"]:
        """A fixed number."""
        return jnp.full_like(kept, self.recent)


@dataclasses.dataclass(frozen=True)
class Discontinuous(Adaptive):
    """SCOPE's growing window, cut back only after `delta` steps in which it was full: fewer choices."""

    @property
    def wait(self) -> int:  # pyright: ignore[reportIncompatibleVariableOverride]
        """As many steps."""
        return self.delta

    def room(self, new: int) -> int:
        """As much more as gathers while it waits."""
        return min(new, self.recent + new // self.delta + self.delta + 1)


class Whole(Decode):
    """A cache that keeps the size that it had after the prompt, whatever it holds."""

    region = "all"

    def room(self, new: int) -> int:
        """For the newest."""
        return min(new, 1)

    def limit(self, t: Int[Array, "B"], kept: Int[Array, "B"]) -> Int[Array, "B"]:
        """What the prompt left."""
        return kept


@dataclasses.dataclass(frozen=True)
class Heavy(Whole):
    """H2O (arXiv:2306.14048): the token with least summed attention goes; a `recent` share is for the newest."""

    recent: float = 0.5
    score = "sum"

    def __post_init__(self):
        if not 0 <= self.recent < 1:
            raise InputError(f"recent={self.recent} must lie in [0, 1): the newest tokens' share of the cache.")

    def newest(self, kept: Int[Array, "B"]) -> Int[Array, "B"]:
        """At least this step's own."""
        return jnp.maximum(1, jnp.floor(kept * self.recent + 1e-6).astype(kept.dtype))


@dataclasses.dataclass(frozen=True)
class Newest(Whole):
    """StreamingLLM (arXiv:2309.17453): the first `sinks` tokens stay, and the newest; the oldest other goes."""

    sinks: int = 4
    score = "age"

    def __post_init__(self):
        if self.sinks < 0:
            raise InputError(f"sinks={self.sinks} must be 0 or more first tokens.")


@dataclasses.dataclass(frozen=True)
class Tova(Whole):
    """TOVA (arXiv:2401.06104): what the newest query looks at least goes, be it its own token; all heads the same."""

    is_shared = True

    def newest(self, kept: Int[Array, "B"]) -> Int[Array, "B"]:
        """None."""
        return jnp.zeros_like(kept)


def _check_recent(recent: int) -> None:
    if recent < 1:
        raise InputError(f"recent={recent} must be at least 1: so many of the newest tokens stay.")
