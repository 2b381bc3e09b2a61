"""A program for processes that run together: each case writes what this process found to `OUT/INDEX.npz` or prints it.

Run by tests/test_distributed.py and tests/test_two_processes.py, several at a time: `two_processes.py CASE [OUT]`.
"""

import dataclasses
import json
import os
import signal
import sys
import time
from pathlib import Path

if __name__ == "__main__":  # whatever imports this (doctests, other tests) keeps its own devices
    os.environ["JAX_PLATFORMS"] = "cpu"

from jaxfw.core.distributed import barrier, current, finish, join, join_by_flags

HEARTBEAT = 5


def joined(*words):
    """Who this process is, by flags or the environment, and what jax makes of it."""
    processes = join_by_flags(dict(word.removeprefix("--").split("=") for word in words))
    assert join() is processes is current()
    import jax

    barrier("before")
    barrier("before")
    found = dataclasses.asdict(processes) | {
        "jax": [jax.process_index(), jax.process_count(), jax.device_count(), jax.local_device_count()],
        "collectives": jax.config.jax_cpu_collectives_implementation,
    }
    sys.stdout.write(json.dumps(found) + "\n")  # at once: print lets the other process come between line and end


def late():
    """Process 1 misses a barrier, and is there for the next."""
    processes = join(heartbeat=HEARTBEAT)
    if processes.is_main:
        try:
            barrier("missed", timeout=0.5)
        except RuntimeError as error:
            print(json.dumps({"said": str(error)}))
    else:
        time.sleep(1.5)
    barrier("met")


def killed():
    """Process 1 dies without a word, process 0 is in the middle of sums over both."""
    processes = join(heartbeat=HEARTBEAT)
    total = _sum_over_all()
    total()
    if not processes.is_main:
        os.kill(os.getpid(), signal.SIGKILL)
    while True:
        total()


def told():
    """SIGTERM comes to process 1 only, in the middle of sums over both: which step each ends with."""
    processes = join(heartbeat=HEARTBEAT)
    from jaxfw.core.preemption import Preemption

    total, step = _sum_over_all(), 0
    with Preemption() as preemption:
        while step == 0 or not preemption.stops_at(step):
            step += 1
            total()
            if step == 20 and not processes.is_main:
                os.kill(os.getpid(), signal.SIGTERM)
    barrier("stopped")
    print(json.dumps({"stopped": step}))


def loses():
    """Process 1 dies, process 0 says who is gone."""
    processes = join(heartbeat=30)
    from jaxfw.core.lost import lost, say_host

    say_host()
    total = _sum_over_all()
    total()
    if not processes.is_main:
        os.kill(os.getpid(), signal.SIGKILL)
    try:
        while True:
            total()
    except Exception as error:
        sys.stderr.write(f"lost: {lost(error)}; of a ValueError: {lost(ValueError('of this process'))}\n")
        sys.exit(finish(1))


def raises():
    """Process 1 fails, process 0 waits for it."""
    processes = join(heartbeat=HEARTBEAT)
    _sum_over_all()()
    if not processes.is_main:
        raise ValueError("a fault of process 1")
    barrier("never")


def _sum_over_all():
    import jax
    import numpy as np
    from jax.sharding import NamedSharding, PartitionSpec

    from jaxfw.core.mesh import make_mesh

    mesh = make_mesh(data=jax.device_count())
    rows = jax.make_array_from_callback(
        (mesh.size,), NamedSharding(mesh, PartitionSpec("data")), lambda index: np.ones(mesh.size, np.float32)[index]
    )
    add = jax.jit(lambda x: x.sum(), out_shardings=NamedSharding(mesh, PartitionSpec()))
    return lambda: float(add(rows))


def parity(out):
    """The meshes of tests/mesh_processes.py over all processes."""
    processes = join(heartbeat=HEARTBEAT)
    import numpy as np

    from tests.mesh_processes import MESHES, on_mesh

    found = {f"{name}/{key}": value for name in MESHES for key, value in on_mesh(name, Path(out)).items()}
    np.savez(Path(out) / f"{processes.index}.npz", **found)


if __name__ == "__main__":
    {case.__name__: case for case in (joined, late, killed, told, loses, raises, parity)}[sys.argv[1]](*sys.argv[2:])
