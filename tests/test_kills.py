"""A run that is killed goes on as if it had not been: once for each setting here, twenty times in `make soak`."""

import json
import random
from pathlib import Path

import pytest

from experiments.soak import RESULT, SETTINGS, differences, soak

FLAGS = ("--config.train.steps=24", "--config.model.width=32", "--config.train.length=64")


@pytest.mark.slow
@pytest.mark.parametrize("setting", SETTINGS, ids=lambda setting: setting.name)
def test_a_killed_run_goes_on_bit_by_bit(setting, tmp_path):
    seed = random.randrange(10**6)  # another step and signal each time: the message names it
    found = soak(setting, tmp_path, kills=1, seed=seed, flags=FLAGS)
    assert not found["differences"] and found["kills"] <= 1, (seed, found)
    (tmp_path / "disturbed" / "metrics.jsonl").write_bytes(b"")
    assert differences(tmp_path / "straight", tmp_path / "disturbed") == ["metrics.jsonl"], "a difference would be seen"


def test_the_committed_soak_killed_twenty_times_and_found_nothing():
    results = {result["setting"]: result for result in json.loads(Path(RESULT).read_text())["results"]}
    assert results.keys() == {setting.name for setting in SETTINGS}
    for result in results.values():
        assert result["kills"] >= 20 and result["differences"] == []
        assert {hit["signal"] for hit in result["hits"]} == {"SIGKILL", "SIGTERM"}
        assert all(hit["seconds"] < 60 for hit in result["hits"]), "who is left ends within a minute"
