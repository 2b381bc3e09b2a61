"""Stop strings: against brute force over characters, however a text is cut; held back text; stop ids beside them."""

import itertools

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from jaxfw.core.errors import InputError
from jaxfw.data import train_bpe
from jaxfw.data.tokenizer import Tokenizer
from jaxfw.generate.stopping import RowText, StopStrings, check_stop

BRUTE = settings(deadline=None, max_examples=300, derandomize=True)
TEXTS = st.text("ab\n", max_size=30)
STRINGS = st.lists(st.text("ab\n", min_size=1, max_size=4), max_size=3)
CUTS = st.lists(st.integers(0, 30), max_size=8)
FIELDS = ("backend", "special_tokens", "chat_templates", "files")
TOKENIZER = train_bpe(["User: hello User: world\n\n" * 20, "é ü — 字"], vocab_size=300)


def by_hand(text, strings):
    """The text before the stop string that is complete first, the longest of those; and whether there is one."""
    for end in range(1, len(text) + 1):
        found = [len(stop) for stop in strings if text[:end].endswith(stop)]
        if found:
            return text[: end - max(found)], True
    return text, False


def pieces(text, cuts):
    edges = [0, *sorted(min(cut, len(text)) for cut in cuts), len(text)]
    return [text[i:j] for i, j in itertools.pairwise(edges)]


@BRUTE
@given(TEXTS, STRINGS, CUTS)
@example("abb", ["abb", "bb"], [1, 2])
@example("xabab", ["ababb", "bab"], [3])
@example("aab", ["ab"], [1, 2])
def test_a_text_ends_where_brute_force_ends_it_however_it_is_cut(text, strings, cuts):
    stop = StopStrings(strings)
    told = [stop.push(piece) for piece in pieces(text, cuts)] + [stop.finish()]
    assert ("".join(told), stop.is_done) == by_hand(text, strings)


@BRUTE
@given(TEXTS, STRINGS)
def test_no_more_is_held_back_than_may_become_a_stop_string(text, strings):
    stop, told = StopStrings(strings), ""
    for i, character in enumerate(text):
        told += stop.push(character)
        if stop.is_done:
            break
        held = text[len(told) : i + 1]
        assert told + held == text[: i + 1]
        assert not held or any(one.startswith(held) for one in strings)


def test_what_comes_behind_the_end_is_dropped():
    stop = StopStrings(["b"])
    assert [stop.push("ab"), stop.push("cd"), stop.finish()] == ["a", "", ""] and stop.is_done


def test_work_grows_with_the_text_not_with_its_square():
    """Counted in ids that are decoded: each token looks back at a few, not at all before it."""

    class Counting(Tokenizer):
        def decode(self, ids, **options):
            decoded.append(len(ids))
            return super().decode(ids, **options)

    ids, decoded = TOKENIZER.encode("hello world " * 200, add_special_tokens=False), []
    row = RowText(Counting(*(getattr(TOKENIZER, x) for x in FIELDS)), (), (), ["\n\nUser:"])
    row.push(ids)
    assert row.text == TOKENIZER.decode(ids) and sum(decoded) < 4 * len(ids)


def row_of(text, chunks, *, strings=(), stop_ids=()):
    ids = TOKENIZER.encode(text, add_special_tokens=False)
    row, told = RowText(TOKENIZER, (), stop_ids, strings), []
    for start in range(0, len(ids), chunks):
        told.append(row.push(ids[start : start + chunks]))
    told.append(row.finish())
    assert "".join(told) == row.text
    return row, ids


@pytest.mark.parametrize("chunks", [1, 2, 5, 100])
def test_a_row_ends_at_one_token_whatever_the_chunks(chunks):
    text = "hello é world\n\nUser: hello"
    row, ids = row_of(text, chunks, strings=["\n\nUs"])
    assert row.is_done and row.text == "hello é world" and row.tokens == ids[: len(row.tokens)]
    assert "\n\nUs" in TOKENIZER.decode(row.tokens) and "\n\nUs" not in TOKENIZER.decode(row.tokens[:-1])


@pytest.mark.parametrize("chunks", [1, 3, 100])
def test_a_stop_id_before_a_stop_string_lets_what_was_held_back_out(chunks):
    ids = TOKENIZER.encode("world\n\nUser", add_special_tokens=False)
    stop_id = TOKENIZER.encode("User", add_special_tokens=False)[-1]
    row, told = RowText(TOKENIZER, (), (stop_id,), ["\n\nUser:"]), ""
    for start in range(0, len(ids), chunks):
        told += row.push([*ids, 5, 6][start : start + chunks])
    assert row.is_done and row.tokens[-1] == stop_id == ids[len(row.tokens) - 1]
    assert told == row.text == TOKENIZER.decode(row.tokens[:-1]) and row.finish() == ""


def test_without_stops_a_row_is_its_text():
    row, ids = row_of("é ü — 字 hello", 2)
    assert (row.text, row.tokens, row.is_done) == ("é ü — 字 hello", ids, False)
    assert row.push([-1, -1]) == "", "rows that are done elsewhere"


@pytest.mark.parametrize(
    ("stop", "expected"), [((), ()), ("a", ("a",)), (["a", "b", "a"], ("a", "b")), (("a",), ("a",))]
)
def test_stop_strings_in_every_form(stop, expected):
    assert check_stop(stop) == expected


@pytest.mark.parametrize(
    ("stop", "message"),
    [(3, "stop=3 must be a text"), ([3], r"stop=\[3\] must be a text"), (None, "stop=None must be"),
     ({"a"}, "must be a text or a list"), ("", "empty text"), (["a", ""], "holds an empty text")],
)  # fmt: skip
def test_what_is_no_stop_string_is_refused(stop, message):
    with pytest.raises(InputError, match=message):
        check_stop(stop)
