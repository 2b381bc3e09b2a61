"""Compressed caches of an 8B model in decode steps compiled for H200s: the kernels read them as they are held."""

import dataclasses
import functools
import json

import jax
import pytest

from experiments import h200
from jaxfw.audit import programs
from jaxfw.audit.audit import Request
from jaxfw.core import aot, hlo
from jaxfw.core.errors import InputError
from jaxfw.models.presets import preset

pytestmark = pytest.mark.skipif(aot.missing() is not None, reason=str(aot.missing()))
LAYERS, B, T = 2, 64, 131072
CONFIG = dataclasses.replace(preset(h200.MODEL), layers=LAYERS)
KEPT = ("adakv@keep=0.2", "adakv@keep=0.2,kv=int4", "snapkv@keep=0.2,kv=int8")


def nbytes(tree):
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))


@functools.cache
def step(kv, gpus):
    program = programs.decode_step(CONFIG, aot.cluster(f"h200:1x{gpus}", tensor=gpus), batch=B, length=T, kv=kv)
    return program, program.compile()


@pytest.mark.parametrize("kv", KEPT)
def test_a_step_calls_the_ragged_kernel_and_writes_no_second_cache(kv):
    """A kernel for the pool and one for what is beside it, in each layer."""
    program, compiled = step(kv, 1)
    assert hlo.custom_calls(compiled.text)["__gpu$xla.gpu.triton"] == 2 * LAYERS
    assert "ragged_decode" in compiled.text and "decode_attention" in compiled.text
    pool = program.parts["cache"].layers[0]
    wide = 2 * pool.positions.size * CONFIG.head_dim * 2  # keys and values of a layer in full width
    assert compiled.bytes.temporaries + compiled.bytes.outputs < 0.02 * wide


@pytest.mark.parametrize("kv", KEPT[:2])
def test_of_four_devices_each_holds_a_quarter_and_moves_none_of_it(kv):
    whole = nbytes(step(kv, 1)[0].parts["cache"])
    program, compiled = step(kv, 4)
    weights = nbytes(program.parts["parameters"])
    quarter = compiled.bytes.arguments - weights / 4
    assert abs(quarter / (whole / 4) - 1) < 0.02
    moved = max(found.bytes for found in hlo.collectives(compiled.text))
    assert moved < nbytes(program.parts["cache"].layers[0].k) / 4 / 100


def test_bytes_of_states_are_the_share_that_is_kept_and_a_little():
    full = nbytes(programs.decode_step(CONFIG, aot.cluster("h200:1x1"), batch=1, length=8192).parts["cache"])
    for keep in (0.1, 0.25, 0.5):
        kept = programs.decode_step(CONFIG, aot.cluster("h200:1x1"), batch=1, length=8192, kv=f"adakv@keep={keep}")
        assert keep < nbytes(kept.parts["cache"]) / full <= keep + 0.02


def test_a_cache_that_is_asked_of_another_program_is_refused():
    with pytest.raises(InputError, match=r"--kv=adakv@keep=0\.2 is of a cache, which --program=train has none of"):
        Request(model=h200.MODEL, program="train", kv="adakv@keep=0.2")


def test_the_committed_table_says_that_only_both_together_fit():
    """128k tokens of 64 rows on one H200, in decimal gigabytes."""
    rows = json.loads(h200.RESULTS.read_text(encoding="utf-8"))["caches"]
    cache = {kv: row["cache_bytes"] / 1e9 for kv, row in rows.items()}
    wanted = {"full": 1100, "adakv@keep=0.2": 220, "knorm@keep=1,kv=int4": 355, "adakv@keep=0.2,kv=int4": 71}
    assert cache == pytest.approx(wanted, rel=0.02)
    assert [kv for kv, row in rows.items() if row["fits"]] == ["adakv@keep=0.2,kv=int4"]
    assert all(row["predicted_seconds"] > 0 for row in rows.values())
