"""Who a process is, by every launcher's variables; the roll call; and what is said when it cannot work."""

import os
import socket
import subprocess
import sys
import threading
import time

import jax
import pytest

from jaxfw.core import distributed
from jaxfw.core.distributed import FLAGS, barrier, current, finish, join, join_by_flags
from jaxfw.core.errors import InputError, RunError
from jaxfw.core.launchers import Found, Processes, resolve
from jaxfw.core.roll_call import call_roll
from tests.processes import environment, free_port

NOTHING = Found("")
OURS = {"JAXFW_COORDINATOR": "node1:61500", "JAXFW_PROCESSES": "4", "JAXFW_PROCESS_ID": "3"}
SLURM = {
    "SLURM_JOB_ID": "4097", "SLURM_STEP_ID": "2", "SLURM_STEP_NUM_TASKS": "8", "SLURM_STEP_NODELIST": "gpu[03-04]",
    "SLURM_STEP_TASKS_PER_NODE": "4(x2)", "SLURM_PROCID": "6", "SLURM_LOCALID": "2", "SLURM_NODEID": "1",
    "SLURM_NTASKS": "8",
}  # fmt: skip
MPI = {f"OMPI_COMM_WORLD_{name}": text for name, text in
       {"SIZE": "4", "LOCAL_SIZE": "4", "RANK": "1", "LOCAL_RANK": "1"}.items()}  # fmt: skip
PODS = {"KUBERNETES_SERVICE_HOST": "10.0.0.1", "JOB_COMPLETION_INDEX": "2"}


@pytest.fixture(autouse=True)
def apart(monkeypatch):
    """Neither the launcher of these tests nor an earlier join is seen."""
    for name in set(os.environ) - set(environment()):
        monkeypatch.delenv(name)
    monkeypatch.setattr(distributed, "_joined", None)


def found(environ, given=NOTHING):
    processes = resolve(given, environ)
    return processes.index, processes.count, processes.coordinator


# --- launchers


def test_our_variables_say_all():
    assert found(OURS) == (3, 4, "node1:61500")


def test_slurm_says_all_and_steps_of_a_job_have_ports_of_their_own():
    assert found(SLURM) == (6, 8, f"gpu03:{61440 + (4097 * 7 + 2) % 4096}")
    assert resolve(NOTHING, SLURM | {"SLURM_STEP_ID": "3"}).coordinator != resolve(NOTHING, SLURM).coordinator


def test_mpirun_on_one_host_says_all():
    index, count, coordinator = found(MPI)
    assert (index, count) == (1, 4) and coordinator.startswith("localhost:6")


def test_kubernetes_says_which_and_we_say_of_how_many():
    more = {"JAXFW_COORDINATOR": "workers-0.run:61500", "JAXFW_PROCESSES": "3"}
    assert found(PODS | more) == (2, 3, "workers-0.run:61500")


def test_arguments_come_before_our_variables_and_these_before_a_launcher():
    given = Found("arguments", coordinator="other:1", process_id=0)
    assert found(SLURM | OURS, given) == (0, 4, "other:1")
    assert found(SLURM | {"JAXFW_COORDINATOR": "fast-net:7"}) == (6, 8, "fast-net:7")


def test_mpirun_inside_a_slurm_step_counts_as_mpirun():
    assert found(MPI | SLURM)[:2] == (1, 4)


ALONE = {
    "nothing": {},
    "a shell in an allocation of 8": SLURM | {"SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0"},
    "a batch script": {"SLURM_JOB_ID": "7", "SLURM_NTASKS": "8", "SLURM_PROCID": "0", "SLURM_LOCALID": "0"},
    "switched off": SLURM | {"JAXFW_PROCESSES": "1"},
    "an indexed Job of separate pods": PODS,
    "mpirun -n 1": MPI | {"OMPI_COMM_WORLD_SIZE": "1", "OMPI_COMM_WORLD_RANK": "0"},
}


@pytest.mark.parametrize("name", ALONE)
def test_nothing_joins_by_surprise(name):
    assert resolve(NOTHING, ALONE[name]) == Processes()


def test_one_process_by_flag_is_alone_whatever_a_launcher_says(monkeypatch):
    for name, text in SLURM.items():
        monkeypatch.setenv(name, text)
    assert join_by_flags({"processes": "1"}) == Processes() == current() == join()


