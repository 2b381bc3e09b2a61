"""The door: run an experiment from a config file.

    python -m jaxfw.launch --config=configs/quickstart.py --workdir=runs/quickstart
    python -m jaxfw.launch --config=configs/quickstart.py:smoke --config.train.steps=20 --workdir=runs/smoke
    python -m jaxfw.launch --config=configs/quickstart.py --dry-run

`config.experiment` names a module with `run(config, workdir) -> dict`. The workdir receives config.json, env.json and
what the experiment writes (metrics.jsonl, tb/, checkpoints/, models), then results.json and report.html. The same
command on the same workdir goes on from the newest checkpoint. Exit codes: 0; 1 when a check or the run fails; 2 when
what was given cannot be used; 143 when SIGTERM came and the run saved first. --traceback shows where an error is from.

Several processes run it together (docs/multi_host.md) on a workdir that all of them see; an experiment that can says so
by `MANY_PROCESSES = True`.
"""

import difflib
import importlib.util
import json
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

from absl import flags
from ml_collections import ConfigDict, config_flags

from jaxfw.core import runtime
from jaxfw.core.command import FAILED, INTERRUPTED, OK, UNUSABLE, say_error
from jaxfw.core.config import check_override, to_plain
from jaxfw.core.config_file import load_config
from jaxfw.core.distributed import FLAGS, barrier, current, finish, join_by_flags
from jaxfw.core.errors import InputError, Preempted, RunError, unknown
from jaxfw.core.lost import lost, say_host
from jaxfw.core.workdir import check_shared, claim, open_workdir, release, write_json

PREEMPTED = 143


def main(argv: Sequence[str]) -> int:
    """Parse the command line, run, and say in one line what went wrong; returns the exit code."""
    if any(word in ("--help", "-h", "--helpfull", "-help") for word in argv[1:]):
        print(__doc__)
        return OK
    try:
        config, options = parse(argv)
        if options["dry-run"].value:
            return dry_run(config)
        join_by_flags({name: options[name].value for name in FLAGS})
        say_host()
        return launch(config, options["workdir"].value)
    except InputError as error:
        return say_error(argv, str(error), UNUSABLE)
    except Preempted as stop:
        print(stop, file=sys.stderr)
        return PREEMPTED
    except KeyboardInterrupt:
        print("interrupted: the same command goes on from the newest checkpoint, if there is one", file=sys.stderr)
        return INTERRUPTED
    except Exception as error:
        cause = error.__cause__ or error
        gone = lost(cause)
        if gone is None:
            if not isinstance(error, RunError):
                raise
            return say_error(argv, str(error), FAILED)
        said = f"{current()} lost {gone}, whose own output says why (here: {str(cause).splitlines()[0]})."
        return say_error(
            argv, f"{said} Start all again with the same command: it goes on from the newest checkpoint.", FAILED
        )


def parse(argv: Sequence[str]) -> tuple[ConfigDict, flags.FlagValues]:
    """The locked config with its overrides, and the other flags."""
    named = [word.removeprefix("--config=") for word in argv[1:] if word.startswith("--config=")]
    if len(named) != 1:
        near = [word for word in argv[1:] if difflib.get_close_matches(word.partition("=")[0], ["--config"])]
        hint = f" Did you mean --config where you wrote {near[0]}?" if near and not named else ""
        raise InputError(
            f"--config is given {len(named)} times: name one file, as in --config=configs/quickstart.py.{hint}"
        )
    config = load_config(named[0])
    words = [word for word in argv if not word.startswith("--config=")]
    for word in words:
        if word.startswith("--config."):
            check_override(config, word.removeprefix("--config.").partition("=")[0])
    options = flags.FlagValues()
    config_flags.DEFINE_config_dict("config", config, lock_config=True, flag_values=options, sys_argv=words)
    flags.DEFINE_string("workdir", None, "folder of the run", flag_values=options)
    flags.DEFINE_bool("dry-run", False, "say what would run, and what it takes", flag_values=options)
    flags.DEFINE_bool("traceback", False, "show where an error came from", flag_values=options)
    for name, what in FLAGS.items():
        flags.DEFINE_string(name, None, what, flag_values=options)
    try:
        _, *stray = options(words)
    except (flags.Error, TypeError, ValueError) as error:
        raise InputError(f"{str(error).rstrip('.')}. See --help.") from None
    if stray:
        raise InputError(f"{stray[0]!r} is not a flag: options are written --name=value. See --help.")
    return config, options


