"""A roll call over TCP before jax joins the processes: who came, who did not, and whether all want the same.

jax's own start ends a process by SIGABRT when others do not come, without saying which; a roll call can say it. Process
0 listens at the coordinator's address, each other process sends one line of JSON and waits for one; when all are there,
or time is up, process 0 answers everyone and frees the port for jax. Nothing here imports jax.
"""

import contextlib
import json
import os
import socket
import time
from collections.abc import Iterator, Mapping
from typing import Any

from jaxfw.core.errors import RunError

LINE = 4096  # bytes of a message at most
RETRY = 0.2  # seconds between two attempts to reach process 0
GRACE = 10.0  # seconds that a process waits for process 0's verdict beyond its own time

Card = Mapping[str, Any]


def call_roll(address: tuple[str, int], card: Card, *, timeout: float) -> None:
    """Return when all `card["count"]` processes have come; `card["index"]` says which one this is.

    Entries of a card other than index and host must be equal in all processes.

    Raises:
        RunError: someone did not come within `timeout` seconds, came twice, or has another card; the port is in use.
    """
    if card["index"] == 0:
        _listen(address, card, timeout)
    else:
        _answer(address, card, timeout)


def _listen(address: tuple[str, int], card: Card, timeout: float) -> None:
    deadline = time.monotonic() + timeout
    with _server(address) as server, contextlib.ExitStack() as stack:
        present, lines = {0: card}, []
        problem: str | None = None
        while len(present) < card["count"] and problem is None:
            line = _accept(server, deadline)
            if line is None:
                problem = _absent(address, present, card["count"], timeout)
                break
            lines.append(stack.enter_context(line))
            theirs = _read(line, min(deadline, time.monotonic() + 5))
            if not _is_card(theirs):  # whoever else knocks at ports
                lines.pop().close()
                continue
            problem = _disagreement(present, theirs)
            present.setdefault(theirs["index"], theirs)
        for line in lines:
            _send(line, {"problem": problem})
        for line in lines:  # they hang up first: the port stays free
            _read(line, time.monotonic() + 1)
    if problem is not None:
        raise RunError(problem)


def _answer(address: tuple[str, int], card: Card, timeout: float) -> None:
    deadline = time.monotonic() + timeout
    trouble = "nobody answers"
    while (left := deadline - time.monotonic()) > 0:
        try:
            with socket.create_connection(_plain(address), timeout=min(left, 5)) as line:
                _send(line, card)
                said = _read(line, deadline + GRACE)
            if "problem" in said:
                if said["problem"] is not None:
                    raise RunError(said["problem"])
                return
            trouble = "something answers there that is no process 0 of this program"
        except OSError as error:
            trouble = str(error.strerror or error)
        time.sleep(RETRY)
    raise RunError(
        f"process {card['index']} of {card['count']} did not reach process 0 at {_say(address)} in {timeout:g} s "
        f"({trouble}): is process 0 running on that machine, is the port open, does its name resolve here?"
    )


def _server(address: tuple[str, int]) -> socket.socket:
    dual = socket.has_dualstack_ipv6()
    try:
        return socket.create_server(
            ("", address[1]), family=socket.AF_INET6 if dual else socket.AF_INET, dualstack_ipv6=dual
        )
    except OSError as error:
        raise RunError(
            f"process 0 cannot listen at {_say(address)} ({os.strerror(error.errno or 0)}): choose another port, or "
            "end what uses it."
        ) from None


def _accept(server: socket.socket, deadline: float) -> socket.socket | None:
    server.settimeout(max(deadline - time.monotonic(), 0.01))
    try:
        return server.accept()[0]
    except TimeoutError:
        return None


def _disagreement(present: Mapping[int, Card], theirs: Card) -> str | None:
    """What is wrong with a card beside process 0's."""
    ours, index = present[0], theirs["index"]
    for name in sorted(set(ours) - {"index", "host"}):
        if theirs.get(name) != ours[name]:
            return (
                f"process 0 on {ours['host']} has {name}={ours[name]}, process {index} on {theirs['host']} has "
                f"{name}={theirs.get(name)}: start all processes alike."
            )
    if index in present:
        return (
            f"process {index} came twice, from {present[index]['host']} and {theirs['host']}: give each process its "
            "own process id, and each run its own port."
        )
    return None


def _absent(address: tuple[str, int], present: Mapping[int, Card], count: int, timeout: float) -> str:
    missing = [index for index in range(count) if index not in present]
    came = ", ".join(f"{index} ({card['host']})" for index, card in sorted(present.items()))
    more = ", ..." if len(missing) > 8 else ""
    return (
        f"{len(present)} of {count} processes joined at {_say(address)} in {timeout:g} s. Came: {came}. "
        f"Missing: {', '.join(map(str, missing[:8]))}{more}. Are they started, and can they reach this address?"
    )


def _send(line: socket.socket, message: Card) -> None:
    with contextlib.suppress(OSError):
        line.sendall(json.dumps(dict(message)).encode() + b"\n")


def _read(line: socket.socket, deadline: float) -> dict[str, Any]:
    """One message; an empty one for whatever is none, and when time is up."""
    try:
        message = json.loads(b"".join(_bytes_until_newline(line, deadline)))
    except (OSError, ValueError):
        return {}
    return message if isinstance(message, dict) else {}


def _is_card(message: Card) -> bool:
    return isinstance(message.get("index"), int) and isinstance(message.get("host"), str)


def _bytes_until_newline(line: socket.socket, deadline: float) -> Iterator[bytes]:
    size = 0
    while size < LINE:
        line.settimeout(max(deadline - time.monotonic(), 0.01))
        piece = line.recv(LINE - size)
        yield piece
        size += len(piece)
        if not piece or piece.endswith(b"\n"):
            return


def _plain(address: tuple[str, int]) -> tuple[str, int]:
    return address[0].strip("[]"), address[1]


def _say(address: tuple[str, int]) -> str:
    return f"{address[0]}:{address[1]}"
