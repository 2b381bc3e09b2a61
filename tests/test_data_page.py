"""What stands on the page docs/data.md runs, word for word."""

import json
import re
from pathlib import Path

import numpy as np
import pytest

from jaxfw.data import save_tokenizer, stdlib_docstrings, train_bpe
from jaxfw.data.__main__ import OK, main

PAGE = (Path(__file__).parents[1] / "docs" / "data.md").read_text(encoding="utf-8")
FIRST, OWN = re.findall(r"```python\n(.*?)```", PAGE, flags=re.S)
COMMANDS = [line.split("#")[0] for line in PAGE.splitlines() if line.startswith("python -m jaxfw.data")]


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A folder with the page's files."""
    pytest.importorskip("datasets")
    monkeypatch.chdir(tmp_path)
    texts = stdlib_docstrings(most=200)
    save_tokenizer("MODEL_DIR", train_bpe(texts, vocab_size=300))
    Path("stories").mkdir()
    Path("stories/a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))


def run(code):
    names = {}
    exec(compile(code, "docs/data.md", "exec"), names)
    return names


def test_the_first_example_runs(here):
    names = run(FIRST)
    assert {name: x.shape for name, x in names["batch"].items()} == {"tokens": (8, 513), "segment_ids": (8, 513)}
    assert len(names["held_out"]) == 10 and len(names["trained"]) == 190


def test_the_commands_run(here):
    assert [command.split()[3] for command in COMMANDS] == ["prepare", "inspect", "verify"]
    for command in COMMANDS:
        words = re.sub(r"\[.*?\]|'", "", command).split()[3:]
        assert main(words) == OK, command


def test_the_source_of_ten_lines_gives_sums():
    source = run(OWN)["source"]
    assert len(re.search(r"def sums.*?\n\n", OWN, flags=re.S)[0].strip().splitlines()) <= 10
    batch = source(3)
    assert batch["tokens"].shape == (4, 65) and source.describe()["generate"] == "sums"
    tokens, segments, weights = (batch[name][1] for name in ("tokens", "segment_ids", "weights"))
    for segment in range(1, segments.max()):
        said, trained = tokens[segments == segment], weights[segments == segment]
        text = "".join("0123456789+="[token] for token in said)
        asked, answer = text.split("=")
        assert sum(map(int, asked.split("+"))) == int(answer)
        np.testing.assert_array_equal(trained, np.arange(len(said)) > len(asked))


def test_the_page_names_what_exists():
    import jaxfw.data

    for name in re.findall(r"`(?:jaxfw\.data\.)?([A-Z][A-Za-z]+)(?:\(|`)", PAGE):
        assert hasattr(jaxfw.data, name), name
