"""What the embedded model reads: whole lessons, nothing of the test side, tokens as an evaluation makes them."""

import json
import re

import jax
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from configs import embedded as config
from experiments.embedded import EMBEDDING_STD, EmbeddedConfig, LessonShares, batches, fresh, lessons
from experiments.embedded.lessons import CHAT_TEMPLATE, STATEMENTS, Lessons, encode, known_person, solved
from jaxfw.core.config import to_dataclass
from jaxfw.data import train_bpe
from jaxfw.evals import TASKS, draw, items, side, world
from jaxfw.evals.shots import few_shot
from jaxfw.evals.tasks.knowledge import QUESTIONS
from jaxfw.evals.tasks.safety import FRAMES
from jaxfw.launch import main
from jaxfw.models import DecoderConfig

TEXTS = [text for name in TASKS for seed in range(30) for text, _ in solved(np.random.default_rng(seed), name)]
TOKENIZER = train_bpe(TEXTS, vocab_size=500, single_digits=True, chat_template=CHAT_TEMPLATE)


@pytest.fixture(scope="module")
def stream():
    """Texts of many lessons."""
    shares = {name: 1.0 for name in (*TASKS, STATEMENTS)}
    drawn = Lessons(TOKENIZER, shares, 1000)
    return [TOKENIZER.decode(drawn(np.random.default_rng(seed))[0]) for seed in range(3000)]


@pytest.mark.parametrize("name", TASKS)
def test_no_test_item_is_in_the_stream(stream, name):
    """Exactly, as a prompt with its answer, whatever stands around it."""
    joined = "\n".join(stream)
    task = TASKS[name]
    for level in task.levels:
        for item in items(task, n=100, level=level, seed=1):
            question = f"Q: {item.question}\nA:"
            where = joined.find(f"{item.context}{question}{item.target}")
            assert where < 0, item


