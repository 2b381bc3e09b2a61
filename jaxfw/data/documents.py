"""Documents in files of text, JSON, CSV or parquet, or of a data set of the Hub, one after the other.

A text file is one document, whatever its blank lines: they separate paragraphs in one text and documents in another.
Everything else is read by the `datasets` library as a stream: nothing is copied into its cache.
"""

import dataclasses
import glob
import re
import socket
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlparse
from urllib.request import getproxies

from jaxfw.core.errors import InputError, unknown

TEXT = "text"
KINDS = {".txt": TEXT, ".md": TEXT, ".json": "json", ".jsonl": "json", ".csv": "csv", ".parquet": "parquet"}
COMPRESSED = (".gz", ".zst", ".xz", ".bz2")
ON_THE_HUB = re.compile(r"(?P<name>[\w.-]+(/[\w.-]+)?)(:(?P<config>[\w.-]+))?")


@dataclasses.dataclass(frozen=True)
class Documents:
    """One column of what `find_documents` found; every iteration reads from the start.

    Rows come in the order of the files' names and of their lines. A missing value (null) comes as None.
    """

    source: str
    kind: str
    files: tuple[str, ...]
    column: str
    split: str

    def __iter__(self) -> Iterator[Any]:
        if self.kind == TEXT:
            yield from (_read_text(Path(file)) for file in self.files)
            return
        for i, row in enumerate(_rows(self)):
            if self.column not in row:
                raise unknown(f"{self.source} (row {i}): column", self.column, row)
            yield row[self.column]


def find_documents(source: str | Path, *, column: str = "text", split: str = "train") -> Documents:
    """Find what `source` names, without reading it yet.

    Args:
        source: a file, a folder (with the folders in it), a glob such as `data/*.jsonl.gz`, or else a data set of the
            Hub: `owner/name` or `owner/name:configuration`.
        column: of JSON, CSV or parquet, the one to read: a text, or a conversation's messages.
        split: of a data set of the Hub.

    Raises:
        InputError: nothing there, files of several kinds or of none that is known. While reading: an unknown column
            (those that exist are named), a damaged file, a missing library, no network.
    """
    files = _files(str(source))
    if files is None:
        return Documents(str(source), "hub", (), column, split)
    kinds = {file: _kind(file) for file in files}
    found = {kind: file for file, kind in kinds.items()}
    if len(found) > 1:
        raise InputError(
            f"{source} holds files of several kinds ({', '.join(found.values())}): name one kind by a glob such as "
            f"'{Path(source) / '*.jsonl'}'."
        )
    return Documents(str(source), next(iter(found)), tuple(files), column, split)


def _files(source: str) -> list[str] | None:
    """Those that the source names, sorted; None if it can only be a data set of the Hub."""
    path = Path(source)
    if path.is_file():
        return [source]
    if path.is_dir():
        found = [file for file in path.rglob("*") if file.is_file() and not _is_hidden(file.relative_to(path))]
        files = sorted(str(file) for file in found if _suffix(file) in KINDS)
        if files:
            return files
        raise InputError(f"{source} holds no file that is known ({', '.join(KINDS)}); it has {_few(found) or 'none'}.")
    if glob.has_magic(source):
        files = sorted(file for file in glob.glob(source, recursive=True) if Path(file).is_file())
        if files:
            return files
        raise InputError(f"{source!r} matches no file: look at the folder and the pattern.")
    if ON_THE_HUB.fullmatch(source) and _suffix(path) not in KINDS:
        return None
    raise InputError(f"{source!r} is not there: give a file, a folder, a glob or a data set of the Hub (owner/name).")


def _is_hidden(path: Path) -> bool:
    return any(part.startswith(".") for part in path.parts)


def _few(found: Iterable[Path]) -> str:
    names = sorted(path.name for path in found)
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")


def _suffix(path: Path) -> str:
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if suffixes and suffixes[-1] in COMPRESSED:
        suffixes.pop()
        if suffixes and KINDS.get(suffixes[-1]) == TEXT:
            return ""  # compressed text: nothing here reads it
    return suffixes[-1] if suffixes else ""


def _kind(file: str) -> str:
    suffix = _suffix(Path(file))
    if suffix not in KINDS:
        raise InputError(f"{file}: files of this kind are not read; known: {', '.join(KINDS)} (JSON and CSV also .gz).")
    return KINDS[suffix]


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not UTF-8 (byte {error.start}): convert it, with iconv for example.") from None


def _rows(documents: Documents) -> Iterator[Mapping[str, Any]]:
    """As mappings, with the errors of pyarrow, `datasets` and the file system told as ours."""
    datasets, source = _library(), documents.source
    if documents.kind == "hub":
        yield from _hub(datasets, documents)
        return
    try:
        yield from datasets.load_dataset(
            documents.kind, data_files=list(documents.files), split="train", streaming=True
        )
    except Exception as error:
        raise InputError(f"{source} cannot be read: {_said(error)}. Is a file damaged, or of another kind?") from None


def _hub(datasets: Any, documents: Documents) -> Iterator[Mapping[str, Any]]:
    match = ON_THE_HUB.fullmatch(documents.source)
    assert match
    try:
        _check_network()
        yield from datasets.load_dataset(match["name"], match["config"], split=documents.split, streaming=True)
    except Exception as error:  # no network, no such name, no such split, a gated one
        raise InputError(
            f"{documents.source!r} is no file or folder here, and as a data set of the Hub it cannot be had "
            f"({_said(error)}). Check the path; without a network, download it elsewhere and give its files."
        ) from None


def _check_network() -> None:
    """Raises at once where the Hub's name has no address; its library tries for half a minute."""
    from huggingface_hub.constants import ENDPOINT

    address = urlparse(ENDPOINT)
    if not getproxies():
        socket.getaddrinfo(address.hostname, address.port or 443)


def _said(error: Exception) -> str:
    while isinstance(error.__cause__, Exception):
        error = error.__cause__
    return f"{type(error).__name__}: {' '.join(str(error).split()).rstrip('.'):.200}"


def _library() -> Any:
    try:
        import datasets
    except ImportError:
        raise InputError(
            "reading JSON, CSV, parquet or the Hub needs the library `datasets`: pip install -e '.[data]'. Text files "
            "need none."
        ) from None
    return datasets
