"""Abilities as tasks that are made here, and what an accuracy or a difference of two is worth."""

from jaxfw.evals.intervals import paired_difference, wilson
from jaxfw.evals.items import Item, Task, draw, items, parse, right, side
from jaxfw.evals.tasks import ABILITIES, TASKS

__all__ = [
    "ABILITIES",
    "TASKS",
    "Item",
    "Task",
    "draw",
    "items",
    "paired_difference",
    "parse",
    "right",
    "side",
    "wilson",
]
