"""Documents to tokens: in memory, or into a folder that later runs map."""

import dataclasses
import hashlib
import itertools
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from jaxfw.core.errors import InputError
from jaxfw.data.corpus import Corpus, Document
from jaxfw.data.documents import Documents, find_documents
from jaxfw.data.token_file import is_token_file, open_tokens, write_tokens
from jaxfw.data.tokenizer import Tokenizer
from jaxfw.data.turns import encode_chat

AT_ONCE = 512  # texts that the tokenizer's threads share


@dataclasses.dataclass
class LeftOut:
    """What was passed over: empty documents, and conversations in which the assistant says nothing."""

    empty: int = 0
    silent: int = 0

    def __str__(self) -> str:
        found = {"empty": self.empty, "without an assistant's turn": self.silent}
        return ", ".join(f"{count} {what}" for what, count in found.items() if count)


def read_corpus(
    source: str | Path, tokenizer: Tokenizer, *, column: str = "text", chat: bool = False, split: str = "train"
) -> Corpus:
    """The corpus in a folder of tokens (mapped), or of documents that are tokenised here, in memory.

    Raises:
        InputError: what `find_documents`, `encode_documents` and `open_tokens` refuse; tokens of another vocabulary; a
            folder of tokens without weights where `chat` asks for the loss on the assistant's turns only.
    """
    if Path(source).is_dir() and is_token_file(source):
        corpus = open_tokens(source)
        if corpus.tokenizer and corpus.tokenizer != vocabulary_fingerprint(tokenizer):
            raise InputError(
                f"{source} was made with another vocabulary (of {corpus.vocab_size} tokens; this one has "
                f"{tokenizer.vocab_size}): prepare it again with this tokenizer, or give that one."
            )
        if chat and corpus.weights is None:
            raise InputError(f"{source} does not say what the assistant said: prepare it again with --chat.")
        return corpus
    found = find_documents(source, column=column, split=split)
    encoded = encode_documents(found, tokenizer, chat=chat)
    return Corpus.of(encoded, vocab_size=tokenizer.vocab_size, tokenizer=vocabulary_fingerprint(tokenizer))


def prepare(
    source: str | Path,
    tokenizer: Tokenizer,
    directory: str | Path,
    *,
    column: str = "text",
    chat: bool = False,
    split: str = "train",
) -> LeftOut:
    """Tokenise documents into a new folder of tokens, as they are read; returns what was left out.

    Raises:
        InputError, RunError: as `find_documents`, `encode_documents` and `write_tokens` do.
    """
    found, left_out = find_documents(source, column=column, split=split), LeftOut()
    encoded = encode_documents(_counted(found), tokenizer, chat=chat, left_out=left_out)
    notes = {"source": str(source), "column": None if found.kind == "text" else column, "chat": chat}
    mark = vocabulary_fingerprint(tokenizer)
    write_tokens(directory, encoded, vocab_size=tokenizer.vocab_size, tokenizer=mark, notes=notes)
    return left_out


def encode_documents(
    documents: Iterable[Any], tokenizer: Tokenizer, *, chat: bool = False, left_out: LeftOut | None = None
) -> Iterator[Document]:
    """Token ids of texts, or of conversations with weights.

    A text is encoded with what the tokenizer puts around it (a beginning-of-text token, say), and its end-of-text
    token, if it has one, behind it. A conversation is what its chat template makes of it.

    Args:
        documents: texts, or with `chat` lists of messages; None and what is empty are left out.
        tokenizer: what encodes them.
        chat: whether they are conversations.
        left_out: counts what was passed over.

    Raises:
        InputError: a document that is no text, or no conversation; it is named by its number.
    """
    counted = LeftOut() if left_out is None else left_out
    present: Iterator[tuple[int, Any]] = _present(documents, counted)
    if not chat:
        while some := list(itertools.islice(present, AT_ONCE)):
            yield from _encode_texts(tokenizer, some)
        return
    for number, messages in present:
        document = _encode_conversation(tokenizer, number, messages)
        if np.any(document.weights):
            yield document
        else:
            counted.silent += 1


def vocabulary_fingerprint(tokenizer: Tokenizer) -> str:
    """Of which id is which token: what must agree between a folder of tokens and the tokenizer of a model."""
    vocabulary = sorted(tokenizer.backend.get_vocab(with_added_tokens=True).items(), key=lambda item: item[::-1])
    return hashlib.sha256(json.dumps(vocabulary).encode()).hexdigest()


def _present(documents: Iterable[Any], counted: LeftOut) -> Iterator[tuple[int, Any]]:
    for number, document in enumerate(documents):
        if document is None or (isinstance(document, str | list | tuple) and not document):
            counted.empty += 1
        else:
            yield number, document


def _encode_texts(tokenizer: Tokenizer, numbered: list[tuple[int, Any]]) -> Iterator[Document]:
    for number, text in numbered:
        if not isinstance(text, str):
            hint = " Conversations are read with chat." if isinstance(text, list | tuple) else ""
            raise InputError(f"document {number} is {text!r:.60}, not a text: choose another column.{hint}")
    try:
        encodings = tokenizer.backend.encode_batch_fast([text for _, text in numbered])
    except TypeError:  # what the library says of a str that is not valid Unicode; `encode` names the text
        for _, text in numbered:
            tokenizer.encode(text)
        raise
    for encoding in encodings:
        ids = encoding.ids
        if tokenizer.eos_id is not None and ids[-1:] != [tokenizer.eos_id]:
            ids.append(tokenizer.eos_id)
        if ids:
            yield Document(ids)


def _encode_conversation(tokenizer: Tokenizer, number: int, messages: Any) -> Document:
    try:
        return encode_chat(tokenizer, messages)
    except InputError as error:
        raise InputError(f"conversation {number}: {error}") from None


def _counted(documents: Documents) -> Iterator[Any]:
    """With a bar that counts them."""
    yield from tqdm(documents, desc="prepare", unit=" documents", dynamic_ncols=True, disable=None)
