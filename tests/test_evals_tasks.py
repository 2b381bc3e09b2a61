"""Tasks: their answers by another way, their sides apart, their items functions of the seed."""

import contextlib
import io
import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxfw.core.errors import InputError
from jaxfw.evals import ABILITIES, TASKS, Item, draw, items, parse, right, side, world
from jaxfw.evals.items import HELD_OUT
from jaxfw.evals.tasks.safety import LIVING, REFUSAL, THINGS

EVERY = [(name, level) for name, task in TASKS.items() for level in task.levels]


def test_there_are_seven_abilities_with_levels():
    assert list(ABILITIES) == ["facts", "composition", "arithmetic", "code", "safety", "retrieval", "long_output"]
    assert all(task.standard in task.levels and len(task.levels) >= 3 for task in TASKS.values())


@pytest.mark.parametrize("name, level", EVERY)
def test_sides_are_disjoint_and_both_are_there(name, level):
    made = {split: items(TASKS[name], n=40, level=level, seed=0, split=split) for split in ("train", "test")}
    assert not {x.identity for x in made["train"]} & {x.identity for x in made["test"]}
    assert all(side(item.identity) == split for split, found in made.items() for item in found)
    assert all(item.answer in item.choices and len(set(item.choices)) > 1 for item in made["test"] if item.choices)
    assert all(all(right(item, item.target)) and item.level == level for item in made["test"])


@pytest.mark.parametrize("name", TASKS)
def test_there_are_five_hundred_different_test_items_at_the_standard_level(name):
    task = TASKS[name]
    assert len(set(items(task, n=500, level=task.standard, seed=0))) == 500


def test_one_identity_in_four_is_held_out():
    held = np.mean([side(f"arithmetic {i} {i + 3}") == "test" for i in range(8000)])
    assert held == pytest.approx(1 / HELD_OUT, abs=0.02)


def test_items_are_functions_of_seed_and_place():
    task = TASKS["code"]
    assert items(task, n=3, level=4, seed=5) == items(task, n=6, level=4, seed=5)[:3]
    assert items(task, n=3, level=4, seed=5) != items(task, n=3, level=4, seed=6)


@settings(deadline=None, max_examples=60)
@given(seed=st.integers(0, 10**6), level=st.sampled_from(TASKS["code"].levels))
def test_programs_print_their_answer_and_pass_through_their_working(seed, level):
    item = TASKS["code"].draw(np.random.default_rng(seed), level)
    program = item.question.split("\n", 1)[1]
    printed, held = io.StringIO(), {}
    with contextlib.redirect_stdout(printed):
        for line, step in zip(program.splitlines(), item.working.split("; "), strict=True):
            exec(line, {"print": print}, held)
            read, _, worked = step.partition(": ")
            assert read == line
            value = worked.rpartition(" ")[2]
            shown = line.removeprefix("print(")[0]
            assert value == f"{shown}{item.answer if line.startswith('print') else held[shown]}"
            if " = " in worked:
                before, _, _ = worked.rpartition(" = ")
                assert re.sub(r"([xyz])\d", r"\1", before) == line.partition(" = ")[2]
                assert eval(re.sub(r"[xyz](\d)", r"\1", before)) == held[shown]
    assert printed.getvalue().strip() == item.answer


@settings(deadline=None, max_examples=60)
@given(seed=st.integers(0, 10**6), level=st.sampled_from(TASKS["arithmetic"].levels))
def test_sums_are_sums_and_every_column_holds(seed, level):
    item = TASKS["arithmetic"].draw(np.random.default_rng(seed), level)
    assert eval(item.question) == int(item.answer)
    assert all(eval(left) == int(right) for left, right in (step.split("=") for step in item.working.split()))


def test_chains_follow_the_facts():
    for level in TASKS["composition"].levels:
        for item in items(TASKS["composition"], n=20, level=level, seed=1):
            *reports, last = [sentence.strip() for sentence in item.working.removesuffix(".").split(". ")]
            (at,) = re.findall(r"[A-Z]\w+", item.question[1:])
            for sentence in reports:
                assert sentence.split()[0] == at
                at = sentence.split()[-1]
            assert last.split()[0] == at and last.split()[-1] == item.answer and len(reports) == level - 1


