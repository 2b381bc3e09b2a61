"""Whether others use the same machine: the share of its cores that is busy with anything but this process (Linux)."""

import os
import time
from pathlib import Path

QUIET = 0.05  # of all cores


class Neighbours:
    """Counts from its making on; `share()` is the others' part of all cores since then, None where nobody counts.

    >>> watch = Neighbours()
    >>> share = watch.share()
    >>> share is None or 0 <= share <= 1
    True
    """

    def __init__(self):
        self._start = self._counts()

    def share(self) -> float | None:
        """From 0, nobody else, to 1."""
        if self._start is None:
            return None
        found = self._counts()
        assert found is not None
        busy, own, all_cores = (now - before for now, before in zip(found, self._start))
        return min(max(busy - own, 0.0) / all_cores, 1.0) if all_cores > 0 else 0.0

    @staticmethod
    def _counts() -> tuple[float, float, float] | None:
        """Seconds that all cores were busy, that this process ran, and of all cores in all."""
        file = Path("/proc/stat")
        if not file.exists():
            return None
        user, nice, system, idle, waiting, *rest = (int(x) for x in file.read_text().split("\n")[0].split()[1:9])
        tick, working = os.sysconf("SC_CLK_TCK"), user + nice + system + sum(rest)
        return working / tick, time.process_time(), (working + idle + waiting) / tick


def wait_until_quiet(seconds: float) -> bool:
    """Wait until the others' share is below `QUIET` for three seconds, for `seconds` at most; whether it is."""
    end = time.monotonic() + seconds
    while True:
        watch = Neighbours()
        time.sleep(3)
        share = watch.share()
        if share is None or share < QUIET:
            return True
        if time.monotonic() > end:
            return False
