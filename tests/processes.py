"""Programs started together on this machine, as several processes of one run."""

import os
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]
PROGRAM = Path(__file__).with_name("two_processes.py")
# What would tell a program that it is part of something else.
FOREIGN = ("SLURM", "OMPI", "JAXFW", "JOB_COMPLETION", "XLA_FLAGS", "JAX_PLATFORMS", "JAX_NUM")


class Ended(NamedTuple):
    code: int
    out: str
    err: str
    seconds: float


def free_port() -> int:
    """A port that nobody listens at now."""
    with socket.create_server(("localhost", 0)) as server:
        return server.getsockname()[1]


def environment(*, devices: int = 1, **more: str) -> dict[str, str]:
    """This process's, without what belongs to launchers, with `devices` devices on the CPU."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(FOREIGN)}
    # Compiling is most of what these programs do, and compiles fastest unoptimised.
    flags = f"--xla_force_host_platform_device_count={devices} --xla_backend_optimization_level=0"
    return kept | {"XLA_FLAGS": flags, "PYTHONPATH": str(ROOT)} | more


def run_together(*programs: tuple[list[str], dict[str, str]], timeout: float = 60) -> list[Ended]:
    """Each (arguments to Python, environment) in a process of its own; killed after `timeout` seconds."""
    started = time.monotonic()
    running = [
        subprocess.Popen(
            [sys.executable, *words], env=env, cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )
        for words, env in programs
    ]
    ended = []
    try:
        for process in running:
            out, err = process.communicate(timeout=timeout)
            ended.append(Ended(process.returncode, out, err, time.monotonic() - started))
    finally:
        for process in running:
            process.kill()
    return ended
