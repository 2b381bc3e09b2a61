"""Loading and saving hold one parameter beside the model, a process its own part only, and a kill leaves no half."""

import functools
import json
import random
import shutil
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

PROGRAM_ROOT = Path(__file__).parents[1]
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


@pytest.fixture(scope="module")
def big(tmp_path_factory):
    """dtype -> a directory of more than 1 GiB: one file of float32, three of bfloat16."""
    folder = tmp_path_factory.mktemp("big")

    @functools.cache
    def made(dtype):
        run("make", folder / dtype, dtype, 5 * 10**9 if dtype == "float32" else 4 * 10**8)
        assert len(list((folder / dtype).glob("*.safetensors"))) == (1 if dtype == "float32" else 3)
        return folder / dtype

    yield made
    shutil.rmtree(folder)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_model_of_a_gigabyte_is_held_once(big, tmp_path, dtype):
    """Beside the parameters and what a tiny model leaves behind: twice the largest, and a little."""
    found = run("load_and_save", big(dtype), tmp_path)
    shutil.rmtree(tmp_path)
    assert found["bytes"] > 2**30
    assert found["load"] <= 2 * found["largest"] + SLACK
    assert found["save"] <= 2 * found["largest"] + SLACK


@pytest.mark.slow
def test_quantising_holds_no_more(big, tmp_path):
    """The largest parameter is the embedding, which stays as it is."""
    found = run("load_and_save", big("bfloat16"), tmp_path, "int4")
    assert found["bytes"] < 0.35 * 2**30
    assert found["load"] <= 2 * found["largest"] + SLACK


def two_processes(directory, folder):
    """The reports of both: each loads onto a mesh of tensor=2, then they save together."""
    port = free_port()
    programs = [[PROGRAM, "together", str(port), str(i), str(directory), str(folder)] for i in (0, 1)]
    ended = run_together(*((words, environment()) for words in programs), timeout=300)
    assert [process.code for process in ended] == [0, 0], ended
    return [json.loads(process.out.splitlines()[-1]) for process in ended]


def test_two_processes_read_a_half_each_and_save_one_directory(tmp_path):
    directory = save(tmp_path / "model", TINY, numbers(TINY), attributes={"eos_token_id": 3})
    first, second = two_processes(directory, tmp_path)
    for report in (first, second):
        assert report["held"] <= 0.55 * report["bytes"] and report["read"] <= 0.55 * report["bytes"]
    assert "exists and is not empty" in first["refusals"][0] and "first process" in second["refusals"][0]
    assert len(first["refusals"]) == len(second["refusals"]) == 2
    assert same_files(tmp_path / "again", directory)


@pytest.mark.slow
def test_two_processes_hold_a_half_each(big, tmp_path):
    for report in two_processes(big("bfloat16"), tmp_path):
        assert report["held"] <= 0.55 * report["bytes"] and report["read"] <= 0.55 * report["bytes"]
        assert report["peak"] <= 0.55 * report["bytes"] + SLACK
    shutil.rmtree(tmp_path)


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


def test_kills_at_any_time(tmp_path):
    """Whatever has its name is whole; at most the one in work lies beside it, hidden."""
    rng, expected = random.Random(0), save(tmp_path / "expected", TINY, numbers(TINY), shard_bytes=4096)
    for number in range(3):
        folder = tmp_path / f"kill {number}"
        folder.mkdir()
        words = [sys.executable, PROGRAM, "saves", str(folder)]
        with subprocess.Popen(words, env=environment(), cwd=PROGRAM_ROOT, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None and process.stdout.readline() == "ready\n"
            time.sleep(rng.uniform(0.2, 0.5))
            process.kill()
        named = [path for path in folder.iterdir() if not path.name.startswith(".")]
        assert named and all(same_files(path, expected) for path in named)
        assert len(list(folder.iterdir())) <= len(named) + 1
