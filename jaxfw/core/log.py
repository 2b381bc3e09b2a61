"""What a run says while it runs: metrics to files, notices to the terminal once."""

import json
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

_said: set[str] = set()


def say_once(message: str) -> None:
    """Print a notice to stderr, the first time that it is said in this process: for fallbacks and defaults."""
    if message not in _said:
        _said.add(message)
        print(message, file=sys.stderr, flush=True)


class Metrics:
    """Numbers by step: one JSON object a line in `metrics.jsonl`, and TensorBoard's files under `tb/`.

    With `folder` None nothing is written. `history` holds the rows of this run, those read back on resuming included.
    """

    def __init__(self, folder: Path | None, *, resume_at: int = 0):
        self.history: list[dict[str, Any]] = []
        self._path = folder and folder / "metrics.jsonl"
        self._board: Any = None
        if folder is None or self._path is None:
            return
        if self._path.exists():
            self.history = _rows_until(self._path, resume_at)
            # What an interrupted run wrote beyond its last checkpoint comes again.
            self._path.write_text("".join(json.dumps(row) + "\n" for row in self.history), encoding="utf-8")
        from tensorboardX import SummaryWriter

        self._board = SummaryWriter(str(folder / "tb"), purge_step=resume_at + 1)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Append the values of one step; a reader may follow the file."""
        row = {"step": step, "time": round(time.time(), 3)} | {name: float(value) for name, value in values.items()}
        self.history.append(row)
        if self._path is not None:
            with open(self._path, "a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")
            for name, value in values.items():
                self._board.add_scalar(name, float(value), step)

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
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            continue
        if row["step"] <= step:
            rows.append(row)
    return rows
