"""The seven abilities and the hidden rule, by name."""

from types import MappingProxyType

from jaxfw.evals.items import Task
from jaxfw.evals.tasks.arithmetic import Arithmetic
from jaxfw.evals.tasks.code import Code
from jaxfw.evals.tasks.knowledge import Composition, Facts
from jaxfw.evals.tasks.long_output import LongOutput
from jaxfw.evals.tasks.retrieval import Retrieval
from jaxfw.evals.tasks.rule import Rule
from jaxfw.evals.tasks.safety import Safety

ABILITIES: MappingProxyType[str, Task] = MappingProxyType(
    {task.name: task for task in (Facts(), Composition(), Arithmetic(), Code(), Safety(), Retrieval(), LongOutput())}
)
TASKS: MappingProxyType[str, Task] = MappingProxyType({**ABILITIES, "rule": Rule()})

__all__ = [
    "ABILITIES",
    "TASKS",
    "Arithmetic",
    "Code",
    "Composition",
    "Facts",
    "LongOutput",
    "Retrieval",
    "Rule",
    "Safety",
]
