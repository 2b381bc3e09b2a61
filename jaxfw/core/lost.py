"""Who is gone, when a computation of several processes fails: asked through the coordinator, said by name."""

import re
import socket

from jaxfw.core.distributed import coordinator_client, current

ANSWER_SECONDS = 3.0
_BETWEEN_PROCESSES = re.compile(
    r"gloo|nccl|peer|socket|connection|heartbeat|unavailable|deadline_exceeded|coordination|barrier", re.IGNORECASE
)


def say_host() -> None:
    """Let the others know which machine this process is on; once, behind `join`."""
    if current().count > 1:
        coordinator_client().key_value_set(f"jaxfw/host/{current().index}", socket.gethostname())


def lost(error: BaseException) -> str | None:
    """Which processes do not answer any more, if `error` is of a computation between processes; None if it is not.

    Every process that meets the error asks: whoever does not within a few seconds is gone, or stands elsewhere.
    """
    processes = current()
    if processes.count == 1 or not _BETWEEN_PROCESSES.search(f"{type(error).__name__} {error}"):
        return None
    try:
        coordinator_client().key_value_set(f"jaxfw/asks/{processes.index}", "")
    except Exception:  # of jaxlib's own kinds
        return "process 0, the coordinator"
    silent = [i for i in range(processes.count) if i != processes.index and not _answers(i)]
    return ", ".join(f"process {i}{_host(i)}" for i in silent) or None


def _answers(process: int) -> bool:
    try:
        coordinator_client().blocking_key_value_get(f"jaxfw/asks/{process}", int(ANSWER_SECONDS * 1000))
    except Exception:  # no answer, or no coordinator
        return False
    return True


def _host(process: int) -> str:
    try:
        return f" on {coordinator_client().blocking_key_value_get(f'jaxfw/host/{process}', 1000)}"
    except Exception:  # it never said, or the coordinator went too
        return ""
