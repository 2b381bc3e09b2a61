"""Asking a model: prompts and their shots, answers in batches, choices behind a prefix, and the command line."""

import json
import re
import sys
import types
from pathlib import Path

import jax
import numpy as np
import pytest

from jaxfw.core.errors import InputError
from jaxfw.data import train_bpe
from jaxfw.evals import TASKS, items, wilson
from jaxfw.evals.__main__ import main
from jaxfw.evals.baselines import BASELINES, chance, copy_last, majority, nearest
from jaxfw.evals.evaluate import baselines, choose, evaluate, examples
from jaxfw.evals.items import Item
from jaxfw.evals.shots import few_shot, token_spans
from jaxfw.generate import LM
from jaxfw.models import DecoderConfig, init

TOKENIZER = train_bpe([item.prompt + item.target for task in TASKS.values()
                       for item in items(task, n=20, level=task.standard, seed=0)], vocab_size=320)  # fmt: skip
CONFIG = DecoderConfig(
    vocab=320, width=32, ffn=64, layers=2, heads=4, kv_heads=2, head_dim=8, positions=256, init_std=0.4
)


@pytest.fixture(scope="module")
def m():
    params = jax.jit(lambda: init(CONFIG, jax.random.key(0)))()
    return LM(CONFIG, params, TOKENIZER, (TOKENIZER.eos_id,))


@pytest.fixture(scope="module")
def directory(m, tmp_path_factory):
    return m.save(tmp_path_factory.mktemp("evals") / "model")


def test_outputs_are_what_the_model_writes_behind_each_prompt(m):
    task = TASKS["facts"]
    found = evaluate(m, task, n=5, shots=1, batch=2)
    for i, item in enumerate(found.items):
        prompt = few_shot(item, examples(task, 1, 1, seed=0, place=i))
        whole = m.generate(prompt.text, max_new_tokens=64, stop="\n")
        begun = found.outputs[i].rstrip("\ufffd")  # a letter may be cut in its middle
        assert whole.startswith(begun) and begun, (whole, begun)
        assert found.correct[i] == 0 and found.asked[i] == 1
    assert found.accuracy.low == 0 < found.accuracy.high < 0.6


def test_a_right_model_is_right():
    """Outputs of a perfect model, scored: whole items by Wilson's interval, many answers over items."""
    from jaxfw.evals.evaluate import score

    for name in ("arithmetic", "long_output"):
        asked = items(TASKS[name], n=20, level=2, seed=0)
        perfect = score(name, 2, 0, asked, [item.target for item in asked])
        assert perfect.accuracy.value == perfect.accuracy.high == 1 and perfect.shares.sum() == 20
        half = score(name, 2, 0, asked, [item.target if i % 2 else "" for i, item in enumerate(asked)])
        assert half.accuracy.value == 0.5 and 0.2 < half.accuracy.low < 0.4
        none = score(name, 2, 0, asked, ["" for _ in asked])
        assert none.accuracy.low == 0 and none.accuracy.high == pytest.approx(wilson(0, 20).high), "never of no width"


def test_the_likeliest_choice_is_that_of_the_joined_texts(m):
    item = items(TASKS["safety"], n=1, level=0, seed=0)[0]
    prompt = few_shot(item, ())
    sums = []
    for choice in item.choices:
        ids = TOKENIZER.encode(f"{prompt.text} {choice}\n")
        behind = len(ids) - len(TOKENIZER.encode(prompt.text))
        sums.append(m.logprobs(f"{prompt.text} {choice}\n")[-behind:].sum())
    assert choose(m, prompt, item) == int(np.argmax(sums))


def test_spans_of_tokens_are_those_of_their_shots():
    task = TASKS["arithmetic"]
    item = items(task, n=1, level=3, seed=0)[0]
    shots = examples(task, 3, 3, seed=0, place=0)
    prompt = few_shot(item, shots)
    ids, spans = TOKENIZER.encode(prompt.text), token_spans(TOKENIZER, prompt)
    assert [TOKENIZER.decode(ids[begin:end]) for begin, end in spans] == [shot.prompt + shot.target for shot in shots]
    assert [prompt.text[begin:end] for begin, end in prompt.shots] == [shot.prompt + shot.target for shot in shots]
    assert TOKENIZER.decode(ids[spans[-1][1] :]) == item.prompt
    assert token_spans(TOKENIZER, few_shot(item, ())) == []


