"""Who this process is among several: read from explicit values, our own variables, or what a launcher sets.

| source | variables |
|---|---|
| ours | JAXFW_COORDINATOR=host:port, JAXFW_PROCESSES, JAXFW_PROCESS_ID |
| Open MPI 4 and 5 | OMPI_COMM_WORLD_SIZE, _RANK, _LOCAL_RANK, _LOCAL_SIZE; the coordinator too if all run on one host |
| SLURM | SLURM_STEP_NUM_TASKS, SLURM_STEP_NODELIST, SLURM_PROCID, SLURM_LOCALID |
| Kubernetes | JOB_COMPLETION_INDEX beside our own: an indexed Job does not say how many pods belong together |

jax's own detection is not used. It takes the size of a SLURM *job*, so that a shell inside an allocation waits for
processes that nobody started; it gives a process that has a node to itself one GPU of it; for Open MPI it names the
machine of mpirun (4) or needs mpi4py (5). Nothing here imports jax.
"""

import dataclasses
import re
from collections.abc import Mapping
from pathlib import Path

from jaxfw.core.errors import InputError

# Above the ports that Linux gives to outgoing connections (32768 to 60999).
FIRST_PORT, PORTS = 61440, 4096
# SLURM bound GPUs to tasks: each task sees its own only.
_BOUND = ("SLURM_GPUS_PER_TASK", "SLURM_GPU_BIND", "SLURM_NTASKS_PER_GPU", "SLURM_TRES_BIND", "SLURMD_TRES_BIND")
_UNBOUND = re.compile(r"(.*[,:])?none")  # --gpu-bind=none, which also lifts what --gpus-per-task binds


@dataclasses.dataclass(frozen=True)
class Found:
    """What one source says; None is what it does not say. `siblings`: processes on this host, `local_id` among them."""

    source: str
    coordinator: str | None = None
    processes: int | None = None
    process_id: int | None = None
    local_id: int = 0
    siblings: int = 1
    is_bound: bool = False


@dataclasses.dataclass(frozen=True)
class Processes:
    """Number `index` of `count`; process 0 prints and writes files. `devices`: local GPUs by number, None for all."""

    index: int = 0
    count: int = 1
    coordinator: str = ""
    devices: tuple[int, ...] | None = None
    source: str = ""

    @property
    def is_main(self) -> bool:
        """Whether this is the process that prints and writes."""
        return self.index == 0

    def __str__(self) -> str:
        return f"process {self.index} of {self.count} at {self.coordinator}" if self.count > 1 else "one process"


def resolve(given: Found, environ: Mapping[str, str], *, devices: tuple[int, ...] | None = None) -> Processes:
    """Each value from the first source that says it: `given`, our variables, the launcher's; one process by default.

    Raises:
        InputError: a value that is missing beside others, out of range, or no number.
    """
    sources = [given, _ours(environ), _launcher(environ)]
    coordinator, processes, index = (
        next(((getattr(found, name), found.source) for found in sources if getattr(found, name) is not None), None)
        for name in ("coordinator", "processes", "process_id")
    )
    if not _is_asked(sources):
        if devices is not None:
            raise InputError(
                f"--local-devices={','.join(map(str, devices))} is for one of several processes: alone, set "
                "CUDA_VISIBLE_DEVICES."
            )
        return Processes()
    if processes is None or index is None or coordinator is None:
        raise _missing(sources, coordinator, processes, index)
    (count, said), (number, by) = processes, index
    if not 0 <= number < count:
        raise InputError(
            f"process id {number} ({by}) must be in 0 to {count - 1}: there are {count} processes ({said})."
        )
    host, port = split_address(coordinator[0], "coordinator" if coordinator[1] == given.source else coordinator[1])
    launcher = sources[-1]
    return Processes(number, count, f"{host}:{port}", devices if devices is not None else _share(launcher, environ),
                     launcher.source or by)  # fmt: skip


def split_address(text: str, source: str) -> tuple[str, int]:
    """Host and port; an IPv6 address stands in brackets.

    >>> split_address("node1:61500", "--coordinator")
    ('node1', 61500)

    Raises:
        InputError: no host, or no port from 1 to 65535.
    """
    host, _, port = text.rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 65536 or (":" in host and not host.startswith("[")):
        raise InputError(f"{source}={text!r} must be host:port with a port from 1 to 65535, as in node1:61500.")
    return host, int(port)


def _is_asked(sources: list[Found]) -> bool:
    """Whether several processes are meant. The first to give their number decides; else the user gave something."""
    number = next((i for i, found in enumerate(sources) if found.processes is not None), None)
    if number is None:
        return any(found.coordinator is not None or found.process_id is not None for found in sources[:2])
    count = sources[number].processes
    if count is None or count < 1:
        raise InputError(f"processes={count} ({sources[number].source}) must be at least 1.")
    return count > 1 or any(found.process_id for found in sources[: number + 1])


def _missing(sources: list[Found], coordinator: object, processes: object, index: object) -> InputError:
    said = " and ".join(found.source for found in sources if found.source)
    if coordinator is None and processes and index and sources[-1].source == "Open MPI":
        return InputError(
            "Open MPI does not say on which machine process 0 runs: add --coordinator=host:port (or mpirun -x "
            "JAXFW_COORDINATOR=host:port), the same for all, with the host of rank 0."
        )
    values = {"--coordinator (JAXFW_COORDINATOR)": coordinator, "--processes (JAXFW_PROCESSES)": processes,
              "--process-id (JAXFW_PROCESS_ID)": index}  # fmt: skip
    lacking = " and ".join(name for name, value in values.items() if value is None)
    return InputError(f"several processes are meant ({said}), but {lacking} is missing: give all three.")