GPUS = {
    "four tasks see four": ({"CUDA_VISIBLE_DEVICES": "0,1,2,3"}, (2,)),
    "four tasks see eight": ({"CUDA_VISIBLE_DEVICES": "0,1,2,3,4,5,6,7"}, (4, 5)),
    "each task sees its own": ({"CUDA_VISIBLE_DEVICES": "2"}, None),
    "bound by srun": ({"CUDA_VISIBLE_DEVICES": "0,1,2,3", "SLURM_GPUS_PER_TASK": "4"}, None),
    "explicitly not bound": ({"CUDA_VISIBLE_DEVICES": "0,1,2,3", "SLURM_GPU_BIND": "verbose,none"}, (2,)),
    "not bound, with its share": (
        {"CUDA_VISIBLE_DEVICES": "0,1,2,3", "SLURM_TRES_BIND": "gres/gpu:none", "SLURM_GPUS_PER_TASK": "1"},
        (2,),
    ),
    "bound one by one": ({"CUDA_VISIBLE_DEVICES": "0,1,2,3", "SLURM_TRES_BIND": "gres/gpu:single:1"}, None),
    "one task a node": ({"CUDA_VISIBLE_DEVICES": "0,1", "SLURM_STEP_TASKS_PER_NODE": "1(x8)"}, None),
    "named for jax": ({"CUDA_VISIBLE_DEVICES": "0,1,2,3", "JAX_LOCAL_DEVICE_IDS": "0"}, None),
    "none": ({"CUDA_VISIBLE_DEVICES": ""}, None),
}


@pytest.mark.parametrize("name", GPUS)
def test_gpus_of_a_process(name):
    more, expected = GPUS[name]
    assert resolve(NOTHING, SLURM | more).devices == expected


WRONG = {
    "process id 4 (JAXFW_*) must be in 0 to 3: there are 4 processes (JAXFW_*).": OURS | {"JAXFW_PROCESS_ID": "4"},
    "JAXFW_*='node1' must be host:port with a port from 1 to 65535": OURS | {"JAXFW_COORDINATOR": "node1"},
    "JAXFW_*='node1:99999' must be host:port": OURS | {"JAXFW_COORDINATOR": "node1:99999"},
    "JAXFW_*='fe80::1:61500' must be host:port": OURS | {"JAXFW_COORDINATOR": "fe80::1:61500"},
    "(JAXFW_*), but --process-id (JAXFW_PROCESS_ID) is missing": {**OURS, "JAXFW_PROCESS_ID": ""},
    "but --coordinator (JAXFW_COORDINATOR) and --processes (JAXFW_PROCESSES) is missing": {"JAXFW_PROCESS_ID": "0"},
    "JAXFW_PROCESSES='two' must be a whole number.": OURS | {"JAXFW_PROCESSES": "two"},
    "processes=0 (JAXFW_*) must be at least 1.": OURS | {"JAXFW_PROCESSES": "0"},
    "Open MPI does not say on which machine process 0 runs: add --coordinator": MPI
    | {"OMPI_COMM_WORLD_LOCAL_SIZE": "2"},
    "4 processes on this host see 6 GPUs": SLURM | {"CUDA_VISIBLE_DEVICES": "0,1,2,3,4,5"},
}


@pytest.mark.parametrize("message", WRONG)
def test_wrong_environments(message):
    with pytest.raises(InputError) as caught:
        resolve(NOTHING, WRONG[message])
    assert message in str(caught.value)


@pytest.mark.parametrize(("flag", "text"), [("processes", "two"), ("process-id", "-1"), ("local-devices", "0;1")])
def test_wrong_flags(flag, text):
    with pytest.raises(InputError, match=f"--{flag}='{text}' must be"):
        join_by_flags(dict.fromkeys(FLAGS) | {flag: text})


# --- the roll call


def card(index, count=2, **more):
    return {"index": index, "count": count, "host": f"host{index}", "jax": "1.0"} | more


def roll(*cards, timeout=5.0, port=None):
    """What each process of the roll was told: an error's text, or None."""
    address, said = ("localhost", port or free_port()), [None] * len(cards)

    def run(i):
        try:
            call_roll(address, cards[i], timeout=timeout)
        except RunError as error:
            said[i] = str(error)

    threads = [threading.Thread(target=run, args=(i,)) for i in range(len(cards))]
    for thread in reversed(threads):  # the main process last
        thread.start()
    for thread in threads:
        thread.join(30)
    return said


