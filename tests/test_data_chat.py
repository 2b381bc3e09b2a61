"""Which tokens of a conversation are trained on: counted by hand, for templates with and without generation marks."""

import dataclasses

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from jaxfw.core.errors import InputError
from jaxfw.data import encode_chat, train_bpe
from jaxfw.data.turns import assistant_spans, reached

TOKENS = {"bos_token": "<s>", "eos_token": "<|im_end|>", "pad_token": "<|im_start|>"}
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
MARKED = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}{% if m.role == 'assistant' %}{% generation %}"
    "{{ m.content + '<|im_end|>' }}{% endgeneration %}{% else %}{{ m.content + '<|im_end|>' }}{% endif %}{{ '\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LLAMA2 = (
    "{% for m in messages %}{% if m.role == 'user' %}{{ bos_token + '[INST] ' + m.content + ' [/INST]' }}"
    "{% else %}{{ ' ' + m.content + ' ' + eos_token }}{% endif %}{% endfor %}"
)
PLAIN = "{% for m in messages %}{{ m.role + ': ' + m.content + '\n\n' }}{% endfor %}"
THINKING = CHATML.replace(
    "m.content +", "('<think></think>' if loop.last and m.role == 'assistant' else '') + m.content +"
)
TOKENIZER = train_bpe(
    ["the quick brown fox", "    def f(x):\n        return x\n"] * 3, vocab_size=330, special_tokens=TOKENS
)
CONVERSATION = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "What is brown?"},
    {"role": "assistant", "content": "  the fox \n\n    def f(x):\n        return 'é😀'"},
    {"role": "user", "content": "And quick? <|im_end|>"},
    {"role": "assistant", "content": "the fox"},
    {"role": "user", "content": "Thanks"},
]


def with_template(template):
    return dataclasses.replace(TOKENIZER, chat_templates={"default": template})


def trained(template, messages=CONVERSATION):
    """The text that is trained on, by runs of tokens."""
    tokens, weights = encode_chat(with_template(template), messages)
    tokens, weights = np.asarray(tokens), np.asarray(weights)
    starts = np.flatnonzero(np.diff(weights.astype(int), prepend=0) == 1)
    ends = np.flatnonzero(np.diff(weights.astype(int), append=0) == -1) + 1
    return [TOKENIZER.decode(tokens[a:b].tolist(), skip_special_tokens=False) for a, b in zip(starts, ends)]


@pytest.mark.parametrize("template", [CHATML, MARKED])
def test_answers_with_their_end_are_trained_on(template):
    assert trained(template) == [CONVERSATION[i]["content"] + "<|im_end|>" for i in (2, 4)]


def test_marks_and_prefixes_agree_token_by_token():
    one, other = (encode_chat(with_template(template), CONVERSATION) for template in (CHATML, MARKED))
    assert list(one.tokens) == list(other.tokens)
    np.testing.assert_array_equal(one.weights, other.weights)


def test_templates_that_open_no_answer_or_end_no_turn():
    pair = [{"role": "user", "content": "brown?"}, {"role": "assistant", "content": "the fox"}]
    assert trained(LLAMA2, pair * 2) == [" the fox <|im_end|>"] * 2
    assert trained(PLAIN, pair) == ["assistant: the fox\n\n"], "without a token, the empty line is the end"


def test_a_token_over_the_border_belongs_to_the_answer():
    offsets = [(0, 2), (2, 5), (5, 5), (6, 9), (9, 10), (9, 10), (12, 14)]
    assert reached(offsets, [(4, 10)]).tolist() == [0, 1, 0, 1, 1, 1, 0]
    assert reached(offsets, [(5, 6), (12, 13)]).tolist() == [0, 0, 0, 1, 0, 0, 1]
    assert reached(offsets, []).tolist() == [0] * 7


CONTENT = st.text(st.sampled_from("ab \n\té😀<|x"), min_size=1, max_size=12)


@given(st.lists(st.tuples(CONTENT, CONTENT), min_size=1, max_size=3))
@example([("<", "   <")])
@settings(max_examples=40, deadline=None)
def test_every_character_of_an_answer_is_trained_on_and_no_other(pairs):
    messages = [
        {"role": role, "content": content} for pair in pairs for role, content in zip(("user", "assistant"), pair)
    ]
    found = trained(CHATML, messages)
    assert found == trained(MARKED, messages) and len(found) == len(pairs)
    for text, (_, answer) in zip(found, pairs):
        # A token may reach over the border: the line break before an answer, with the answer's own spaces.
        assert text in (answer + "<|im_end|>", *(["\n" + answer + "<|im_end|>"] if answer[0].isspace() else []))


def test_a_template_whose_beginnings_differ_is_refused():
    with pytest.raises(InputError, match=r"'default' has no generation marks.*first 3 messages is not how the whole"):
        trained(THINKING)
    assert trained(THINKING, CONVERSATION[:3])[0].startswith("<think></think>"), "what the model must say itself"
    last_first = "{% for m in messages | reverse %}" + CHATML[CHATML.index("%}") + 2 :]
    with pytest.raises(InputError, match="is not how the whole begins"):
        trained(last_first)


@pytest.mark.parametrize(
    "template, messages, message",
    [
        (CHATML, CONVERSATION[2:], r"messages\[0\] is the assistant's"),
        (CHATML, [], "messages is empty"),
        (CHATML, [{"role": "user"}], r"messages\[0\]\['content'\]=None"),
        (MARKED, [*CONVERSATION[:2], {"role": "assistant", "content": "a\ufdd0b"}], "between its generation marks"),
        (CHATML, [*CONVERSATION[:2], {"role": "assistant", "content": "a\ud800b"}], "lone surrogates"),
        ("{{ raise_exception('no') }}", CONVERSATION, "cannot render these messages: no"),
    ],
)
def test_wrong_conversations_are_named(template, messages, message):
    with pytest.raises(InputError, match=message):
        encode_chat(with_template(template), messages)


def test_spans_are_of_the_text():
    text, spans = assistant_spans(with_template(CHATML), CONVERSATION)
    assert [text[a:b] for a, b in spans] == [CONVERSATION[i]["content"] + "<|im_end|>" for i in (2, 4)]
    assert text == with_template(CHATML).render_chat(CONVERSATION, add_generation_prompt=False)
