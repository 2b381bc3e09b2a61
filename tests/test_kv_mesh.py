"""Compression on meshes of fake devices: the same tokens stay, the same is said, and no keys or values move."""

import functools
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from jaxfw.kv import METHODS

SHARES = {"tensor=4": 4, "data=2,tensor=2": 4}
PROGRAM = Path(__file__).parent / "mesh_kv.py"


@functools.cache
def found(mesh):
    environment = os.environ | {"PYTHONPATH": str(PROGRAM.parents[1])}
    done = subprocess.run([sys.executable, str(PROGRAM), mesh], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.slow
@pytest.mark.parametrize("mesh", SHARES)
def test_a_mesh_keeps_and_says_what_one_device_does(mesh):
    cases = found(mesh)["cases"]
    assert mesh != "tensor=4" or {kv.split("@")[0].split("(")[0] for kv in cases} == set(METHODS)
    for kv, case in cases.items():
        assert case["kept"], kv
        assert case["error"] <= 1e-5, (kv, case["error"])
        assert case["laid out"], kv
        assert case["share"] * SHARES[mesh] == 1, kv
        assert max(*case["moved"], case["summed"]) < case["keys"] / 8, (
            kv,
            "a quarter of the keys would be that of one device",
        )


@pytest.mark.slow
@pytest.mark.parametrize("mesh", SHARES)
def test_keys_that_do_move_are_seen(mesh):
    moved, keys = found(mesh)["control"]
    assert moved == keys