def test_all_come_and_the_port_is_free_at_once():
    port = free_port()
    assert roll(*(card(index, 3) for index in range(3)), port=port) == [None] * 3
    socket.create_server(("localhost", port)).close()


def test_who_is_missing_is_said_to_all_that_came():
    main, other = roll(card(0, 4), card(2, 4), timeout=0.8)
    assert main == other
    assert (
        "2 of 4 processes joined at localhost:" in main
        and "in 0.8 s. Came: 0 (host0), 2 (host2). Missing: 1, 3." in main
    )


DISAGREE = {
    "process 0 on host0 has count=2, process 1 on host1 has count=3": card(1, 3),
    "process 0 on host0 has jax=1.0, process 1 on host1 has jax=1.1": card(1, jax="1.1"),
    "process 0 came twice, from host0 and elsewhere": card(0, host="elsewhere") | {"index": 0},
}


@pytest.mark.parametrize("message", DISAGREE)
def test_disagreement_is_said_to_all(message):
    theirs = DISAGREE[message]
    if theirs["index"] == 0:
        main, other = duplicate(theirs)
    else:
        main, other = roll(card(0), theirs)
    assert message in main and main == other


def duplicate(theirs):
    """A second process 0 on another machine would listen there; here it knocks."""
    from jaxfw.core.roll_call import _answer

    address, said = ("localhost", free_port()), []
    thread = threading.Thread(target=lambda: said.append(message_of(lambda: _answer(address, theirs, 5.0))))
    thread.start()
    main = message_of(lambda: call_roll(address, card(0), timeout=5.0))
    thread.join(10)
    return main, said[0]


def message_of(call):
    with pytest.raises(RunError) as caught:
        call()
    return str(caught.value)


def test_nobody_listens():
    said = message_of(lambda: call_roll(("localhost", free_port()), card(1), timeout=0.5))
    assert "process 1 of 2 did not reach process 0 at localhost:" in said and "in 0.5 s (Connection refused)" in said


def test_no_such_host():
    said = message_of(lambda: call_roll(("no-such-host.invalid", 61500), card(1), timeout=0.5))
    assert "did not reach process 0 at no-such-host.invalid:61500" in said


def test_a_port_in_use():
    with socket.create_server(("", 0)) as server:
        port = server.getsockname()[1]
        said = message_of(lambda: call_roll(("localhost", port), card(0), timeout=0.5))
    assert f"process 0 cannot listen at localhost:{port} (Address already in use)" in said


def test_strangers_at_the_port_do_not_disturb():
    port = free_port()

    def knock():
        for text in (b"GET / HTTP/1.1\r\n\r\n", b"", b'{"index": 1}\n', b"[1]\n"):
            time.sleep(0.05)
            with socket.create_connection(("localhost", port)) as line:
                line.sendall(text)

    threading.Timer(0.2, knock).start()
    started = threading.Timer(0.8, lambda: call_roll(("localhost", port), card(1), timeout=5.0))
    started.start()
    call_roll(("localhost", port), card(0), timeout=10.0)
    started.join()


def test_something_else_at_the_address():
    with socket.create_server(("localhost", 0)) as server:

        def greet():
            while True:
                try:
                    server.accept()[0].sendall(b"SSH-2.0\r\n")
                except OSError:
                    return

        threading.Thread(target=greet, daemon=True).start()
        said = message_of(lambda: call_roll(server.getsockname(), card(1), timeout=0.5))
    assert "something answers there that is no process 0 of this program" in said


# --- join


def test_alone_nothing_happens():
    assert join() == Processes() and current().is_main and not jax.distributed.is_initialized()
    barrier("alone")
    assert finish(1) == 1 and sys.excepthook is sys.__excepthook__


def test_joining_again_with_other_values():
    join()
    with pytest.raises(InputError, match=r"before with other values \(one process, now process 1 of 2 at a:1\)"):
        join(coordinator="a:1", processes=2, process_id=1)


def test_a_device_was_touched_before():
    jax.devices()
    with pytest.raises(InputError, match=r"join\(\) comes too late, a device was already used"):
        join(coordinator="localhost:61500", processes=2, process_id=0)


def test_import_touches_no_device_and_no_network():
    program = (
        "import sys, jaxfw.core.distributed as d; assert 'jax' not in sys.modules; d.join(); "
        "assert 'jax' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", program], check=True, env=environment())
