"""Small model directories, for all tests of weights."""

import jax
import pytest
from hypothesis import settings

from jaxfw.models import init
from jaxfw.weights import save
from tests.model_directories import CONFIG, TIED

# How long an example takes says how busy the machine is.
settings.register_profile("untimed", parent=settings(), deadline=None)
settings.load_profile("untimed")


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
