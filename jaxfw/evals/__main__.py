"""What a model can do, on the command line.

    python -m jaxfw.evals --model=DIR --tasks=abilities
    python -m jaxfw.evals --model=DIR --tasks=facts,code --level=all --shots=4 --json=results.json

Items are made here, from a seed, apart from those that are for training. Beside each accuracy stand its 95 % interval
and the best of the trivial answers (majority, copy last, nearest example). Exit codes: 0; 1 when the run fails; 2 when
what was given cannot be used.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jaxfw.core import runtime
from jaxfw.core.command import OK, Parser, run_command
from jaxfw.core.errors import InputError, unknown
from jaxfw.evals.evaluate import BATCH, baselines, evaluate, row
from jaxfw.evals.items import Task
from jaxfw.evals.tasks import ABILITIES, TASKS
from jaxfw.generate.lm import load
from jaxfw.weights import model_sha256


def parser() -> argparse.ArgumentParser:
    """The flags."""
    p = Parser(
        prog="python -m jaxfw.evals", description=__doc__, allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    p.add_argument("--model", required=True, help="a Hugging Face model directory")
    p.add_argument("--tasks", default="abilities", help=f"abilities, all, or names with commas: {', '.join(TASKS)}")
    p.add_argument("--level", default="standard", help="standard, all, or a number that the tasks have")
    p.add_argument("--n", type=int, default=500, help="items of each task and level")
    p.add_argument("--shots", type=int, default=0, help="solved examples in front of each question")
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--batch", type=int, default=BATCH, help="prompts that are answered together")
    p.add_argument("--choose", action="store_true", help="the likeliest of the choices, without working")
    p.add_argument("--json", type=Path, help="a file for the results")
    p.add_argument("--traceback", action="store_true", help="show where an error came from")
    return p


def chosen_tasks(names: str) -> list[Task]:
    """Tasks by their names, `abilities` or `all`."""
    groups = {"abilities": list(ABILITIES), "all": list(TASKS)}
    chosen = groups.get(names) or [name.strip() for name in names.split(",")]
    for name in chosen:
        if name not in TASKS:
            raise unknown("task", name, [*groups, *TASKS])
    return [TASKS[name] for name in chosen]


def chosen_levels(task: Task, level: str) -> tuple[int, ...]:
    """Levels of a task by a word or a number."""
    if level == "standard":
        return (task.standard,)
    if level == "all":
        return task.levels
    if not level.isdigit() or int(level) not in task.levels:
        raise unknown(f"level of {task.name}", level, ["standard", "all", *map(str, task.levels)])
    return (int(level),)


def run(argv: Sequence[str]) -> int:
    """Evaluate and print; returns the exit code."""
    options = parser().parse_args(argv)
    jobs = [(task, level) for task in chosen_tasks(options.tasks) for level in chosen_levels(task, options.level)]
    if options.n < 1:
        raise InputError(f"n={options.n} must be at least 1: an accuracy of no item means nothing.")
    if options.json and not options.json.parent.is_dir():
        raise InputError(f"--json={options.json}: there is no folder {options.json.parent}. Make it first.")
    lm = load(options.model)
    rows: list[dict[str, Any]] = []
    print(f"{'task':12} level shots     n  accuracy [95 %]          chance  best trivial answer")
    for task, level in jobs:
        found = evaluate(
            lm, task, n=options.n, level=level, shots=options.shots, seed=options.seed, batch=options.batch,
            choosing=options.choose,
        )  # fmt: skip
        rows.append(row(found, baselines(task, n=options.n, level=level, seed=options.seed)))
        print(line(rows[-1]), flush=True)
    if options.json:
        report = {
            "model": str(options.model), "model_sha256": model_sha256(options.model), "seed": options.seed,
            "by": "choices" if options.choose else "writing", "rows": rows, "environment": runtime.environment(),
        }  # fmt: skip
        options.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    return OK


def line(found: dict[str, Any]) -> str:
    """A row of the table."""
    accuracy, best = found["accuracy"], found["best_baseline"]
    return (
        f"{found['task']:12} {found['level']:5} {found['shots']:5} {found['n']:5}  {accuracy['value']:.3f} "
        f"[{accuracy['low']:.3f}, {accuracy['high']:.3f}]     {found['chance']:.3f}  {best['value']:.3f} {best['name']}"
    )


def main(argv: Sequence[str]) -> int:
    """Evaluate, and say in one line what went wrong; returns the exit code."""
    return run_command(run, argv)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
