"""SIGTERM, as a request to stop at a step: what schedulers send before they take a machine away."""

import signal
import threading
from types import FrameType, TracebackType
from typing import Any

from jaxfw.core.distributed import JOIN_SECONDS, coordinator_client, current

POLL_SECONDS = 0.5
NOTICE = "jaxfw/preempted/"
_TOLD, _AT = f"{NOTICE}told", f"{NOTICE}at/"


class Preemption:
    """While the context lasts, SIGTERM does not end the process: `stops_at(step)` says when to save and leave.

    Of several processes, one that was told is enough: all stop at the same step. Every process must then ask behind
    every step, with the same numbers. A thread of each finds out that one was told, says which step its process asked
    about last, and waits for the others to say it; they stop behind the step after the furthest. The main thread may
    meanwhile wait for the other processes in the middle of a step: it is not needed for the agreement.
    """

    def __init__(self) -> None:
        self._told = False
        self._asked = 0
        self._last: int | None = None
        self._agreeing = threading.Lock()
        self._ended = threading.Event()
        self._watch: threading.Thread | None = None
        self._before: Any = None
        self._catches = False

    def stops_at(self, step: int) -> bool:
        """Whether the run ends with this step, which every process answers alike."""
        if current().count == 1:
            return self._told
        with self._agreeing:
            self._asked = step
            return self._last is not None and step >= self._last

    def _tell(self, number: int, frame: FrameType | None) -> None:
        self._told = True

    def _watch_notices(self) -> None:
        client = coordinator_client()
        while not self._ended.wait(POLL_SECONDS):
            if self._told:
                client.key_value_set(_TOLD, "yes", allow_overwrite=True)
            elif not client.key_value_dir_get(NOTICE):
                continue
            with self._agreeing:
                self._last = _furthest(client, self._asked) + 1
            return

    def __enter__(self) -> "Preemption":
        self._catches = threading.current_thread() is threading.main_thread()
        if self._catches:
            self._before = signal.signal(signal.SIGTERM, self._tell)
        if current().count > 1:
            self._watch = threading.Thread(target=self._watch_notices, name="preemption", daemon=True)
            self._watch.start()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._ended.set()
        if self._watch is not None and error is None:
            self._watch.join(timeout=5 * POLL_SECONDS)  # it may wait for those that were done before they were told
        if self._catches:
            signal.signal(signal.SIGTERM, self._before or signal.SIG_DFL)


def _furthest(client: Any, asked: int) -> int:
    """The furthest step that any process has asked about; none asks on before all have said theirs."""
    processes, wait = current(), int(JOIN_SECONDS * 1000)
    client.key_value_set(f"{_AT}{processes.index}", str(asked))
    return max(int(client.blocking_key_value_get(f"{_AT}{i}", wait)) for i in range(processes.count))
