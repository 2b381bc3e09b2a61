"""Several processes as one program: joining them, ending together, waiting for each other.

    processes = join()              # before anything touches a device
    mesh = make_mesh(tensor=8)      # all devices of all processes

Every process runs the same program on the same values: what one compiles or sends, all do, in the same order. Process 0
prints and writes files. `join` joins only where several processes were started: by the values that it is given, by
JAXFW_COORDINATOR, JAXFW_PROCESSES and JAXFW_PROCESS_ID, by srun, mpirun or Kubernetes (`jaxfw.core.launchers`).
"""

import os
import re
import signal
import socket
import sys
import threading
import time
from collections.abc import Mapping
from types import TracebackType
from typing import Any

from jaxfw.core.errors import InputError, RunError
from jaxfw.core.launchers import Found, Processes, resolve, split_address
from jaxfw.core.roll_call import call_roll

# Flags of every door, by name; `join_by_flags` takes their values.
FLAGS = {
    "coordinator": "host:port where process 0 of several listens, the same for all",
    "processes": "how many processes run this program together (1: alone, whatever a launcher says)",
    "process-id": "which of them this is, from 0",
    "local-devices": "the GPUs of this machine that this process takes, as in 0,1",
}
JOIN_SECONDS = 300.0
HEARTBEAT_SECONDS = 40.0
GRACE = 1.0  # seconds that a failing process 0 leaves the others to say what happened to them

_joined: Processes | None = None


def join(
    *,
    coordinator: str | None = None,
    processes: int | None = None,
    process_id: int | None = None,
    local_devices: tuple[int, ...] | None = None,
    timeout: float = JOIN_SECONDS,
    heartbeat: float = HEARTBEAT_SECONDS,
) -> Processes:
    """Join the processes that were started together, and say which one this is; alone, nothing happens.

    Called again, with the same values or with none, it says the same. Behind it, a process that ends by an uncaught
    exception ends at once (see `finish`), so that the others do not wait for it.

    Args:
        coordinator: "host:port" of process 0, reachable from all.
        processes: how many there are; 1 runs alone, whatever a launcher says.
        process_id: which one this is, from 0.
        local_devices: GPUs of this machine, by number; None takes all that this process sees, or its share where a
            launcher put several on one machine without binding GPUs to them.
        timeout: seconds to wait for all to come.
        heartbeat: seconds of silence after which a process counts as dead and the others are ended.

    Raises:
        InputError: values that are missing, out of range or not those of an earlier call; a device was touched before.
        RunError: not all came in time, or they do not fit together; the message says who came.
    """
    global _joined
    given = Found("arguments", coordinator, processes, process_id)
    is_given = any(value is not None for value in (coordinator, processes, process_id, local_devices))
    if _joined is not None and not is_given:
        return _joined
    found = resolve(given if is_given else Found(""), os.environ, devices=local_devices)
    if _joined is not None:
        return _check_same(_joined, found)
    if found.count > 1:
        _check_untouched()
        versions = {"jax": _jax_version()}
        card = {"index": found.index, "count": found.count, "host": socket.gethostname()} | versions
        call_roll(split_address(found.coordinator, "coordinator"), card, timeout=timeout)
        _start_jax(found, timeout, heartbeat)
        sys.excepthook = _end_on_exception
    _joined = found
    return found


def join_by_flags(values: Mapping[str, str | None]) -> Processes:
    """`join` with the texts of `FLAGS`, by name.

    Raises:
        InputError: a text that is no whole number; else as `join`.
    """
    return join(
        coordinator=values.get("coordinator"),
        processes=_whole("processes", values.get("processes")),
        process_id=_whole("process-id", values.get("process-id")),
        local_devices=_whole_each("local-devices", values.get("local-devices")),
    )


def current() -> Processes:
    """What `join` said; one process before it, and without it."""
    return _joined or Processes()


def coordinator_client() -> Any:
    """What talks to the coordinator: barriers that do not run on devices, keys and values. jax has no public one."""
    from jax._src.distributed import global_state

    assert global_state.client is not None
    return global_state.client


def barrier(name: str, *, timeout: float = JOIN_SECONDS) -> None:
    """Wait until every process is here: behind what one of them does alone, such as writing a file that all read.

    Raises:
        RunError: not all came within `timeout` seconds.
    """
    if current().count == 1:
        return
    from jax.errors import JaxRuntimeError

    try:
        coordinator_client().wait_at_barrier(name, int(timeout * 1000))
    except JaxRuntimeError as error:
        late = re.search(r"timed out task names:\s*([\d\s]+)", str(error))
        if late is None:
            raise RunError(f"barrier {name!r} failed: {str(error).split(' [type.')[0]}") from None
        raise RunError(f"barrier {name!r}: waited {timeout:g} s for process {', '.join(late[1].split())}.") from None


def finish(code: int) -> int:
    """The exit code of a door, `sys.exit(finish(main(sys.argv)))`; with others, a failing process does not come back.

    jax lets a process end only when all do. One that failed leaves at once instead: its connections close, and the
    others fail where they wait for it, or when its heartbeat has been missing for a while.
    """
    if code and current().count > 1:
        _leave(code)
    return code


def _leave(code: int) -> None:
    if current().is_main:  # its end takes the others down in the middle of what they say
        time.sleep(GRACE)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _end_on_exception(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    print(f"{current()} failed:", file=sys.stderr)
    sys.__excepthook__(kind, error, trace)
    _leave(130 if issubclass(kind, KeyboardInterrupt) else 1)


def _start_jax(found: Processes, timeout: float, heartbeat: float) -> None:
    """Start jax's service and client, and leave SIGTERM as it was: jax catches it and goes on as if nothing were."""
    import jax

    is_main_thread = threading.current_thread() is threading.main_thread()
    before = signal.getsignal(signal.SIGTERM)
    jax.distributed.initialize(
        found.coordinator,
        found.count,
        found.index,
        local_device_ids=found.devices,
        cluster_detection_method="deactivate",
        initialization_timeout=int(timeout),
        heartbeat_timeout_seconds=int(heartbeat),
    )
    if is_main_thread and before is not None:
        signal.signal(signal.SIGTERM, before)


def _check_untouched() -> None:
    import jax
    from jax._src.xla_bridge import backends_are_initialized  # public only as an error of jax.distributed.initialize

    if jax.distributed.is_initialized():
        raise InputError("jax.distributed.initialize() was called before join(): leave it out.")
    if backends_are_initialized():
        raise InputError(
            "join() comes too late, a device was already used: call it before any array is made and before "
            "jax.devices(), at the start of the program."
        )


def _check_same(before: Processes, now: Processes) -> Processes:
    if (now.index, now.count, now.coordinator) != (before.index, before.count, before.coordinator):
        raise InputError(f"join() was called before with other values ({before}, now {now}): join once.")
    return before


def _jax_version() -> str:
    import jax

    return jax.__version__


def _whole(name: str, text: str | None) -> int | None:
    if text is None:
        return None
    if not text.strip().isdecimal():
        raise InputError(f"--{name}={text!r} must be a whole number.")
    return int(text)


def _whole_each(name: str, text: str | None) -> tuple[int, ...] | None:
    if text is None:
        return None
    numbers = text.split(",")
    if not all(number.strip().isdecimal() for number in numbers):
        raise InputError(f"--{name}={text!r} must be whole numbers, as in 0,1.")
    return tuple(map(int, numbers))
