"""The model that comes with jaxfw: its card is what was measured, what was measured holds, and it is what it was."""

import json
from pathlib import Path

import jax
import numpy as np
import pytest

import jaxfw
from experiments.embedded.card import RESULT, card_text
from jaxfw.evals import ABILITIES, TASKS, items, wilson
from jaxfw.evals.evaluate import evaluate
from jaxfw.models.cache import RingCache
from jaxfw.weights import load_config, model_sha256
from jaxfw.weights.__main__ import main
from jaxfw.weights.shipped import located

DIRECTORY = located("embedded-1")
FOUND = json.loads(RESULT.read_text(encoding="utf-8"))
STANDARD = {row["task"]: row for row in FOUND["by_level"] if row["level"] == TASKS[row["task"]].standard}


@pytest.fixture(scope="module")
def m():
    return jaxfw.load("embedded-1")


def test_the_card_is_what_was_measured_of_these_weights():
    assert FOUND["model_sha256"] == model_sha256("embedded-1")
    assert (DIRECTORY / "README.md").read_text(encoding="utf-8") == card_text(FOUND)
    assert FOUND["n"] >= 500 and all(row["n"] == FOUND["n"] for row in FOUND["by_level"])
    assert {(row["task"], row["level"]) for row in FOUND["by_level"]} == {
        (task.name, level) for task in TASKS.values() for level in task.levels
    }


def test_it_is_small_and_whole(capsys):
    assert sum(path.stat().st_size for path in DIRECTORY.iterdir()) <= 12_000_000
    assert main(["verify", "embedded-1"]) == 0
    capsys.readouterr()


@pytest.mark.parametrize("name", ABILITIES)
def test_every_ability_is_one_and_its_hardest_level_is_hard(name):
    found = STANDARD[name]
    assert found["accuracy"]["low"] > found["best_baseline"]["high"]
    assert found["accuracy"]["value"] >= 0.9
    hardest = [row for row in FOUND["by_level"] if row["task"] == name][-1]
    assert hardest["accuracy"]["value"] < 0.97


def test_shots_help_with_a_hidden_rule():
    levels = {row["level"]: row["accuracy"] for row in FOUND["by_level"] if row["task"] == "rule"}
    assert levels[4]["low"] > levels[0]["high"]


def test_half_the_cache_costs_what_lies_far_back():
    change = {row["task"]: row["half_cache"]["gain"]["value"] for row in FOUND["compared"]}
    assert change["retrieval"] <= -0.2 and change["facts"] >= -0.05


@pytest.mark.parametrize("name", ["facts", "arithmetic", "safety"])
def test_the_figures_hold_here(m, name):
    """Asked again, fewer items: the committed interval and that of these overlap."""
    found = evaluate(m, ABILITIES[name], n=64)
    committed = STANDARD[name]["accuracy"]
    assert found.accuracy.low <= committed["high"] and committed["low"] <= found.accuracy.high


def test_a_sliding_cache_forgets_what_is_far_back(m):
    task = ABILITIES["retrieval"]
    full, half = (evaluate(m, task, n=32, policy=policy) for policy in (None, RingCache(88)))
    assert full.accuracy.value - half.accuracy.value >= 0.2


def test_it_answers_in_conversation(m):
    said = m.chat([{"role": "user", "content": "214 + 473"}], max_new_tokens=60)
    assert said.strip().endswith("=> 687"), said
    item = items(ABILITIES["facts"], n=1, level=1, seed=0)[0]
    assert m.chat([{"role": "user", "content": item.question}], max_new_tokens=12).strip() == item.answer


def test_it_is_computed_in_float32(m):
    assert load_config("embedded-1").dtype == load_config("embedded-1").param_dtype == "float32"
    assert all(x.dtype == np.float32 for x in jax.tree.leaves(m.params))
    assert load_config("embedded-1", param_dtype="bfloat16").param_dtype == "bfloat16"


def test_a_folder_of_that_name_comes_first(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert located("embedded-1") == DIRECTORY and located("embedded-2") == Path("embedded-2")
    (tmp_path / "embedded-1").mkdir()
    assert located("embedded-1") == Path("embedded-1")


def test_wilson_intervals_of_the_card_are_wilsons():
    for row in FOUND["by_level"]:
        if not row["task"].startswith("long"):
            expected = wilson(round(row["accuracy"]["value"] * row["n"]), row["n"])
            assert (row["accuracy"]["low"], row["accuracy"]["high"]) == (expected.low, expected.high)