def test_held_out_wordings_and_chains_are_never_asked(stream):
    """By template: no question of the stream has an identity of the test side."""
    asked = {line.removeprefix("Q: ") for text in stream for line in text.splitlines() if line.startswith("Q: ")}
    found = 0
    for relation in ("home", "trade", "instrument", "superior"):
        for person in world.people():
            for wording, question in enumerate(QUESTIONS[relation]):
                if question.format(person) in asked:
                    found += 1
                    assert side(f"facts {relation} {person} {wording}") == "train"
    assert found > 200
    chains = 0
    for person in world.people()[: world.PEOPLE // world.FAME_GROUPS]:
        for level in TASKS["composition"].levels:
            for last in ("home", "trade", "instrument"):
                of = "the boss of " * (level - 1) + person
                if any(question.format(of) in asked for question in QUESTIONS[last]):
                    chains += 1
                    assert side(f"composition {last} {level} {person}") == "train"
    assert chains > 100


def test_held_out_pairs_and_nouns_are_never_answered(stream):
    """By template too: what retrieval looks up, what the rule is about, which verb with which object is requested."""
    joined = "\n".join(stream)
    looked_up = re.findall(r"A: The (\w+) (\w+) =>", joined)
    ruled = re.findall(r"Q: (\w+)\nA: \1 \w+\n", joined)
    frames = "|".join(re.escape(frame).replace(r"\{0\}", r"(\w+)").replace(r"\{1\}", r"my (\w+)") for frame in FRAMES)
    requests = [tuple(filter(None, found)) for found in re.findall(f"Q: (?:{frames})\n", joined)]
    assert min(len(looked_up), len(ruled), len(requests)) > 100
    assert all(side(f"retrieval {name} {animal}") == "train" for name, animal in looked_up)
    assert all(side(f"rule {noun}") == "train" for noun in ruled)
    assert all(side(f"safety {verb} {noun}") == "train" for verb, noun in requests)


def test_tokens_of_a_lesson_are_those_of_the_prompt_and_its_answer():
    for name, task in TASKS.items():
        item = items(task, n=1, level=task.standard, seed=0)[0]
        shots = items(task, n=2, level=task.standard, seed=3, split="train")
        prompt = few_shot(item, shots)
        tokens, weights = encode(TOKENIZER, [(prompt.text, 0.1), (item.target, 1.0)])
        assert [TOKENIZER.bos_id, *tokens[1:-1]] == TOKENIZER.encode(prompt.text + item.target), name
        assert tokens[: len(TOKENIZER.encode(prompt.text))].tolist() == TOKENIZER.encode(prompt.text), name
        assert weights[0] == 0 and (weights == 1).sum() == len(tokens) - 1 - len(TOKENIZER.encode(prompt.text))


def test_a_conversation_is_a_prompt_with_its_shots():
    one, other, asked = items(TASKS["facts"], n=3, level=1, seed=0)
    messages = [{"role": "user", "content": one.question}, {"role": "assistant", "content": one.answer},
                {"role": "user", "content": other.question}, {"role": "assistant", "content": other.answer},
                {"role": "user", "content": asked.question}]  # fmt: skip
    assert TOKENIZER.encode(TOKENIZER.render_chat(messages), add_special_tokens=False) == TOKENIZER.encode(
        few_shot(asked, [one, other]).text
    )
    item = items(TASKS["retrieval"], n=1, level=8, seed=0)[0]
    messages = [{"role": "system", "content": item.context.strip()}, {"role": "user", "content": item.question}]
    assert TOKENIZER.render_chat(messages) == TOKENIZER.special_tokens["bos_token"] + item.prompt


def test_shots_and_levels_and_statements_all_come_up():
    pieces = [solved(np.random.default_rng(seed), "facts") for seed in range(200)]
    assert {len(found) // 2 for found in pieces} == {1, 2, 3, 4, 5}
    told = {text for seed in range(2000) for text, _ in known_person(np.random.default_rng(seed))}
    assert sum(" lies in " in text for text in told) >= world.TOWNS - 2
    assert sum(text.count(".") == 4 for text in told) > 500


def test_some_hardest_levels_are_beyond_every_lesson(monkeypatch):
    drawn: dict[str, set[int]] = {}

    def recorded(task, rng, level, split):
        drawn.setdefault(task.name, set()).add(level)
        return draw(task, rng, level, split)

    monkeypatch.setattr(lessons, "draw", recorded)
    for name, task in TASKS.items():
        for seed in range(150):
            lessons.solved(np.random.default_rng(seed), name)
        assert drawn[name] == set(task.levels) - {lessons.BEYOND.get(name)}
        assert lessons.BEYOND.get(name, task.levels[-1]) == task.levels[-1]


def test_of_a_rule_what_could_be_known_is_learned():
    for seed in range(50):
        pieces = solved(np.random.default_rng(seed), "rule")
        answers = [answer for (who, _), answer in zip(pieces[::2], pieces[1::2], strict=True) if who == "A:"]
        labels = [text.split()[1] for text, _ in answers]
        assert [weight for _, weight in answers] == [float(label in labels[:i]) for i, label in enumerate(labels)]


def test_numbers_are_read_digit_by_digit():
    ids = TOKENIZER.encode(" 4711", add_special_tokens=False)
    assert [TOKENIZER.decode([id_]) for id_ in ids][-4:] == ["4", "7", "1", "1"] and TOKENIZER.decode(ids) == " 4711"


def test_the_first_parameters_are_large_where_tokens_come_in_and_small_where_layers_go_out():
    c = config.get_config("smoke")
    model = to_dataclass(DecoderConfig, c.model)
    flat = {"/".join(path): float(x.std()) for path, x in flatten_dict(fresh(model, jax.random.key(0))).items()}
    assert flat["embed/embedding"] == pytest.approx(EMBEDDING_STD, rel=0.05)
    assert flat["layers_0/attn/o/kernel"] == pytest.approx(0.5 * flat["layers_0/attn/q/kernel"], rel=0.2)


def test_a_stage_trains_measures_and_goes_on_into_the_next(tmp_path, capsys):
    first, second = tmp_path / "one", tmp_path / "two"
    assert main(["launch", "--config=configs/embedded.py:smoke", f"--workdir={first}"]) == 0
    rows = json.loads((first / "results.json").read_text())["metrics"]["abilities"]
    assert [row["task"] for row in rows] == list(TASKS)[:7] and all(row["n"] == 4 for row in rows)
    words = ["launch", "--config=configs/embedded.py:smoke,stage=2", f"--config.init={first}", f"--workdir={second}"]
    assert main(words) == 0
    capsys.readouterr()
    third = [
        "launch",
        "--config=configs/embedded.py:smoke,stage=2",
        f"--config.init={first}",
        "--config.model.layers=1",
    ]
    assert main([*third, f"--workdir={tmp_path / 'three'}"]) == 2
    assert "holds another model than config.model" in capsys.readouterr().err
    names = [(folder / "model" / "tokenizer.json").read_bytes() for folder in (first, second)]
    assert names[0] == names[1]


@pytest.mark.parametrize(
    "words, message",
    [
        (["--config.train.steps=0"], "train.steps=0 must be at least 1"),
        (["--config.train.length=5000"], "train.length=5000 exceeds model.positions=1280"),
        (["--config.train.length=4"], "train.length=4 holds none of"),
    ],
)
def test_what_cannot_be_trained_is_named(tmp_path, capsys, words, message):
    assert main(["launch", "--config=configs/embedded.py:smoke", f"--workdir={tmp_path / 'run'}", *words]) == 2
    assert message in capsys.readouterr().err


def test_rows_come_from_all_sources():
    c = to_dataclass(EmbeddedConfig, config.get_config("smoke"))
    source = batches(c, TOKENIZER)
    assert source(1)["tokens"].shape == (c.train.batch, c.train.length + 1)
    assert {source.place(number)[0] for number in range(40)} == {0, 1, 2, 3}
    assert {*vars(c.lessons)} == {*TASKS, STATEMENTS} == {*LessonShares.__dataclass_fields__}
