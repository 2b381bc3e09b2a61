"""Small model directories, for all tests of weights; what keeps a worker alive through thousands of programs."""

from pathlib import Path

import jax
import pytest
from hypothesis import settings

from jaxfw.models import init
from jaxfw.weights import save
from tests.model_directories import CONFIG, TIED

# How long an example takes says how busy the machine is.
settings.register_profile("untimed", parent=settings(), deadline=None)
settings.load_profile("untimed")

MAPS = Path("/proc/self/maps")


@pytest.fixture(autouse=True, scope="module")
def executables_are_few():
    """A compiled program is several mappings of memory, and Linux ends a process's compiling at 65,530 of them."""
    yield
    if MAPS.exists() and MAPS.read_bytes().count(b"\n") > 20_000:
        jax.clear_caches()


@pytest.fixture
def saved(tmp_path):
    return save(tmp_path / "model", CONFIG, init(CONFIG, jax.random.key(0)))


@pytest.fixture
def tied(tmp_path):
    return save(tmp_path / "tied", TIED, init(TIED, jax.random.key(0)))


@pytest.fixture
def sharded(tmp_path):
    directory = save(tmp_path / "sharded", CONFIG, init(CONFIG, jax.random.key(0)), shard_bytes=4096)
    assert len(list(directory.glob("model-*.safetensors"))) > 3
    return directory
