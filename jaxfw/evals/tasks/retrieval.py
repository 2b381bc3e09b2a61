"""What was said once among others, asked for in the end."""

import dataclasses

import numpy as np

from jaxfw.evals.items import Item

NAMES = (
    "red", "blue", "green", "brown", "black", "white", "grey", "pink", "gold", "silver", "amber", "ivory",
    "scarlet", "purple", "orange", "yellow", "big", "small", "tall", "short", "long", "thin", "fat", "wide",
    "narrow", "deep", "round", "square", "flat", "sharp", "heavy", "light", "old", "young", "new", "early", "late",
    "fast", "slow", "quick", "calm", "wild", "tame", "bold", "shy", "brave", "kind", "cruel", "proud", "humble",
    "happy", "sad", "angry", "merry", "gentle", "rough", "smooth", "soft", "hard", "warm", "cold", "hot", "cool",
    "wet", "dry", "clean", "dirty", "rich", "poor", "strong", "weak", "loud", "quiet", "silent", "noisy", "bright",
    "dark", "pale", "dull", "shiny", "clever", "wise", "foolish", "lazy", "busy", "idle", "tired", "hungry",
    "thirsty", "sleepy", "lonely", "lucky", "jolly", "noble", "royal", "plain", "fancy", "simple", "strange",
    "common", "rare", "famous", "secret", "hidden", "open", "closed", "broken", "empty", "full", "fresh", "sweet",
    "sour", "bitter", "salty", "spicy", "tiny", "huge", "giant", "little", "mighty", "gifted", "polite", "rude",
    "honest", "loyal", "patient", "eager", "curious",
)  # fmt: skip
ANIMALS = (
    "lion", "tiger", "bear", "wolf", "fox", "deer", "horse", "camel", "zebra", "goat", "sheep", "pig", "cow", "dog",
    "cat", "mouse", "rat", "rabbit", "hare", "mole", "otter", "beaver", "seal", "whale", "shark", "trout", "eel",
    "crab", "snail", "frog", "toad", "newt", "snake", "lizard", "turtle", "hawk", "eagle", "owl", "crow", "raven",
    "robin", "swan", "goose", "duck", "hen", "turkey", "crane", "heron",
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Retrieval:
    """`level` lines that give an animal to a name; where the one asked for stands is drawn evenly.

    The working is the line again. Animals are drawn anew each time, and what is held out is the name with its animal.
    """

    name: str = "retrieval"
    levels: tuple[int, ...] = (8, 16, 32, 64, 128)
    standard: int = 32

    def draw(self, rng: np.random.Generator, level: int) -> Item:
        names = rng.choice(np.array(NAMES), size=level, replace=False).tolist()
        animals = rng.choice(np.array(ANIMALS), size=level).tolist()
        return _items(names, animals)[int(rng.integers(level))]


def same_context(item: Item) -> list[Item]:
    """The questions about every line that an item of this task shows, in their order."""
    said = [line.removesuffix(".").split(" ") for line in item.context.splitlines()]
    return _items([words[1] for words in said], [words[2] for words in said])


def _items(names: list[str], animals: list[str]) -> list[Item]:
    lines = [f"The {name} {animal}" for name, animal in zip(names, animals, strict=True)]
    context = "".join(f"{line}.\n" for line in lines)
    return [
        Item(
            identity=f"retrieval {name} {animal}", level=len(names), context=context,
            question=f"Which animal is {name}?", answer=animal, working=line,
        )
        for name, animal, line in zip(names, animals, lines, strict=True)
    ]  # fmt: skip
