"""The letters that name array axes, the same in every signature, einsum, error and page of this project.

| letter | axis | letter | axis |
|---|---|---|---|
| B | batch | F | feed-forward width |
| T | query position, sequence | V | vocabulary |
| S | key position, cache length | L | layers |
| D | model width | E | experts |
| H | query heads | C | capacity, kept slots |
| K | key/value heads | M | clients, models |
| G | H / K, queries per key head | N | examples |
| d | head width | R | rank |
"""

from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray, PyTree

__all__ = ["Array", "Bool", "Float", "Int", "PRNGKeyArray", "PyTree"]
