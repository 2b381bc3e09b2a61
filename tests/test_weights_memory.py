"""The pre-flight: bytes of each device against what it says is free, before anything is allocated."""

import dataclasses

import jax
import pytest

from jaxfw.core.errors import InputError
from jaxfw.core.mesh import abstract_mesh
from jaxfw.models import init
from jaxfw.models.accounting import parameter_bytes
from jaxfw.models.presets import preset
from jaxfw.weights import abstract_params, device_bytes, load, memory, preflight, save, tensors
from tests.model_directories import CONFIG, TIED

SEVENTY = preset("llama-3.1-70b")


def have(monkeypatch, count):
    monkeypatch.setattr(memory, "free_bytes", lambda mesh=None: count)


def test_what_is_needed_and_what_would_fit(monkeypatch):
    have(monkeypatch, 80_000_000_000)
    with pytest.raises(InputError) as caught:
        preflight(SEVENTY)
    assert str(caught.value) == (
        "the model needs 141.1 GB for its parameters on each device, 80.0 GB are free: quantise='int8' needs 71.6 GB, "
        "quantise='int4' needs 39.0 GB, or give a mesh of tensor=2 (70.6 GB a device)."
    )
    with pytest.raises(InputError, match=r"are free: quantise='int4' needs 39\.0 GB, or give a mesh of tensor=2"):
        have(monkeypatch, 60_000_000_000)
        preflight(SEVENTY, quantise="int8")
    preflight(SEVENTY, mesh=abstract_mesh(tensor=4))
    preflight(SEVENTY, quantise="int4")


def test_nothing_fits_and_nothing_is_known(monkeypatch):
    have(monkeypatch, 1000)
    with pytest.raises(InputError, match="or give a mesh of more devices"):
        preflight(SEVENTY, quantise="int4")
    have(monkeypatch, None)
    preflight(SEVENTY)


def test_nothing_is_read_before(tmp_path, monkeypatch):
    directory = save(tmp_path / "model", CONFIG, init(CONFIG, jax.random.key(0)))
    have(monkeypatch, 26_559)
    monkeypatch.setattr(tensors.Reader, "read", lambda *_: pytest.fail("a tensor is read"))
    with pytest.raises(InputError, match=r"needs 0\.0 GB for its parameters"):
        load(directory)
    monkeypatch.undo()
    have(monkeypatch, 26_560)
    load(directory)


@pytest.mark.parametrize("config", [CONFIG, TIED, SEVENTY], ids=["biased", "tied", "70b"])
def test_bytes_of_one_device_are_those_of_the_parameters(config):
    assert device_bytes(config) == parameter_bytes(config)
    half = dict.fromkeys(paths(config), "bfloat16")
    narrow = dataclasses.replace(config, param_dtype="bfloat16")
    assert device_bytes(config, dtypes=half) == parameter_bytes(narrow)


def paths(config):
    leaves = jax.tree_util.tree_leaves_with_path(abstract_params(config))
    return [jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in leaves]


def test_a_processor_shares_its_memory():
    """Free memory is that of the machine, in a plausible range."""
    free = memory.free_bytes()
    assert free is None or 2**26 < free < 2**45


def test_a_gpu_says_what_it_has_left(monkeypatch):
    @dataclasses.dataclass(frozen=True)
    class Device:
        left: int
        platform: str = "gpu"
        process_index: int = 0

        def memory_stats(self):
            return {"bytes_limit": 100, "bytes_in_use": 100 - self.left}

    monkeypatch.setattr(memory, "default_device", lambda: Device(30))
    assert memory.free_bytes() == 30
