"""Bytes of parameters per device, of every preset on every mesh that one would rent for it; exact, from shapes alone.

    python -m experiments.sharding                     # prints the totals, writes experiments/results/sharding.json
    python -m experiments.sharding llama-3.1-8b tensor=8,data=2      # prints one table, rule by rule

Nothing runs and no memory is held: the rules of `jaxfw.models.sharding` choose layouts, and each cuts evenly.
"""

import functools
import json
import sys
from pathlib import Path
from typing import Any

import jax

from jaxfw.core import runtime
from jaxfw.core.errors import InputError
from jaxfw.core.mesh import abstract_mesh, parse_mesh
from jaxfw.core.sharding import Table, table
from jaxfw.models import init
from jaxfw.models.presets import PRESETS, preset
from jaxfw.models.sharding import decoder_rules

MESHES = (
    "data=8", "tensor=8", "fsdp=8", "tensor=16", "data=2,fsdp=2,tensor=2", "fsdp=8,tensor=8", "fsdp=8,expert=8",
    "expert=8,tensor=8",
)  # fmt: skip
# Presets whose tables are written down rule by rule: one of each kind of body.
TABLES = ("llama-3.2-1b", "qwen2.5-7b", "gpt2", "mixtral-8x7b", "qwen1.5-moe-a2.7b", "deepseek-moe-16b")
RESULTS = Path(__file__).parent / "results" / "sharding.json"


@functools.cache
def _shapes(name: str) -> Any:
    return jax.eval_shape(lambda: init(preset(name), jax.random.key(0)))


def layout(name: str, mesh: str) -> Table:
    """The table of a preset on a mesh, given as in `tensor=8,data=2`."""
    rules = decoder_rules(preset(name))
    return table(rules, abstract_mesh(**parse_mesh(mesh)), _shapes(name))


def run() -> dict[str, Any]:
    """Every preset on every mesh."""
    results: dict[str, Any] = {}
    for name in PRESETS:
        for mesh in MESHES:
            found = layout(name, mesh)
            row: dict[str, Any] = {"bytes": found.bytes, "bytes_per_device": found.bytes_per_device}
            if name in TABLES:
                row["table"] = str(found).splitlines()
            results.setdefault(name, {})[mesh] = row
    return results


def summary(results: dict[str, Any]) -> str:
    """GiB per device, a line a preset."""
    lines = [["GiB per device", "whole", *MESHES]]
    for name, found in results.items():
        sizes = [found[MESHES[0]]["bytes"], *(found[mesh]["bytes_per_device"] for mesh in MESHES)]
        lines.append([name, *(f"{size / 2**30:.2f}" for size in sizes)])
    widths = [max(map(len, column)) for column in zip(*lines)]
    return "\n".join("  ".join(cell.rjust(width) for cell, width in zip(line, widths)) for line in lines)


def main(arguments: list[str]) -> int:
    """The command line."""
    if arguments:
        name, mesh = arguments if len(arguments) == 2 else (arguments[0], "")
        print(layout(name, mesh))
        return 0
    results = run()
    print(summary(results))
    RESULTS.write_text(json.dumps({"environment": runtime.environment(), "presets": results}, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except InputError as error:
        sys.exit(str(error))
