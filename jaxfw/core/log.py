"""What a run says while it runs: metrics to files, notices to the terminal once."""

import json
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jaxfw.core.distributed import current
from jaxfw.core.workdir import replace_text

METRICS, TIMING = "metrics.jsonl", "timing.jsonl"

_said: set[str] = set()


def say_once(message: str) -> None:
    """Print a notice to stderr, the first time that it is said in this process: for fallbacks and defaults."""
    if message not in _said:
        _said.add(message)
        print(message, file=sys.stderr, flush=True)


class Metrics:
    """Numbers by step: one JSON object a line in `metrics.jsonl`, and TensorBoard's files under `tb/`.

    What a clock had a part in (names that begin with `perf/`, and the time of writing) goes to `timing.jsonl`, so that
    a run that was resumed leaves the very bytes of one that was not. With `folder` None, and in all processes but the
    first, nothing is written. `history` holds the rows of this run, those read back on resuming included.
    """

    def __init__(self, folder: Path | None, *, resume_at: int = 0):
        self.history: list[dict[str, Any]] = []
        self._folder: Path | None = folder
        self._board: Any = None
        if folder is None:
            return
        timed = {row["step"]: row for row in _rows_until(folder / TIMING, resume_at)}
        rows = _rows_until(folder / METRICS, resume_at)
        self.history = [timed.get(row["step"], {}) | row for row in rows]
        if not current().is_main:
            self._folder = None
            return
        # What an interrupted run wrote beyond its last checkpoint comes again.
        for name, kept in ((METRICS, rows), (TIMING, list(timed.values()))):
            if (folder / name).exists():
                replace_text(folder / name, "".join(json.dumps(row) + "\n" for row in kept))
        from tensorboardX import SummaryWriter

        self._board = SummaryWriter(str(folder / "tb"), purge_step=resume_at + 1)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Append the values of one step; a reader may follow the files."""
        numbers = {name: float(value) for name, value in values.items()}
        timed = {"step": step, "time": round(time.time(), 3)}
        timed |= {name: value for name, value in numbers.items() if name.startswith("perf/")}
        row = {"step": step} | {name: value for name, value in numbers.items() if name not in timed}
        self.history.append(timed | row)
        if self._folder is not None:
            for name, line in ((METRICS, row), (TIMING, timed)):
                with open(self._folder / name, "a", encoding="utf-8") as file:
                    file.write(json.dumps(line) + "\n")
            for name, value in numbers.items():
                self._board.add_scalar(name, value, step)

    def close(self) -> None:
        """Flush and close TensorBoard's file."""
        if self._board is not None:
            self._board.close()

    def __enter__(self) -> "Metrics":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def _rows_until(path: Path, step: int) -> list[dict[str, Any]]:
    """The complete rows up to a step; a last line that was cut off is left out."""
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            continue
        if row["step"] <= step:
            rows.append(row)
    return rows
