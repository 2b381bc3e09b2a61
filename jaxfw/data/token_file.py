"""Tokens on a disk, read by memory map: what `python -m jaxfw.data prepare` writes and training reads.

A folder of

- `tokens.bin`: all token ids, little-endian, 2 bytes each where the vocabulary has up to 65,536, else 4;
- `ends.npy`: int64, where each document ends;
- `weights.bin`, if not every token is trained on: a byte for each token, 1 (trained on) or 0 (only read);
- `meta.json`: counts, dtype, vocabulary size, fingerprint of the tokenizer's vocabulary, sha256 of each file, notes.

It appears whole or not at all: until then everything lies in a hidden folder beside it.
"""

import hashlib
import json
import os
import shutil
from array import array
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from jaxfw.core.errors import InputError, RunError
from jaxfw.data.corpus import (
    Corpus,
    Document,
    check_weighted,
    checked,
    content_fingerprint,
    starts_of,
    token_dtype,
)

FORMAT, VERSION = "jaxfw tokens", 1
TOKENS, ENDS, WEIGHTS, META = "tokens.bin", "ends.npy", "weights.bin", "meta.json"
COUNTS = ("tokens", "documents", "vocab_size")
AT_ONCE = 1 << 22  # tokens that are gathered before they are written


def is_token_file(directory: str | Path) -> bool:
    """Whether the folder looks like one of ours, whole or damaged."""
    return any((Path(directory) / name).is_file() for name in (TOKENS, ENDS))


def write_tokens(
    directory: str | Path,
    documents: Iterable[Document],
    *,
    vocab_size: int,
    tokenizer: str = "",
    notes: Mapping[str, Any] | None = None,
) -> Path:
    """Write documents as they come; memory holds 8 bytes a document and a few million tokens.

    Args:
        directory: must not exist yet, or be empty: nothing is overwritten.
        documents: token ids, and either all or none with weights.
        vocab_size: every id is below it.
        tokenizer: `vocabulary_fingerprint` of what made the ids.
        notes: JSON values to keep: where the documents came from, say.

    Raises:
        InputError: the directory is in use; no documents; one that `Corpus.of` would refuse.
        RunError: the disk does not take it.
    """
    directory = Path(directory)
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise InputError(f"{directory} exists and is not empty: give a new directory, or remove it first.")
    partial = directory.with_name(f".{directory.name}.partial-{os.getpid()}")
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        meta = _write_arrays(partial, documents, token_dtype(vocab_size), vocab_size)
        meta |= {"vocab_size": vocab_size, "tokenizer": tokenizer, "notes": dict(notes or {})}
        _write(partial / META, [(json.dumps(meta, indent=2) + "\n").encode()])
        partial.rename(directory)  # takes the place of an empty directory
    except OSError as error:
        raise RunError(f"{directory} cannot be written ({error}): nothing was kept.") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return directory


def open_tokens(directory: str | Path) -> Corpus:
    """The corpus in a folder that `write_tokens` made; its tokens stay on the disk.

    Sizes and the documents' ends are checked; `verify_tokens` reads everything.

    Raises:
        InputError: another kind of folder, or a file that is missing, truncated or of another set.
    """
    directory = Path(directory)
    meta = read_meta(directory)
    ends = _read_ends(directory, meta)
    tokens = _map(directory / TOKENS, np.dtype(meta["dtype"]), meta["tokens"])
    weights = _map(directory / WEIGHTS, np.dtype("u1"), meta["tokens"]) if WEIGHTS in meta["sha256"] else None
    digests = [meta["sha256"][TOKENS], meta["sha256"].get(WEIGHTS, "")]
    fingerprint = content_fingerprint(digests, ends)
    return Corpus(tokens, starts_of(ends), ends, weights, meta["vocab_size"], fingerprint, meta["tokenizer"])


def read_meta(directory: str | Path) -> dict[str, Any]:
    """meta.json, checked for what a reader relies on."""
    path = Path(directory) / META
    if not path.is_file():
        raise InputError(
            f"{directory} holds no {META}: it is no folder of tokens. `python -m jaxfw.data prepare` writes one."
        )
    try:
        meta = json.loads(path.read_bytes())
        form = (meta["format"], meta["version"])
    except (ValueError, KeyError, TypeError):
        raise InputError(
            f"{path} does not describe a folder of tokens (format {FORMAT!r}): prepare it again."
        ) from None
    if form != (FORMAT, VERSION):
        raise InputError(f"{path} is of format {form[0]!r} version {form[1]!r}; known: {FORMAT!r} version {VERSION}.")
    bad = [name for name in COUNTS if not isinstance(meta.get(name), int) or meta[name] < 1]
    bad += ["dtype"] if meta.get("dtype") not in ("<u2", "<u4") else []
    bad += [
        name for name in ("sha256", "tokenizer") if not isinstance(meta.get(name), dict if name == "sha256" else str)
    ]
    bad += [] if bad else [name for name in (TOKENS, ENDS) if not isinstance(meta["sha256"].get(name), str)]
    if bad:
        raise InputError(f"{path}: {bad[0]} is missing or out of range: prepare it again.")
    return meta


