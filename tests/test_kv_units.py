"""Where the units of a text lie; texts without any are refused where whole units are to stay."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxfw.core.errors import InputError
from jaxfw.generate.compression import reading
from jaxfw.kv import parse
from jaxfw.kv.units import SEGMENTERS, blocks, lines, sentences


@pytest.mark.parametrize(
    ("segment", "text", "pieces"),
    [
        (blocks, "Q: 1\nA: 2\n\nQ: 3\nA: 4\n\nQ: 5", ["Q: 1\nA: 2\n\n", "Q: 3\nA: 4\n\n"]),
        (blocks, "one\n \t\n\n\n  two\n\nthree", ["one\n \t\n\n\n  ", "two\n\n"]),
        (blocks, "\n\none\n\n", ["one\n\n"]),
        (blocks, "one\ntwo", []),
        (lines, "one\n\n\ntwo\nthree", ["one\n\n\n", "two\n"]),
        (lines, "\n \none\n", ["one\n"]),
        (lines, "", []),
        (sentences, 'He said "no!" Then? Yes... And 3.5 of it', ['He said "no!" ', "Then? ", "Yes... "]),
        (sentences, "One line\nTwo. Three.", ["One line\n", "Two. "]),
    ],
)
def test_texts_are_cut_where_a_separator_ends(segment, text, pieces):
    assert [text[begin:end] for begin, end in segment(text)] == pieces


@given(name=st.sampled_from(sorted(SEGMENTERS)), text=st.text("ab.? \t\n", max_size=20))
def test_spans_stand_in_order_and_hold_something(name, text):
    cut, before = SEGMENTERS[name], 0
    for begin, end in cut(text):
        assert before <= begin < end <= len(text)
        assert text[begin:end].strip()
        assert not text[before:begin].strip()
        before = end
    assert cut(text[before:]) == ()  # the question is in no unit


def test_a_text_without_units_is_refused_by_what_chooses_among_them():
    with pytest.raises(InputError, match=r"the text 'one line' has no blocks that end.*take units=lines or sentences"):
        parse("shotkv@keep=0.5").spans("one line")
    assert parse("snapkv@keep=0.5").spans("one line") == ()


def test_a_question_without_a_context_is_refused():
    with pytest.raises(InputError, match=r"protocol='ctx' compresses what stands up to .*, and prompt 1 has none"):
        reading("ctx", [[0, 0, -1], [-1, -1]])
