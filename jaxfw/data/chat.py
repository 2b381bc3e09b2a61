"""A conversation as the text that a model was trained on: the chat templates of the Hub, rendered in a sandbox.

A template is a program that somebody else wrote. It runs in jinja2's immutable sandbox, sees a copy of the messages
made of plain JSON values, and has the functions that templates of the Hub rely on, as transformers gives them:
`raise_exception`, `strftime_now`, `tojson` without HTML escapes, `break`/`continue`, and `{% generation %}` blocks,
which render what they hold.
"""

import functools
import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import datetime
from functools import partial
from typing import Any

from jaxfw.core.errors import InputError

REMEDY = "Put one that works into chat_template.jinja beside tokenizer.json; it is used first."

OPEN, CLOSE = "\ufdd0", "\ufdd1"  # noncharacters: Unicode keeps them for use inside a program

Message = Mapping[str, Any]


def choose(templates: Mapping[str, str], *, has_tools: bool) -> tuple[str, str]:
    """The name and text of the template to use: `tool_use` where there are tools and it exists, else `default`."""
    if not templates:
        raise InputError(
            "this tokenizer has no chat template: it belongs to a model that was not trained on conversations. "
            "Use generate() with plain text, or write a chat_template.jinja beside tokenizer.json."
        )
    name = "tool_use" if has_tools and "tool_use" in templates else "default"
    if name not in templates:
        raise InputError(f"no chat template is named 'default'; there are: {', '.join(templates)}. {REMEDY}")
    return name, templates[name]


def render(
    template: str,
    messages: Sequence[Message],
    *,
    name: str = "default",
    special_tokens: Mapping[str, str] | None = None,
    add_generation_prompt: bool = False,
    tools: Sequence[Mapping[str, Any]] | None = None,
) -> str:
    """One conversation as text.

    Args:
        template: the template's source.
        messages: each with `role` and `content`, and whatever else the template reads.
        name: what errors call the template.
        special_tokens: `bos_token`, `eos_token` and the like, by these names.
        add_generation_prompt: end with the opening of the assistant's answer.
        tools: JSON schemas of functions that the model may call.

    Raises:
        InputError: a malformed message; a template that is broken, forbids this conversation or oversteps the sandbox.

    >>> render("{% for m in messages %}{{ m.role }}: {{ m.content }}.{% endfor %}", [{"role": "user", "content": "Hi"}])
    'user: Hi.'
    """
    return _render(partial(_compiled, template), messages, name, special_tokens, add_generation_prompt, tools)


def marks_answers(template: str) -> bool:
    """Whether the template says by `{% generation %}` which words a model is trained on."""
    return bool(re.search(r"\{%[-+]?\s*generation\b", template))


def render_marked(
    template: str,
    messages: Sequence[Message],
    *,
    name: str = "default",
    special_tokens: Mapping[str, str] | None = None,
    tools: Sequence[Mapping[str, Any]] | None = None,
) -> tuple[str, list[tuple[int, int]]]:
    """A conversation as text, and the spans of characters that the template's `{% generation %}` blocks hold.

    >>> template = "{% for m in messages %}{{ m.role }}: {% generation %}{{ m.content }}{% endgeneration %}{% endfor %}"
    >>> render_marked(template, [{"role": "assistant", "content": "Hi"}])
    ('assistant: Hi', [(11, 13)])
    """
    text = _render(partial(_compiled, template, marks=True), messages, name, special_tokens, False, tools)
    pieces, spans = re.split(f"([{OPEN}{CLOSE}])", text), []
    length, opened = 0, None
    for piece in pieces:
        if piece == OPEN:
            opened = length
        elif piece == CLOSE and opened is not None:
            spans.append((opened, length))
        elif piece != CLOSE:
            length += len(piece)
    return "".join(piece for piece in pieces if piece not in (OPEN, CLOSE)), spans