def verify_tokens(directory: str | Path) -> Iterator[tuple[str, str]]:
    """Each file's name and what is wrong with it, or ''; reads everything."""
    directory = Path(directory)
    open_tokens(directory)
    for name, wanted in read_meta(directory)["sha256"].items():
        with (directory / name).open("rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
        yield name, "" if found == wanted else f"its sha256 is {found[:12]}..., not {wanted[:12]}... as {META} says"


def _write_arrays(folder: Path, documents: Iterable[Document], dtype: np.dtype, vocab_size: int) -> dict[str, Any]:
    ends, total, is_weighted = array("q"), 0, None
    with _Summed(folder / TOKENS) as tokens, _Summed(folder / WEIGHTS) as weights:
        for i, given in enumerate(documents):
            document = checked(given, i, vocab_size)
            is_weighted = document.weights is not None if is_weighted is None else is_weighted
            check_weighted([is_weighted, document.weights is not None])
            total += len(document.tokens)
            ends.append(total)
            tokens.add(np.asarray(document.tokens).astype(dtype))
            if document.weights is not None:
                weights.add(np.asarray(document.weights, np.uint8))
    if not total:
        raise InputError("there are no documents: give at least one.")
    np.save(folder / ENDS, np.frombuffer(ends, np.int64).astype("<i8"))
    with (folder / ENDS).open("rb") as file:
        os.fsync(file.fileno())
        sums = {TOKENS: tokens.sum, ENDS: hashlib.file_digest(file, "sha256").hexdigest()}
    if is_weighted:
        sums[WEIGHTS] = weights.sum
    else:
        (folder / WEIGHTS).unlink()
    counts = {"tokens": total, "documents": len(ends), "dtype": dtype.str}
    return {"format": FORMAT, "version": VERSION, **counts, "sha256": sums}


class _Summed:
    """A file of array parts that is summed as it is written."""

    def __init__(self, path: Path):
        self._file, self._sum, self._parts, self._waiting = path.open("wb"), hashlib.sha256(), [], 0

    def __enter__(self) -> "_Summed":
        return self

    def __exit__(self, kind: object, *error: object) -> None:
        with self._file:
            if kind is None:
                self._flush()
                self._file.flush()
                os.fsync(self._file.fileno())

    @property
    def sum(self) -> str:
        return self._sum.hexdigest()

    def add(self, part: np.ndarray) -> None:
        self._parts.append(part)
        self._waiting += len(part)
        if self._waiting >= AT_ONCE:
            self._flush()

    def _flush(self) -> None:
        if self._parts:
            content = np.concatenate(self._parts).data
            self._sum.update(content)
            self._file.write(content)
        self._parts, self._waiting = [], 0


def _write(path: Path, parts: Iterable[bytes]) -> None:
    with path.open("wb") as file:
        file.writelines(parts)
        file.flush()
        os.fsync(file.fileno())


def _read_ends(directory: Path, meta: Mapping[str, Any]) -> np.ndarray:
    path = directory / ENDS
    _check_there(path)
    if hashlib.sha256(path.read_bytes()).hexdigest() != meta["sha256"][ENDS]:
        raise InputError(f"{path} is not what {META} describes: it is damaged, or of another set. Prepare it again.")
    ends = np.load(path, allow_pickle=False)
    if len(ends) != meta["documents"] or ends[-1] != meta["tokens"] or (np.diff(ends, prepend=0) < 1).any():
        raise InputError(f"{path} and {META} disagree about the documents: prepare it again.")
    return ends.astype(np.int64)


def _map(path: Path, dtype: np.dtype, count: int) -> np.ndarray:
    _check_there(path)
    wanted, found = count * dtype.itemsize, path.stat().st_size
    if found != wanted:
        what = "truncated" if found < wanted else "not of this set"
        raise InputError(
            f"{path} has {found} bytes, not {wanted} as {META} says: it is {what}. Copy or prepare it again."
        )
    return np.memmap(path, dtype, "r", shape=(count,))


def _check_there(path: Path) -> None:
    if not path.is_file():
        raise InputError(f"{path} is missing: copy the whole folder, or prepare it again.")
