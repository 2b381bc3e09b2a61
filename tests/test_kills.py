"""A run that is killed goes on as if it had not been: once for each setting here, twenty times in `make soak`."""

import random

import pytest

from experiments.soak import SETTINGS, differences, soak

FLAGS = ("--config.train.steps=24", "--config.model.width=32", "--config.train.length=64")


@pytest.mark.slow
@pytest.mark.parametrize("setting", SETTINGS, ids=lambda setting: setting.name)
def test_a_killed_run_goes_on_bit_by_bit(setting, tmp_path):
    seed = random.randrange(10**6)  # another step and signal each time: the message names it
    found = soak(setting, tmp_path, kills=1, seed=seed, flags=FLAGS)
    assert not found["differences"] and found["kills"] <= 1, (seed, found)
    (tmp_path / "disturbed" / "metrics.jsonl").write_bytes(b"")
    assert differences(tmp_path / "straight", tmp_path / "disturbed") == ["metrics.jsonl"], "a difference would be seen"