def _experiment(config: ConfigDict) -> ModuleType:
    name = str(config.get("experiment") or "")
    if not name:
        raise InputError("config.experiment is missing: name a module with run(config, workdir).")
    try:
        module = importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is None or not name.startswith(error.name):
            raise
        if importlib.util.find_spec("experiments") is None:
            raise InputError(
                f"config.experiment={name!r} cannot be imported: run from the root of a checkout."
            ) from None
        files = [*Path("experiments").glob("[a-z]*.py"), *(p.parent for p in Path("experiments").glob("*/__init__.py"))]
        known = sorted(f"experiments.{path.stem}" for path in files)
        raise unknown("config.experiment", name, known) from None
    if not hasattr(module, "run"):
        raise InputError(f"config.experiment={name!r} has no run(config, workdir).")
    return module


def dry_run(config: ConfigDict) -> int:
    """Print the config and what the experiment says about its cost."""
    experiment = _experiment(config)
    print(json.dumps(to_plain(config), indent=2))
    for name, value in experiment.describe(config).items():
        print(f"{name}: {value:,}")
    return OK


def _earlier(path: Path) -> list[dict[str, Any]]:
    """When, by what command and from which commit this workdir was worked on before."""
    if not path.exists():
        return []
    last = json.loads(path.read_text(encoding="utf-8"))
    return [*last.get("earlier", []), {name: last.get(name) for name in ("started", "command", "commit")}]


@contextmanager
def _shared_workdir(path: str, config: ConfigDict) -> Iterator[Path]:
    """The folder of the run, held by the first process; the others come when it is claimed."""
    plain = to_plain(config)
    if current().is_main:
        with open_workdir(path) as workdir:
            claim(workdir, plain)
            barrier("workdir")
            yield workdir
    else:
        barrier("workdir")
        check_shared(Path(path), plain)
        yield Path(path)


def launch(config: ConfigDict, path: str | None) -> int:
    """Run in a workdir that nobody else uses, and leave its files there."""
    if not path:
        raise InputError("--workdir is missing: name a folder for the run, as in --workdir=runs/quickstart.")
    experiment = _experiment(config)
    if current().count > 1 and not getattr(experiment, "MANY_PROCESSES", False):
        raise InputError(
            f"config.experiment={config.experiment!r} runs in one process, {current().count} were started: start one."
        )
    with _shared_workdir(path, config) as workdir:
        runtime.enable_compilation_cache()
        environment = runtime.environment() | {"earlier": _earlier(workdir / "env.json")}
        if current().is_main:
            write_json(workdir / "env.json", environment)
        try:
            result = experiment.run(config, workdir)
        except InputError:
            if current().is_main:
                release(workdir)
            raise
        if current().is_main:
            _leave_results(config, workdir, result, environment)
        barrier("results")
    return OK if all(check["ok"] for check in result["checks"]) else FAILED


def _leave_results(config: ConfigDict, workdir: Path, result: dict[str, Any], environment: dict[str, Any]) -> None:
    page = result.pop("report", {"title": config.experiment})
    write_json(workdir / "results.json", result | {"config": to_plain(config), "environment": environment})
    from jaxfw.report import write_report

    report = write_report(workdir / "report.html", checks=result["checks"], config=to_plain(config),
                          environment=environment, **page)  # fmt: skip
    for check in result["checks"]:
        print(f"{'ok    ' if check['ok'] else 'FAILED'} {check['name']}: {check['value']} (bound {check['bound']})")
    print(f"report: {os.path.relpath(report)}")


if __name__ == "__main__":
    sys.exit(finish(main(sys.argv)))
