"""Where a text ends: stop ids and stop strings, found as tokens come, whatever the chunks that they come in."""

from collections.abc import Collection, Iterable, Sequence

from jaxfw.core.errors import InputError
from jaxfw.data.tokenizer import TextStream, Tokenizer


class StopStrings:
    r"""Text that passes through until a stop string is complete; it ends before the first that is.

    What may still become a stop string is held back. The pieces of `push`, and `finish` last, join to the text. Of two
    that are complete with the same character the longer one counts. Each character is looked at once, and at most as
    many before it as the longest stop string has.

    >>> stop = StopStrings(["\n\n", "User:"])
    >>> [stop.push(piece) for piece in ("Yes.\nUs", "ers", " do.\n", "User: and")], stop.is_done
    (['Yes.\n', 'Users', ' do.', '\n'], True)
    """

    def __init__(self, strings: Sequence[str]):
        self._strings, self._held, self.is_done = tuple(strings), "", False

    def push(self, piece: str) -> str:
        """Take a piece; the text that is now certain, often ''."""
        if self.is_done or not piece:
            return ""
        text = self._held + piece
        found = [(start + len(stop), start) for stop in self._strings if (start := text.find(stop)) >= 0]
        if found:
            self.is_done, self._held = True, ""
            return text[: min(found)[1]]
        held = self._open(text)
        self._held = text[len(text) - held :]
        return text[: len(text) - held]

    def finish(self) -> str:
        """What was held back."""
        held, self._held = self._held, ""
        return held

    def _open(self, text: str) -> int:
        """How many characters at the end may be the beginning of a stop string."""
        longest = max(map(len, self._strings), default=1) - 1
        sizes = range(min(longest, len(text)), 0, -1)
        return next((n for n in sizes if any(stop.startswith(text[-n:]) for stop in self._strings)), 0)


class RowText:
    """One row's text as its tokens come.

    It ends before a stop id or a stop string, and then `is_done`; the last of `tokens` is the one that ended it. The
    pieces of `push`, and `finish` last, join to `text`.
    """

    def __init__(self, tokenizer: Tokenizer, before: Sequence[int], stop_ids: Collection[int], strings: Sequence[str]):
        self._stream, self._stop_ids, self._strings = TextStream(tokenizer, before), stop_ids, StopStrings(strings)
        self._one_by_one = bool(strings)  # a string may be complete with any token, and the next are none of ours
        self.tokens: list[int] = []
        self.text, self.is_done = "", False

    def push(self, ids: Iterable[int]) -> str:
        """Take further ids, -1 for none; the text that is now certain."""
        before, waiting = len(self.text), []
        for id_ in ids:
            if self.is_done or id_ < 0:
                break
            self.tokens.append(id_)
            if id_ in self._stop_ids:
                self._add(self._stream.push(waiting))
                self.finish()
                self.is_done, waiting = True, []
            else:
                waiting.append(id_)
            if self._one_by_one and waiting:
                self._add(self._stream.push(waiting))
                waiting = []
        if waiting:
            self._add(self._stream.push(waiting))
        return self.text[before:]

    def finish(self) -> str:
        """No more tokens: what was held back."""
        before = len(self.text)
        self._add(self._stream.finish())
        self.text += self._strings.finish()
        return self.text[before:]

    def _add(self, piece: str) -> None:
        self.text += self._strings.push(piece)
        self.is_done = self.is_done or self._strings.is_done


def check_stop(stop: str | Sequence[str]) -> tuple[str, ...]:
    """Stop strings as a tuple; one alone may be given as it is.

    Raises:
        InputError: not texts, or an empty one.

    >>> check_stop("###")
    ('###',)
    """
    strings = (stop,) if isinstance(stop, str) else stop
    if not isinstance(strings, list | tuple) or not all(isinstance(text, str) for text in strings):
        raise InputError(f"stop={stop!r:.80} must be a text or a list of texts; ids that stop are LM.stop_ids.")
    if not all(strings):
        raise InputError(f"stop={stop!r:.80} holds an empty text, which is everywhere: leave it out.")
    return tuple(dict.fromkeys(strings))
