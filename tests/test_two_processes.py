"""Real processes on this machine, joined over TCP with gloo: they equal one process, and end when one of them dies."""

import json
import re

import numpy as np
import pytest

from tests.mesh_processes import MESHES, on_one
from tests.processes import PROGRAM, environment, free_port, run_together

COUNT = 2


def ours(index, port, **options):
    values = {"COORDINATOR": f"localhost:{port}", "PROCESSES": f"{COUNT}", "PROCESS_ID": f"{index}"}
    return environment(**options, **{f"JAXFW_{name}": value for name, value in values.items()})


def start(case, environments, *words, **options):
    return run_together(*(([str(PROGRAM), case, *map(str, words)], env) for env in environments), **options)


@pytest.mark.slow
def test_two_processes_join_by_flags():
    address = f"localhost:{free_port()}"
    flags = [(f"--coordinator={address}", "--processes=2", f"--process-id={index}") for index in range(COUNT)]
    ended = run_together(*(([str(PROGRAM), "joined", *words], environment()) for words in flags))
    assert [one.code for one in ended] == [0, 0], [one.err[-2000:] for one in ended]
    for index, one in enumerate(ended):
        found = json.loads(one.out.splitlines()[-1])
        assert (found["index"], found["count"], found["coordinator"]) == (index, COUNT, address)
        assert found["jax"] == [index, COUNT, 2, 1] and found["collectives"] == "gloo"


@pytest.fixture(scope="module")
def together(tmp_path_factory):
    """What both processes of two devices each found."""
    out, port = tmp_path_factory.mktemp("parity"), free_port()
    ended = start("parity", [ours(index, port, devices=2) for index in range(COUNT)], out, timeout=120)
    assert [one.code for one in ended] == [0, 0], [one.err[-2000:] for one in ended]
    return [dict(np.load(out / f"{index}.npz")) for index in range(COUNT)]


@pytest.mark.slow
def test_two_processes_equal_one(together):
    """Logits, losses and gradient norms of two accumulated batches, parameters and their average behind the clipped
    update; both processes hold the same answers."""
    alone = on_one()
    for name in MESHES:
        for key, expected in alone.items():
            first, second = (found[f"{name}/{key}"] for found in together)
            assert np.array_equal(first, second), key
            assert np.abs(first - expected).max() <= 1e-5 * np.abs(expected).max(), (name, key)
    assert len(together[0]) == len(MESHES) * len(alone) and len(alone) > 24


@pytest.mark.slow
def test_a_barrier_names_who_is_late():
    port = free_port()
    main, other = start("late", [ours(index, port) for index in range(COUNT)])
    assert (main.code, other.code) == (0, 0), main.err + other.err
    assert json.loads(main.out)["said"] == "barrier 'missed': waited 0.5 s for process 1."


@pytest.mark.slow
def test_sigterm_at_one_process_stops_both_at_one_step():
    port = free_port()
    ended = start("told", [ours(index, port) for index in range(COUNT)])
    assert [one.code for one in ended] == [0, 0], [one.err[-2000:] for one in ended]
    steps = [json.loads(one.out.splitlines()[-1])["stopped"] for one in ended]
    assert steps[0] == steps[1] >= 20


@pytest.mark.slow
def test_the_process_that_is_left_says_who_is_gone():
    port = free_port()
    main, _ = start("loses", [ours(index, port) for index in range(COUNT)], timeout=60)
    assert main.code != 0 and main.seconds < 60
    assert re.search(r"lost: process 1 on \S+; of a ValueError: None", main.err), main.err


def test_a_killed_process_ends_the_other():
    port = free_port()
    main, other = start("killed", [ours(index, port) for index in range(COUNT)], timeout=40)
    assert other.code == -9 and main.code not in (0, -9)
    assert "process 0 of 2 at localhost" in main.err
    assert re.search(r"Connection (closed|reset) by peer", main.err), "whichever the network says first"
    assert main.seconds < 20


@pytest.mark.slow
def test_a_failing_process_says_why_and_ends_the_other():
    port = free_port()
    main, other = start("raises", [ours(index, port) for index in range(COUNT)], timeout=40)
    assert other.code == 1 and "process 1 of 2 at localhost" in other.err and "a fault of process 1" in other.err
    assert main.code not in (0, -9) and "another task died" in main.err
    assert main.seconds < 20
