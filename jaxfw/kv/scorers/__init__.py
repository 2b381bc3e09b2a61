"""Scorers: which tokens of a prompt are worth keeping, one idea a file."""

from jaxfw.kv.scorers.base import Context, Scorer, Scores
from jaxfw.kv.scorers.critical import Critical
from jaxfw.kv.scorers.expected import ExpectedAttention
from jaxfw.kv.scorers.keys import KeyDiff, Knorm
from jaxfw.kv.scorers.lag import LagKV
from jaxfw.kv.scorers.mass import HeavyHitters
from jaxfw.kv.scorers.place import FirstUnits, Random, RandomUnits, Sinks
from jaxfw.kv.scorers.window import LastQuery, QuestionMass, SnapKV

__all__ = [
    "Context", "Critical", "ExpectedAttention", "FirstUnits", "HeavyHitters", "KeyDiff", "Knorm", "LagKV", "LastQuery",
    "QuestionMass", "Random", "RandomUnits", "Scorer", "Scores", "Sinks", "SnapKV",
]  # fmt: skip
