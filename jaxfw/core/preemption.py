"""SIGTERM, as a request to stop at a step: what schedulers send before they take a machine away."""

import signal
import threading
import time
from types import FrameType, TracebackType
from typing import Any

from jaxfw.core.distributed import JOIN_SECONDS, current

POLL_SECONDS = 1.0
NOTICE = "jaxfw/preempted/"


class Preemption:
    """While the context lasts, SIGTERM does not end the process: `stops_at(step)` says when to save and leave.

    Of several processes, one that was told is enough: all stop at the same step. Every process must then ask at every
    step, with the same numbers.
    """

    def __init__(self) -> None:
        self._told = False
        self._last: int | None = None
        self._polled = 0.0
        self._before: Any = None
        self._catches = False

    def stops_at(self, step: int) -> bool:
        """Whether the run ends with this step, which every process answers alike."""
        if current().count == 1:
            return self._told
        if self._last is None and self._is_known():
            self._last = _agree(step)
        return self._last is not None and step >= self._last

    def _is_known(self) -> bool:
        """Whether any process was told: asked of the coordinator, once in a while."""
        client = _client()
        if self._told:
            client.key_value_set(f"{NOTICE}told", "yes", allow_overwrite=True)
            return True
        if time.monotonic() - self._polled < POLL_SECONDS:
            return False
        self._polled = time.monotonic()
        return any(key.endswith("told") for key, _ in client.key_value_dir_get(NOTICE))

    def _tell(self, number: int, frame: FrameType | None) -> None:
        self._told = True

    def __enter__(self) -> "Preemption":
        self._catches = threading.current_thread() is threading.main_thread()
        if self._catches:
            self._before = signal.signal(signal.SIGTERM, self._tell)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._catches:
            signal.signal(signal.SIGTERM, self._before or signal.SIG_DFL)


def _agree(step: int) -> int:
    """The furthest step that any process is at: nobody has begun a later one, as all wait here for each other."""
    client, processes = _client(), current()
    client.key_value_set(f"{NOTICE}at/{processes.index}", str(step))
    wait = int(JOIN_SECONDS * 1000)
    return max(int(client.blocking_key_value_get(f"{NOTICE}at/{i}", wait)) for i in range(processes.count))


def _client() -> Any:
    from jax._src.distributed import global_state  # jax has no public key-value store

    return global_state.client
