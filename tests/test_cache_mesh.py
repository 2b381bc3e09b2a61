"""Caches on meshes of fake devices: the same logits, every state cut by heads and rows, and nothing of it moved."""

import functools
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ATOL = {"Int8Cache()": 0.02}  # where a number falls on the edge between two steps, the order of a sum decides
SHARES = {"tensor=4": 4, "data=2,tensor=4": 8}
POLICIES = [
    "FullCache()", "RingCache(window=6)", "RandomCache(budget=6)", "Int8Cache()", "SinkCache(sinks=2, recent=4)",
]  # fmt: skip


@functools.cache
def found(mesh):
    program = Path(__file__).parent / "mesh_caches.py"
    environment = os.environ | {"PYTHONPATH": str(program.parents[1])}
    done = subprocess.run([sys.executable, str(program), mesh], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.slow
@pytest.mark.parametrize("mesh", SHARES)
@pytest.mark.parametrize("policy", POLICIES)
def test_a_mesh_equals_one_device_and_holds_its_share(policy, mesh):
    case = found(mesh)[policy]
    assert max(case["errors"]) <= ATOL.get(policy, 1e-5), "a prompt, one token, several"
    assert [SHARES[mesh] * held for held in case["held"]] == case["whole"] and min(case["held"]) > 0
    assert all(case["laid out"]), "as cache_shardings says"
    assert case["moved"] == [], "a sum over heads is all that crosses devices"
