"""A workdir: the plain files of one run, owned by one process at a time.

`config.json env.json metrics.jsonl tb/ checkpoints/ results.json report.html`, and whatever else an experiment leaves.
"""

import fcntl
import json
import math
import os
import platform
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from jaxfw.core.config import changed_fields
from jaxfw.core.errors import InputError


@contextmanager
def open_workdir(path: str | Path) -> Iterator[Path]:
    """The folder, made where it is missing and locked while the context lasts.

    The lock is the operating system's: it goes with the process, however that ends.

    Raises:
        InputError: another process holds it, or the path cannot be a folder.
    """
    folder = Path(path)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = (folder / ".lock").open("a+", encoding="utf-8")
    except OSError as error:
        reason = "it is a file" if folder.is_file() else error.strerror
        raise InputError(f"--workdir={folder} cannot be written ({reason}): give another folder.") from None
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            lock.seek(0)
            owner = lock.read().strip() or "another process"
            raise InputError(
                f"--workdir={folder} is in use by {owner}: wait until it ends, or give another --workdir."
            ) from None
        lock.truncate(0)
        lock.write(f"process {os.getpid()} on {platform.node()}\n")
        lock.flush()
        yield folder


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file in one step: a reader sees the old one or the new one. Numbers that JSON lacks become null."""
    replace_text(path, json.dumps(_finite(value), indent=2, allow_nan=False) + "\n")


def replace_text(path: Path, text: str) -> None:
    """Write a text file in one step: whoever reads or is killed meanwhile leaves the old one or the new one."""
    beside = path.with_name(f".{path.name}.tmp")
    beside.write_text(text, encoding="utf-8")
    os.replace(beside, path)


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _finite(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def release(folder: Path) -> None:
    """Give up a claim behind which nothing was made, so that another configuration may have the folder."""
    if {path.name for path in folder.iterdir()} <= {".lock", "config.json", "env.json"}:
        for name in ("env.json", "config.json"):
            (folder / name).unlink(missing_ok=True)


def check_shared(folder: Path, config: Mapping[str, Any]) -> None:
    """What the first process claimed, as another of the run sees it.

    Raises:
        InputError: the folder is not the same one here, or this process was given another configuration.
    """
    path = folder / "config.json"
    if not path.is_file():
        raise InputError(
            f"--workdir={folder} is not the folder that the first process writes to: give one on a file system that "
            "all machines share."
        )
    claim(folder, config)


def claim(folder: Path, config: Mapping[str, Any]) -> None:
    """Write `config.json` into an empty folder, or check that the run in it has the same configuration.

    Raises:
        InputError: another configuration, with the fields that differ; a folder of something else; damaged JSON.
    """
    path = folder / "config.json"
    if not path.exists():
        others = sorted(other.name for other in folder.iterdir() if other.name != ".lock")
        if others:
            raise InputError(
                f"--workdir={folder} is not empty and holds no run ({', '.join(others[:4])}): give a new folder."
            )
        write_json(path, config)
        return
    try:
        held = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"{path} is not valid JSON ({error}): give another --workdir.") from None
    changes = changed_fields(held, json.loads(json.dumps(config)))
    if changes:
        more = f" and {len(changes) - 4} more" if len(changes) > 4 else ""
        raise InputError(
            f"--workdir={folder} holds a run with another configuration ({'; '.join(changes[:4])}{more}): "
            "give another --workdir, or remove that folder."
        )