def test_the_page_on_adding_a_task_runs(directory, tmp_path, monkeypatch, capsys):
    page = (Path(__file__).parents[1] / "docs" / "add_a_task.md").read_text(encoding="utf-8")
    (tmp_path / "runs" / "quickstart").mkdir(parents=True)
    (tmp_path / "runs" / "quickstart" / "model").symlink_to(directory)
    monkeypatch.chdir(tmp_path)
    held = {"__name__": "page"}
    monkeypatch.setitem(sys.modules, "page", types.ModuleType("page"))
    exec("\n".join(re.findall(r"```python\n(.*?)```", page, flags=re.S)), held)
    assert capsys.readouterr().out.startswith("Interval(value=")
    assert items(held["Reverse"](), n=500, level=5, seed=0)


def test_trivial_answers():
    shots = [Item("", 1, "red house", "a"), Item("", 1, "blue house", "b"), Item("", 1, "green tree", "b")]
    asked = Item("", 1, "old red house", "?", context="The red dog.\n")
    assert (majority(shots, asked), copy_last(shots, asked), nearest(shots, asked)) == ("b", "dog", "a")
    assert copy_last(shots, shots[0]) == "b"
    assert chance([Item("", 1, "", "a", choices=("a", "b")), Item("", 1, "", "a")]) == 0.25
    found = baselines(TASKS["safety"], n=200)
    assert set(found) == set(BASELINES) and all(0.35 < score.accuracy.value < 0.65 for score in found.values())


def test_the_command_prints_and_keeps_what_it_found(directory, tmp_path, capsys):
    out = tmp_path / "results.json"
    words = [f"--model={directory}", "--tasks=facts,safety", "--n=4", "--batch=2", f"--json={out}"]
    assert main(words) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].split()[:4] == ["facts", "1", "0", "4"] and lines[2].split()[:4] == ["safety", "0", "0", "4"]
    report = json.loads(out.read_text())
    assert len(report["model_sha256"]) == 64 and report["seed"] == 0 and report["environment"]["versions"]["jax"]
    assert [row["task"] for row in report["rows"]] == ["facts", "safety"]
    assert set(report["rows"][0]["accuracy"]) == {"value", "low", "high"}


WRONG = [
    (("--tasks=cooking",), "task='cooking' is unknown. Known: abilities, all, facts"),
    (("--tasks=",), "task='' is unknown"),
    (("--n=0",), "n=0 must be at least 1"),
    (("--tasks=facts", "--n=9000"), "n=9000 exceeds the test items of facts at level 1"),
    (("--tasks=facts", "--level=7"), "level of facts='7' is unknown. Known: standard, all, 1, 2, 3"),
    (("--tasks=facts", "--level=hard"), "level of facts='hard' is unknown"),
    (("--tasks=retrieval", "--level=64", "--n=2"), "task retrieval at level 64 needs"),
    (("--tasks=facts", "--shots=40", "--n=2"), "take an easier level or fewer shots"),
    (("--tasks=facts", "--shots=-1"), "shots=-1 must be 0 or more"),
    (("--tasks=facts", "--batch=0"), "batch=0 must be at least 1"),
    (("--tasks=facts", "--seed=-1"), "seed=-1 must be 0 or more"),
    (("--tasks=code", "--n=2", "--choose"), "has no choices: its answers are written, not chosen"),
    (("--n=many",), "--n"),
    (("--colour=red",), "unrecognized arguments: --colour=red"),
    (("--model=no/such/model",), "no/such/model"),
    (("--tasks=facts", "--n=1", "--json=no/such/folder/results.json"), "no/such/folder"),
]


@pytest.mark.parametrize("words, message", WRONG, ids=lambda value: str(value)[:40])
def test_what_cannot_be_used_is_named(directory, capsys, words, message):
    assert main([f"--model={directory}", *words]) == 2
    said = capsys.readouterr().err
    assert message in said and said.count("\n") == 1 and "Traceback" not in said


def test_choices_are_scored_like_what_is_written(m, directory, tmp_path):
    out = tmp_path / "results.json"
    assert main([f"--model={directory}", "--tasks=safety", "--n=6", "--choose", f"--json={out}"]) == 0
    report = json.loads(out.read_text())
    asked = items(TASKS["safety"], n=6, level=0, seed=0)
    chosen = [item.choices[choose(m, few_shot(item, ()), item)] for item in asked]
    right = sum(text == item.answer for text, item in zip(chosen, asked, strict=True))
    assert report["by"] == "choices" and report["rows"][0]["accuracy"]["value"] == right / 6


def test_an_item_without_choices_is_written_not_chosen(m):
    item = items(TASKS["arithmetic"], n=1, level=2, seed=0)[0]
    with pytest.raises(InputError, match="has no choices"):
        choose(m, few_shot(item, ()), item)