def test_what_is_asked_for_stands_in_the_context_once_at_every_depth():
    found = items(TASKS["retrieval"], n=300, level=8, seed=2)
    depths = []
    for item in found:
        asked = item.question.removeprefix("Which animal is ").removesuffix("?")
        (place,) = [i for i, line in enumerate(item.context.splitlines()) if line.startswith(f"The {asked} ")]
        assert item.context.splitlines()[place] == f"The {asked} {item.answer}."
        depths.append(place)
    assert np.bincount(depths, minlength=8).min() >= 15, "37.5 expected of each"


def test_a_verb_alone_does_not_tell_what_is_refused():
    assert not set(LIVING) & set(THINGS)
    for level in TASKS["safety"].levels:
        for item in items(TASKS["safety"], n=50, level=level, seed=3):
            *named, request = re.split(r"(?<=here\.) ", item.question)
            assert len(named) == level
            kinds = {words[2]: words[1] for words in (sentence.split() for sentence in named)}
            about = [noun for name, noun in kinds.items() if re.search(rf"\b{name}\b", request)]
            about += re.findall(r"my (\w+)", request)
            assert [item.answer == REFUSAL] == [noun in LIVING for noun in about]


def test_a_rule_holds_in_all_of_its_shots():
    for item in items(TASKS["rule"], n=20, level=4, seed=4):
        lines = item.context.splitlines()
        shown = [tuple(line.split()[1:]) for line in lines[1::2]]
        assert [noun for noun, _ in shown] == [line.removeprefix("Q: ") for line in lines[::2]]
        labels = {noun in LIVING: label for noun, label in shown}
        assert len(shown) == 4 and all(labels[noun in LIVING] == label for noun, label in shown)
        assert len(set(labels.values())) == 2 and f"{item.question} {labels[item.question in LIVING]}" == item.answer
        assert item.question not in dict(shown)


def test_the_world_has_no_favourites():
    for relation in ("home", "trade", "instrument"):
        counts = np.unique([world.fact(relation, person) for person in world.people()], return_counts=True)[1]
        assert counts.min() == counts.max() == world.PEOPLE // len(world.values(relation))
    for group in np.split(np.array(world.people()), world.FAME_GROUPS):
        at, seen = str(group[0]), set()
        while at not in seen:
            seen.add(at)
            at = world.fact("superior", at)
        assert seen == set(group.tolist()), "one cycle: no chain comes back early or leaves its group"
    assert len({*world.people(), *world.towns(), *world.regions()}) == world.PEOPLE + world.TOWNS + world.REGIONS


@pytest.mark.parametrize(
    "output, found",
    [
        (" 12\n", "12"), ("12", "12"), (" 12.", "12"), ("", ""), ("=>", ""), ("\n12", ""), (" 3+4=7 => 7\nQ: 1", "7"),
        (" => 5 => 6", "6"), (" 5 =>", ""), (" 12 13", "12 13"), ("  12  ", "12"), (" 12 .", "12"), (" 012", "012"),
        (" twelve", "twelve"), (" => 7 (I think)", "7 (I think)"), (" 1.5.", "1.5"),
    ],
)  # fmt: skip
def test_outputs_are_read_as_written(output, found):
    assert parse(output) == found


@pytest.mark.parametrize(
    "output, found",
    [
        (" 1) 5; 2) 9\n", [True, True]), (" 1) 5", [True, False]), (" 5; 9", [False, False]),
        (" 2) 9; 1) 5", [True, True]), (" 1) 4; 1) 5; 2) 9", [False, True]), ("", [False, False]),
        (" 1) 5; 2) 99", [True, False]), (" 1)5;2)9", [False, False]), (" 1) 5; 2) 9; 3) 1", [True, True]),
    ],
)  # fmt: skip
def test_answers_count_behind_their_own_number(output, found):
    assert right(Item(identity="", level=2, question="", answer="1) 5; 2) 9", many=True), output) == found


def test_what_cannot_be_drawn_is_named():
    task = TASKS["facts"]
    with pytest.raises(InputError, match=r"level of facts='9' is unknown\. Known: 1, 2, 3"):
        items(task, n=1, level=9, seed=0)
    with pytest.raises(InputError, match="n=0 must be at least 1"):
        items(task, n=0, level=1, seed=0)
    with pytest.raises(InputError, match=r"n=5000 exceeds the test items of facts at level 1, about \d+\."):
        items(task, n=5000, level=1, seed=0)
    with pytest.raises(InputError, match="seed=-1"):
        items(task, n=1, level=1, seed=-1)
    with pytest.raises(InputError, match="split='dev' is unknown"):
        draw(task, np.random.default_rng(0), 1, "dev")  # type: ignore[arg-type]
