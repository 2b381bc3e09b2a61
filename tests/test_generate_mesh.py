"""`LM` on meshes of fake devices, of one process and of two: the same texts, tokens and scores as on one device."""

import json

import jax
import numpy as np
import pytest

import jaxfw
from jaxfw.data import train_bpe
from jaxfw.generate import LM
from jaxfw.models import DecoderConfig, init
from tests import mesh_generate
from tests.processes import environment, free_port, run_together

CONFIG = DecoderConfig(
    vocab=300, width=32, ffn=64, layers=1, heads=4, kv_heads=2, head_dim=8, positions=128, init_std=0.4
)
ATOL = 5e-5  # sums over devices in another order


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    tokenizer = train_bpe(mesh_generate.PROMPTS, vocab_size=300)
    params = jax.jit(init, static_argnums=0)(CONFIG, jax.random.key(0))
    return LM(CONFIG, params, tokenizer, (tokenizer.eos_id or 0,)).save(tmp_path_factory.mktemp("mesh") / "model")


@pytest.fixture(scope="module")
def alone(directory):
    return json.loads(json.dumps(mesh_generate.found(jaxfw.load(directory))))


def run(directory, processes):
    """What each of the processes found, on 8 devices together."""
    port, environments = free_port(), []
    for index in range(processes):
        joining = {"COORDINATOR": f"localhost:{port}", "PROCESSES": f"{processes}", "PROCESS_ID": f"{index}"}
        names = {f"JAXFW_{name}": value for name, value in joining.items()} if processes > 1 else {}
        environments.append(environment(devices=8 // processes, **names))
    program = [mesh_generate.__file__, str(directory)]
    ended = run_together(*((program, env) for env in environments), timeout=150)
    assert [one.code for one in ended] == [0] * processes, [one.err[-3000:] for one in ended]
    return [json.loads(one.out.splitlines()[-1]) for one in ended]


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_a_mesh_gives_what_one_device_gives(directory, alone, processes):
    found = run(directory, processes)
    assert all(one == found[0] for one in found), "every process reads the same"
    for name, expected in alone.items():
        if "scores" in name or "logprobs" in name:
            for ours, theirs in zip(found[0][name], expected, strict=True):
                np.testing.assert_allclose(ours, theirs, atol=ATOL)
        else:
            assert found[0][name] == expected, name
    lengths = [len(text) for text in alone["stopped"]]
    assert lengths[0] == 3 < len(alone["greedy"][0][1]), "a text that was ended by its string"
