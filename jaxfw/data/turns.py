"""A conversation as tokens, and which of them to train on: those that the assistant said, with the end of its turn.

Where a chat template marks them (`{% generation %} ... {% endgeneration %}`), its marks are followed. Most templates of
the Hub do not. Then turn i lies between the text of the messages before it, with the opening of an answer
(`add_generation_prompt`), and the text of the messages up to it; both must be beginnings of the whole text, or the
template is refused. Space between the end-of-turn token and the next message is not the assistant's.

The whole text is tokenised once, as the model will see it; a token that reaches into a turn belongs to it.
"""

import dataclasses
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from jaxfw.core.errors import InputError
from jaxfw.core.shapes import Int
from jaxfw.data import chat
from jaxfw.data.corpus import Document
from jaxfw.data.tokenizer import Tokenizer

REMEDY = (
    "Mark what the assistant says with {% generation %} ... {% endgeneration %} in chat_template.jinja beside "
    "tokenizer.json"
)
Span = tuple[int, int]


def encode_chat(
    tokenizer: Tokenizer,
    messages: Sequence[chat.Message],
    *,
    tools: Sequence[Mapping[str, Any]] | None = None,
) -> Document:
    """Token ids of a conversation, and weights: 1 for the assistant's, 0 for the others.

    Raises:
        InputError: malformed messages, a template that cannot render them, or one whose turns cannot be found.
    """
    text, spans = assistant_spans(tokenizer, messages, tools=tools)
    try:
        encoding = tokenizer.backend.encode(text, add_special_tokens=False)
    except TypeError:
        raise InputError("messages hold lone surrogates, which are no characters: replace them.") from None
    return Document(encoding.ids, reached(encoding.offsets, spans))


def assistant_spans(
    tokenizer: Tokenizer,
    messages: Sequence[chat.Message],
    *,
    tools: Sequence[Mapping[str, Any]] | None = None,
) -> tuple[str, list[Span]]:
    """The conversation's text, and where in it the assistant's turns begin and end (characters)."""
    chat.check(messages)
    name, template = chat.choose(tokenizer.chat_templates, has_tools=tools is not None)
    values: dict[str, Any] = {"name": name, "special_tokens": tokenizer.special_tokens, "tools": tools}
    text = chat.render(template, messages, **values)
    if chat.marks_answers(template):
        marked, spans = chat.render_marked(template, messages, **values)
        if marked != text:
            raise InputError(f"chat template {name!r} changes what stands between its generation marks: {REMEDY} only.")
        return text, spans
    return text, list(_turns(_Prefixes(template, text, values), messages, _special_texts(tokenizer)))


def reached(offsets: Iterable[Span], spans: Sequence[Span]) -> Int[np.ndarray, "T"]:
    """1 for the tokens that reach into one of the spans; offsets are of characters.

    Tokenizers leave out spaces at the borders of tokens from their offsets: what lies behind one token and before the
    end of the next belongs to that.
    """
    inside, span, covered = [], 0, 0
    for first, end in offsets:
        first = min(first, covered)
        while span < len(spans) and spans[span][1] <= first:
            span += 1
        inside.append(span < len(spans) and end > spans[span][0] and end > first)
        covered = max(covered, end)
    return np.array(inside, np.uint8)


@dataclasses.dataclass(frozen=True)
class _Prefixes:
    """A conversation's text, and how long the text of its first messages is, which must be how the whole begins."""

    template: str
    text: str
    values: dict[str, Any]

    def length(self, messages: Sequence[chat.Message], **how: Any) -> int:
        part = chat.render(self.template, messages, **self.values | how)
        if self.text.startswith(part):
            return len(part)
        pairs = enumerate(zip(self.text, part))
        at = next((i for i, (a, b) in pairs if a != b), min(len(self.text), len(part)))
        there, here = self.text[at : at + 30], part[at : at + 30]
        what = f"is not how the whole begins (character {at}: {there!r} in the whole, {here!r} in the part)"
        raise _refusal(self.values["name"], len(messages), what)


def _turns(prefixes: _Prefixes, messages: Sequence[chat.Message], special: Sequence[str]) -> Iterator[Span]:
    for i, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        if i == 0:
            raise InputError("messages[0] is the assistant's, and nothing asks for it: begin with another message.")
        start = prefixes.length(messages[:i], add_generation_prompt=True)
        end = prefixes.length(messages[: i + 1])
        if end < start:
            raise _refusal(prefixes.values["name"], i + 1, "ends before the opening of the answer")
        turn = prefixes.text[start:end]
        stripped = turn.rstrip()
        ends_by_token = any(stripped.endswith(token) for token in special)
        yield start, start + len(stripped if ends_by_token else turn)


def _special_texts(tokenizer: Tokenizer) -> list[str]:
    return [token.content for token in tokenizer.backend.get_added_tokens_decoder().values() if token.content]


def _refusal(name: str, count: int, what: str) -> InputError:
    return InputError(
        f"chat template {name!r} has no generation marks, and the text of the first {count} messages {what}: where the "
        f"assistant's turns lie cannot be told. {REMEDY}, or split the conversation so that its one answer comes last."
    )