def _number(environ: Mapping[str, str], name: str) -> int | None:
    text = environ.get(name)
    if text is None or text == "":
        return None
    if not text.isdecimal():
        raise InputError(f"{name}={text!r} must be a whole number.")
    return int(text)


def _ours(environ: Mapping[str, str]) -> Found:
    found = Found(
        "JAXFW_*", environ.get("JAXFW_COORDINATOR") or None, _number(environ, "JAXFW_PROCESSES"),
        _number(environ, "JAXFW_PROCESS_ID"),
    )  # fmt: skip
    return found if (found.coordinator, found.processes, found.process_id) != (None,) * 3 else Found("")


def _launcher(environ: Mapping[str, str]) -> Found:
    """Open MPI before SLURM: its processes inherit the variables of the SLURM step that carries its daemons."""
    if "OMPI_COMM_WORLD_RANK" in environ:
        return _open_mpi(environ)
    if "SLURM_STEP_NUM_TASKS" in environ and "SLURM_PROCID" in environ:
        return _slurm(environ)
    if "JOB_COMPLETION_INDEX" in environ and "KUBERNETES_SERVICE_HOST" in environ:
        return Found("Kubernetes", process_id=_number(environ, "JOB_COMPLETION_INDEX"))
    return Found("")


def _open_mpi(environ: Mapping[str, str]) -> Found:
    size, siblings = (_number(environ, f"OMPI_COMM_WORLD_{name}") or 1 for name in ("SIZE", "LOCAL_SIZE"))
    job = environ.get("PMIX_NAMESPACE") or environ.get("OMPI_MCA_ess_base_jobid") or ""
    port = FIRST_PORT + sum(map(ord, job)) % PORTS
    return Found(
        "Open MPI", f"localhost:{port}" if size == siblings else None, size, _number(environ, "OMPI_COMM_WORLD_RANK"),
        _number(environ, "OMPI_COMM_WORLD_LOCAL_RANK") or 0, siblings,
    )  # fmt: skip


def _slurm(environ: Mapping[str, str]) -> Found:
    """The step's own size, never SLURM_NTASKS: in a shell inside an allocation that is the job's."""
    nodes = environ.get("SLURM_STEP_NODELIST", "")
    job, step = (_number(environ, f"SLURM_{name}_ID") or 0 for name in ("JOB", "STEP"))
    siblings = tasks_per_node(environ.get("SLURM_STEP_TASKS_PER_NODE", "1"))
    node = min(_number(environ, "SLURM_NODEID") or 0, len(siblings) - 1)
    return Found(
        "SLURM", f"{first_host(nodes)}:{FIRST_PORT + (job * 7 + step) % PORTS}" if nodes else None,
        _number(environ, "SLURM_STEP_NUM_TASKS"), _number(environ, "SLURM_PROCID"),
        _number(environ, "SLURM_LOCALID") or 0, siblings[node], _is_bound(environ),
    )  # fmt: skip


def _is_bound(environ: Mapping[str, str]) -> bool:
    given = [environ[name] for name in _BOUND if environ.get(name)]
    return bool(given) and not any(_UNBOUND.fullmatch(text) for text in given)


def first_host(nodes: str) -> str:
    """The first host of a SLURM node list.

    >>> [first_host(nodes) for nodes in ("node7,node9", "gpu[003-008,011],cpu1", "rack[1-4]n[01-16]")]
    ['node7', 'gpu003', 'rack1n01']
    """
    first = re.match(r"(?:[^,\[]|\[[^\]]*\])*", nodes)
    assert first
    return re.sub(r"\[([^\],-]+)[^\]]*\]", r"\1", first.group())


def tasks_per_node(text: str) -> list[int]:
    """SLURM's short form, one number a node.

    >>> tasks_per_node("4(x2),1")
    [4, 4, 1]
    """
    pieces = re.findall(r"(\d+)(?:\(x(\d+)\))?", text)
    return [int(tasks) for tasks, times in pieces for _ in range(int(times or 1))] or [1]


def _share(launcher: Found, environ: Mapping[str, str]) -> tuple[int, ...] | None:
    """One process's part of the GPUs that all processes of its host see; None takes all that it sees."""
    if environ.get("JAX_LOCAL_DEVICE_IDS") or launcher.siblings == 1 or launcher.is_bound:
        return None
    seen = _visible_gpus(environ)
    if seen < launcher.siblings:  # none, or each process sees its own
        return None
    each, rest = divmod(seen, launcher.siblings)
    if rest:
        raise InputError(
            f"{launcher.siblings} processes on this host see {seen} GPUs, which do not divide among them: start as "
            "many as divide, or bind GPUs to processes (srun --gpus-per-task), or give --local-devices."
        )
    return tuple(range(launcher.local_id * each, (launcher.local_id + 1) * each))


def _visible_gpus(environ: Mapping[str, str]) -> int:
    named = environ.get("CUDA_VISIBLE_DEVICES")
    if named is not None:
        return len([name for name in named.split(",") if name.strip() not in ("", "-1", "NoDevFiles")])
    listed = Path("/proc/driver/nvidia/gpus")
    return len(list(listed.iterdir())) if listed.is_dir() else 0
