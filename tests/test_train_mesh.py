"""Training on eight devices equals one: losses, norms, gradients, parameters, averages; and what each device holds."""

import json

import jax
import pytest

from tests.mesh_training import MESHES, OPTIMIZER, B
from tests.processes import environment, run_together

TOLERANCE = 1e-5  # of each leaf's largest value, float32


@pytest.fixture(scope="module")
def report():
    variables = environment(devices=8, JAX_PLATFORMS="cpu")
    if jax.__version_info__ < (0, 11):  # halves the time to compile; a flag that XLA does not know ends the process
        variables["XLA_FLAGS"] += " --xla_cpu_use_fusion_emitters=false"
    (done,) = run_together((["-m", "tests.mesh_training"], variables), timeout=300)
    assert done.code == 0, done.err[-4000:]
    return json.loads(done.out.splitlines()[-1])


@pytest.mark.slow
@pytest.mark.parametrize("name", MESHES)
def test_a_mesh_trains_as_one_device(report, name):
    errors = report[name]["errors"]
    assert {f"{what} {n}" for what, n in [("gradients", 1), ("gradients", 5), ("parameters", 4)]} < set(errors)
    assert {what: value for what, value in errors.items() if not value <= TOLERANCE} == {}


@pytest.mark.slow
@pytest.mark.parametrize("name", MESHES)
def test_the_norm_is_of_all_shards_and_clips(report, name):
    """Of sharded matrices and of experts that lie on different devices, in numpy from the whole gradients."""
    assert report[name]["norms"] == pytest.approx(report[name]["norms in numpy"], rel=TOLERANCE)
    assert OPTIMIZER.clip_norm is not None and min(report[name]["norms"]) > 2 * OPTIMIZER.clip_norm


@pytest.mark.slow
@pytest.mark.parametrize("name", MESHES)
def test_a_step_leaves_everything_where_it_lay(report, name):
    assert report[name]["moved"] == []


@pytest.mark.slow
@pytest.mark.parametrize("name", MESHES)
def test_optimiser_bytes_fall_as_those_of_the_parameters(report, name):
    """Two moments, accumulated gradients and an average, laid out as the parameters; and five counts."""
    found = report[name]
    assert found["state"] == 4 * found["parameters"] + 5 * 4
    if name != "data=8":
        assert found["state"] < found["whole state"] / (1.4 if "data" in name else 4)
    if name == "fsdp=8":
        assert found["state"] < found["whole state"] / (0.8 * B)


@pytest.mark.slow
def test_muon_on_a_mesh_is_muon_on_one_device(report):
    """Its five iterations multiply small singular values, and the noise in them, by up to 3.4445^5 = 485."""
    assert report["muon"] <= 10 * TOLERANCE
