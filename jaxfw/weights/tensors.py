"""The tensors of a Hugging Face directory, in one file or in shards with an index: found by name, read in regions."""

import contextlib
import dataclasses
import json
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import ml_dtypes  # noqa: F401  (registers bfloat16 with numpy, which safetensors' numpy reader needs)
import numpy as np
from safetensors import SafetensorError, safe_open

from jaxfw.core.errors import InputError
from jaxfw.weights.refusals import check_pointer

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
DTYPES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}  # as a file's header names them, and as we do
BLOCK_ROWS, BLOCK_BYTES = 64, 2**22  # few rows at a time: they stay in the processor's cache while they are transposed


@dataclasses.dataclass(frozen=True)
class Header:
    """What a file says of a tensor before any of its bytes are read.

    `name` and `dtype` are in the file's own spelling; where a family has aliases, it is looked up by another name.
    """

    file: Path
    name: str
    dtype: str
    shape: tuple[int, ...]


class Reader:
    """Regions of the tensors that `found` lists; each file is opened once and mapped: only what is asked for is
    read. A context manager: `close` at its end.
    """

    def __init__(self, found: Mapping[str, Header]):
        self.found = found
        self._files: dict[Path, Any] = {}
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> "Reader":
        return self

    def __exit__(self, *error: Any) -> None:
        self._files.clear()
        self._stack.close()

    def read(self, name: str, index: Sequence[slice]) -> np.ndarray:
        """The region `index` (a start and a stop an axis) of a tensor, in its stored dtype."""
        header = self.found[name]
        if header.file not in self._files:
            self._files[header.file] = self._stack.enter_context(_open(header.file))
        return self._files[header.file].get_slice(header.name)[tuple(index)]

    def blocks(
        self, name: str, index: Sequence[slice], *, rows: int | None = None
    ) -> Iterator[tuple[slice, np.ndarray]]:
        """The region in pieces along its first axis, each with where it lies; `rows` a piece, or as many as suit."""
        first, *rest = index
        width = 4 * int(np.prod([part.stop - part.start for part in rest], dtype=np.int64))
        rows = rows or (max(1, BLOCK_BYTES // max(width, 1)) if not rest else BLOCK_ROWS)
        for start in range(first.start, first.stop, rows):
            part = slice(start, min(start + rows, first.stop))
            yield slice(part.start - first.start, part.stop - first.start), self.read(name, (part, *rest))


def read_json(path: Path) -> dict:
    """A JSON object from a file; `InputError` names the file when it is absent or damaged."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"{path} does not exist: is this a Hugging Face model directory?") from None
    except OSError as error:
        raise _unreadable(path, error) from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        check_pointer(path)
        raise InputError(f"{path} is not valid JSON ({error}): download it again.") from None
    if not isinstance(value, dict):
        raise InputError(f"{path} must hold a JSON object, not {type(value).__name__}.")
    return value


def _unreadable(path: Path, error: OSError) -> InputError:
    reason = error.strerror or error
    return InputError(f"{path} cannot be read ({reason}): it must be a file that you may read.")


def _open(path: Path):
    try:
        path.open("rb").close()  # safe_open says of a file that may not be read that there is none
        return safe_open(path, framework="np")
    except FileNotFoundError:
        raise InputError(f"{path} is missing, but the index names it: download the missing shard.") from None
    except OSError as error:
        raise _unreadable(path, error) from None
    except SafetensorError as error:
        check_pointer(path)
        size = path.stat().st_size
        raise InputError(f"{path} ({size} bytes) is truncated or corrupt ({error}): download it again.") from None


def headers(file: Path) -> dict[str, Header]:
    """Tensor name -> header, from one file."""
    with _open(file) as tensors:
        slices = {name: tensors.get_slice(name) for name in tensors.keys()}
        return {name: Header(file, name, part.get_dtype(), tuple(part.get_shape())) for name, part in slices.items()}


def locate(directory: Path) -> dict[str, Header]:
    """Tensor name -> header, from every file. Checks that each shard exists and holds what the index says."""
    if (directory / SINGLE).exists():
        return headers(directory / SINGLE)
    if (directory / INDEX).exists():
        found = {}
        for shard, names in read_index(directory / INDEX).items():
            here = headers(directory / shard)
            absent = sorted(set(names) - set(here))
            if absent:
                raise InputError(f"{directory / shard} lacks {few(absent)}, which {INDEX} places there.")
            found |= {name: here[name] for name in names}
        return found
    shards = few(sorted(path.name for path in directory.glob("*.safetensors")), most=3)
    beside = f"It holds {shards}: download the index that belongs to them" if shards else "Download the model's files"
    how = "`hf download ID --local-dir DIR`"
    raise InputError(f"{directory} holds neither {SINGLE} nor {INDEX}. {beside}, as by {how}.")


def renamed(found: Mapping[str, Header], aliases: Sequence[tuple[str, str]]) -> dict[str, Header]:
    """`found` by the names that a family uses: each (regular expression, replacement) is applied to each name."""
    names: dict[str, Header] = {}
    for name, header in found.items():
        for pattern, replacement in aliases:
            name = re.sub(pattern, replacement, name)
        if name in names:
            raise InputError(
                f"{header.file} holds {names[name].name} and {header.name}, which are one tensor: remove one of them."
            )
        names[name] = header
    return names


def read_index(path: Path) -> dict[str, list[str]]:
    """Shard -> the tensors that the index places there."""
    named = read_json(path).get("weight_map")
    if not isinstance(named, dict) or not named or not all(isinstance(file, str) for file in named.values()):
        raise InputError(f"{path} lacks 'weight_map', the file of each tensor: download it again.")
    shards: dict[str, list[str]] = {}
    for name, file in sorted(named.items(), key=lambda pair: pair[::-1]):
        shards.setdefault(file, []).append(name)
    return shards


@dataclasses.dataclass(frozen=True)
class Difference:
    """How the tensors of the files differ from those that config.json asks for; empty where they do not."""

    missing: tuple[str, ...]
    unexpected: tuple[str, ...]
    misshaped: tuple[str, ...]
    odd_dtypes: tuple[str, ...]
    ignored: tuple[str, ...]

    @property
    def problems(self) -> list[str]:
        """What keeps the files from being loaded, one text a kind."""
        lists = {"missing": self.missing, "unexpected": self.unexpected, "misshaped": self.misshaped}
        return [f"{kind}: {few(names)}" for kind, names in lists.items() if names] + list(self.odd_dtypes)


def compare(
    found: Mapping[str, Header], expected: Mapping[str, tuple[int, ...]], *, ignored: str, optional: Collection[str]
) -> Difference:
    """Names, shapes and dtypes beside what the config asks for; `ignored` is a regular expression."""
    extra = sorted(set(found) - set(expected) - set(optional))
    is_ignored = {name: re.fullmatch(ignored, name) is not None for name in extra}
    misshaped = [
        f"{name} is {list(found[name].shape)}, config.json asks for {list(shape)}"
        for name, shape in sorted(expected.items())
        if name in found and found[name].shape != shape
    ]
    dtypes = {name: found[name].dtype for name in sorted(found) if name in expected or name in optional}
    return Difference(
        tuple(sorted(set(expected) - set(found))),
        tuple(name for name in extra if not is_ignored[name]),
        tuple(misshaped),
        tuple(_odd_dtypes(dtypes)),
        tuple(name for name in extra if is_ignored[name]),
    )


def _odd_dtypes(stored: Mapping[str, str]) -> list[str]:
    odd = sorted(set(stored.values()) - set(DTYPES))
    problems = [f"stored as {dtype}: {few([n for n in stored if stored[n] == dtype], most=2)}" for dtype in odd]
    if odd:
        problems[-1] += f" (accepted: {', '.join(DTYPES)}. A quantised checkpoint? Take the unquantised one)"
    return problems


def check_tied(reader: Reader, name: str, twin: str) -> None:
    """A tensor that is stored although it is tied must equal its twin."""
    if name not in reader.found:
        return
    given, wanted = reader.found[name].shape, reader.found[twin].shape
    if given != wanted:
        raise InputError(
            f"the tensors do not fit config.json: {name} is {list(given)}, {twin} {list(wanted)}, though config.json "
            "says tie_word_embeddings=true (set it to false)."
        )
    whole = [slice(0, size) for size in given]
    pairs = zip(reader.blocks(name, whole), reader.blocks(twin, whole), strict=True)
    if not all(np.array_equal(a, b) for (_, a), (_, b) in pairs):
        raise InputError(
            f"the tensors do not fit config.json: {name} differs from {twin}, though config.json says "
            "tie_word_embeddings=true (set it to false)."
        )


def few(names: Sequence[str], most: int = 5) -> str:
    """The first names, and how many more there are."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more
