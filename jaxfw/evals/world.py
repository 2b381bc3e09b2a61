"""A small made-up world: people with homes, trades, instruments and superiors, towns with regions.

It is the same for everyone (no seed is passed): what a model has in its weights can only be asked about if the world is
fixed. Names are invented, so nothing of it can be known from elsewhere.
"""

import functools
import itertools

import numpy as np

PEOPLE, TOWNS, REGIONS = 720, 24, 6
FAME_GROUPS = 4  # of people, each less known than the one before
TRADES = (
    "baker", "smith", "judge", "nurse", "pilot", "miner", "tailor", "farmer", "painter", "sailor", "teacher", "cook",
)  # fmt: skip
INSTRUMENTS = ("flute", "drum", "harp", "violin", "horn", "piano", "lute", "cello")
RELATIONS = ("home", "trade", "instrument", "superior", "region")


@functools.cache
def _names() -> tuple[tuple[str, ...], tuple[str, ...], tuple[str, ...]]:
    """Of people, towns and regions: syllables put together, no two alike."""
    rng = np.random.default_rng(7)
    made = ["".join(parts) for parts in itertools.product("bdfgklmnprstvz", "aeiou", "dlmnrs", "aeiou")]
    chosen = rng.permutation(made)[: PEOPLE + TOWNS + REGIONS]
    people = tuple(str(name).capitalize() for name in chosen[:PEOPLE])
    towns = tuple(str(name).capitalize() + "ton" for name in chosen[PEOPLE : PEOPLE + TOWNS])
    regions = tuple(str(name).capitalize() + "land" for name in chosen[PEOPLE + TOWNS :])
    return people, towns, regions


def people() -> tuple[str, ...]:
    """Everyone, the best known first."""
    return _names()[0]


def towns() -> tuple[str, ...]:
    """All towns."""
    return _names()[1]


def regions() -> tuple[str, ...]:
    """All regions."""
    return _names()[2]


@functools.cache
def _table() -> dict[str, dict[str, str]]:
    rng = np.random.default_rng(11)
    everyone = people()
    shift = int(rng.integers(1, PEOPLE))
    superior: dict[str, str] = {}
    for group in np.split(np.array(everyone), FAME_GROUPS):
        # Bosses are as well known as those who report to them, and chains of them are a cycle: none meets one twice.
        order = rng.permutation(group).tolist()
        superior |= dict(zip(order, [*order[1:], order[0]], strict=True))

    def spread(values: tuple[str, ...]) -> dict[str, str]:
        """Each value for as many people as any other, so that no guess is better than chance."""
        drawn = rng.permutation(np.resize(np.array(values), PEOPLE))
        return {name: str(value) for name, value in zip(np.roll(everyone, shift), drawn, strict=True)}

    return {
        "home": spread(towns()),
        "trade": spread(TRADES),
        "instrument": spread(INSTRUMENTS),
        "superior": superior,
        "region": dict(zip(towns(), np.resize(np.array(regions()), TOWNS).tolist(), strict=True)),
    }


def fact(relation: str, subject: str) -> str:
    """What holds of someone, or of a town (`region`).

    >>> fact("region", fact("home", people()[0])) in regions()
    True
    """
    return _table()[relation][subject]


def values(relation: str) -> tuple[str, ...]:
    """Everything that a relation can give."""
    return {
        "home": towns(), "trade": TRADES, "instrument": INSTRUMENTS, "superior": people(), "region": regions(),
    }[relation]  # fmt: skip
