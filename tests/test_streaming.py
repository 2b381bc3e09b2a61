"""Loading and saving hold one parameter beside the model, a process its own part only, and a kill leaves no half."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest

from jaxfw.weights import load, save
from tests.processes import environment, free_port, run_together
from tests.streaming_program import TINY, numbers

PROGRAM = str(Path(__file__).with_name("streaming_program.py"))
SLACK = 64 * 2**20


def run(*words):
    """The report of a case in a process of its own."""
    (ended,) = run_together(([PROGRAM, *map(str, words)], environment()), timeout=300)
    assert ended.code == 0, ended.err[-2000:]
    return json.loads(ended.out) if ended.out else None


def same_files(ours, theirs):
    names = sorted(path.name for path in theirs.iterdir())
    return sorted(path.name for path in ours.iterdir()) == names and all(
        (ours / name).read_bytes() == (theirs / name).read_bytes() for name in names
    )


@pytest.mark.slow
@pytest.mark.parametrize("dtype, shard_bytes", [("float32", 5 * 10**9), ("bfloat16", 4 * 10**8)])
def test_a_model_of_a_gigabyte_is_held_once(tmp_path, dtype, shard_bytes):
    run("make", tmp_path / "model", dtype, shard_bytes)
    found = run("load_and_save", tmp_path / "model", tmp_path)
    assert len(list((tmp_path / "model").glob("*.safetensors"))) == (1 if dtype == "float32" else 3)
    assert found["bytes"] > 2**30
    print(found)
    assert found["load"] <= 2 * found["largest"] + SLACK
    assert found["save"] <= 2 * found["largest"] + SLACK


@pytest.mark.slow
def test_quantising_holds_no_more(tmp_path):
    run("make", tmp_path / "model", "bfloat16", 4 * 10**8)
    found = run("load_and_save", tmp_path / "model", tmp_path, "int4")
    print(found)
    assert found["load"] <= 2 * found["largest"] + SLACK


def test_two_processes_read_a_half_each_and_save_one_directory(tmp_path):
    params = numbers(TINY)
    directory, port = save(tmp_path / "model", TINY, params), free_port()
    (tmp_path / "b").mkdir()
    programs = [([PROGRAM, "together", str(port), str(i), str(directory), str(tmp_path)], environment()) for i in (0, 1)]
    ended = run_together(*programs, timeout=120)
    assert [process.code for process in ended] == [0, 0], ended
    for report in (json.loads(process.out.splitlines()[-1]) for process in ended):
        assert report["held"] <= 0.55 * report["bytes"] and report["read"] <= 0.55 * report["bytes"]
        assert len(report["refusals"]) == 2
    first, second = (json.loads(process.out.splitlines()[-1])["refusals"] for process in ended)
    assert "exists and is not empty" in first[0] and "first process" in second[0]
    assert same_files(tmp_path / "again", directory)


@pytest.mark.parametrize("after", [1, 5, -1])
def test_a_kill_leaves_nothing_or_what_was_there(tmp_path, after):
    (tmp_path / "empty").mkdir()
    for directory in (tmp_path / "new", tmp_path / "empty"):
        was_there = directory.exists()
        (ended,) = run_together(([PROGRAM, "killed", str(directory), str(after)], environment()), timeout=120)
        assert ended.code == -signal.SIGKILL
        assert directory.exists() is was_there and not (was_there and any(directory.iterdir()))
        left = list(tmp_path.glob(f".{directory.name}.partial-*"))
        assert len(left) == 1, "what may be removed"
        again = load(save(directory, TINY, numbers(TINY)))
        assert jax.tree.all(jax.tree.map(np.array_equal, again.params, numbers(TINY)))


@pytest.mark.slow
def test_kills_at_any_time(tmp_path):
    """As a machine would: after the directory has its name everything is there, before that nothing."""
    rng, finished, started = random.Random(0), 0, time.monotonic()
    for number in range(12):
        directory = tmp_path / str(number)
        words = [sys.executable, PROGRAM, "make", str(directory), "bfloat16", str(2 * 10**8)]
        process = subprocess.Popen(words, env=environment(), cwd=Path(__file__).parents[1])
        if number:
            try:
                process.wait(rng.uniform(0.3, 1.1) * whole)
            except subprocess.TimeoutExpired:
                os.kill(process.pid, signal.SIGKILL)
        process.wait()
        if number == 0:
            whole = time.monotonic() - started
        if directory.exists():
            finished += 1
            assert load(directory).config.layers == 28
        subprocess.run(["rm", "-rf", *map(str, tmp_path.iterdir())], check=True)
    assert 0 < finished < 12