def _render(
    compiled: Callable[[], Any],
    messages: Sequence[Message],
    name: str,
    special_tokens: Mapping[str, str] | None,
    add_generation_prompt: bool,
    tools: Sequence[Mapping[str, Any]] | None,
) -> str:
    check(messages)
    values = {
        **(special_tokens or {}),
        "messages": [_plain(_without_none(message), f"messages[{i}]") for i, message in enumerate(messages)],
        "tools": None if tools is None else [_plain(tool, f"tools[{i}]") for i, tool in enumerate(tools)],
        "documents": None,
        "add_generation_prompt": add_generation_prompt,
    }
    try:
        return compiled().render(values)
    except Exception as error:  # a template is a program: it can raise anything
        raise _refusal(name, error) from None


def _refusal(name: str, error: Exception) -> InputError:
    from jinja2.exceptions import SecurityError, TemplateError, TemplateSyntaxError

    what, reason = f"chat template {name!r}", str(error).rstrip(".")
    if isinstance(error, TemplateSyntaxError):
        return InputError(f"{what} is not valid Jinja, line {error.lineno}: {reason}. {REMEDY}")
    if isinstance(error, SecurityError):
        return InputError(
            f"{what} was stopped: {reason}. It reaches for what a template has no business with; do not trust the "
            f"repository that it came from. {REMEDY}"
        )
    kind = "" if type(error) is TemplateError else f"{type(error).__name__}: "
    return InputError(
        f"{what} cannot render these messages: {kind}{reason}. Change the messages as it asks, or change the "
        f"template: {REMEDY}"
    )


def check(messages: Sequence[Message]) -> None:
    """Raise an `InputError` that names the first message without a role or content."""
    if isinstance(messages, str | Mapping) or not isinstance(messages, Sequence):
        raise InputError(f"messages={messages!r} must be a list of {{'role': ..., 'content': ...}}.")
    if not messages:
        raise InputError("messages is empty: give at least one {'role': 'user', 'content': ...}.")
    for i, message in enumerate(messages):
        if not isinstance(message, Mapping):
            raise InputError(f"messages[{i}]={message!r} must be a mapping with 'role' and 'content'.")
        role, content = message.get("role"), message.get("content")
        if not isinstance(role, str) or not role:
            raise InputError(f"messages[{i}]['role']={role!r} must be a text such as 'user' or 'assistant'.")
        # A message that only calls tools has nothing to say.
        if content is None and message.get("tool_calls"):
            continue
        if not isinstance(content, str | list | tuple):
            raise InputError(
                f"messages[{i}]['content']={content!r} must be a text (or a list of parts, where the template reads "
                "those)."
            )


def _without_none(message: Message) -> dict[str, Any]:
    """Interfaces that always send `tool_calls` or `content` send None; templates ask whether the key is there."""
    return {key: value for key, value in message.items() if value is not None}


def _plain(value: Mapping[str, Any], name: str) -> dict[str, Any]:
    """A copy in plain JSON values: rich objects have methods that a sandbox lets pass."""
    if not isinstance(value, Mapping):
        raise InputError(f"{name}={value!r} must be a mapping; a tool is given as its JSON schema.")
    try:
        return json.loads(json.dumps(dict(value)))
    except (TypeError, ValueError) as error:
        raise InputError(f"{name} holds what JSON cannot ({error}): give texts, numbers, lists and mappings.") from None


@functools.lru_cache(maxsize=32)
def _compiled(template: str, marks: bool = False):
    return _environment(marks).from_string(template)


@functools.cache
def _environment(marks: bool):
    from jinja2 import TemplateError, nodes
    from jinja2.ext import Extension, loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """`{% generation %} ... {% endgeneration %}` holds words to train on: shown, and marked if asked for."""

        tags = {"generation"}  # noqa: RUF012  (jinja2 declares it as a set)

        def parse(self, parser):
            line = next(parser.stream).lineno
            held = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            if marks:
                opening, closing = (nodes.Output([nodes.TemplateData(mark)], lineno=line) for mark in (OPEN, CLOSE))
                held = [opening, *held, closing]
            return nodes.Scope(held, lineno=line)

    def raise_exception(message: str):
        raise TemplateError(message)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = lambda format: datetime.now().strftime(format)
    return environment


def _to_json(value, ensure_ascii=False, indent=None, separators: Iterable[str] | None = None, sort_keys=False) -> str:
    pair = None if separators is None else tuple(separators)
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=pair, sort_keys=sort_keys)  # type: ignore[arg-type]
