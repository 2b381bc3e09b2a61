"""What a model directory holds, and whether it is whole: as text and findings, without a device."""

import dataclasses
import hashlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from jaxfw.core.errors import InputError
from jaxfw.core.mesh import abstract_mesh
from jaxfw.core.sharding import table
from jaxfw.models.accounting import parameter_count
from jaxfw.models.sharding import decoder_rules
from jaxfw.weights import layout, tensors
from jaxfw.weights.arrays import abstract_params
from jaxfw.weights.directory import Opened, open_directory
from jaxfw.weights.exporting import model_folder

SUMS = "SHA256SUMS"


def describe(directory: str | Path, *, mesh: dict[str, int] | None = None, quantise: str | None = None) -> str:
    """Family, configuration, sizes, every tensor, and what is missing, unexpected or ignored; for people to read.

    Args:
        directory: as of `load`, or a workdir with a model.
        mesh: sizes of mesh axes: adds the table of what each device would hold.
        quantise: as of `load`, for that table and the bytes.
    """
    opened = open_directory(model_folder(Path(directory)))
    lines = [*_summary(opened, quantise), "", *_tensor_table(opened)]
    for kind in ("missing", "unexpected", "misshaped", "odd_dtypes", "ignored"):
        found = getattr(opened.difference, kind)
        lines += ["", f"{kind.replace('_', ' ')} ({len(found)}):", *(f"  {name}" for name in found)] if found else []
    if mesh is not None:
        shapes = abstract_params(opened.config, quantise=quantise)
        lines += ["", str(table(decoder_rules(opened.config), abstract_mesh(**mesh), shapes))]
    return "\n".join(lines)


def loads(directory: str | Path) -> bool:
    """Whether the tensors of a directory, or of a workdir's model, are those that its config.json asks for."""
    return not open_directory(model_folder(Path(directory))).difference.problems


def _summary(opened: Opened, quantise: str | None) -> list[str]:
    config, files = opened.config, {header.file.name for header in opened.found.values()}
    held = table(decoder_rules(config), abstract_mesh(), abstract_params(config, quantise=quantise)).bytes
    fields = ", ".join(f"{field.name}={getattr(config, field.name)!r}" for field in dataclasses.fields(config))
    return [
        f"family      {opened.family.MODEL_TYPE}",
        f"config      {fields}",
        f"parameters  {parameter_count(config):,}",
        f"bytes       {held:,} in memory{f', quantised to {quantise}' if quantise else ''}, in {len(files)} file(s)",
        f"dtype       {config.param_dtype}",
        f"loads       {'no: ' + '; '.join(opened.difference.problems) if opened.difference.problems else 'yes'}",
    ]


def _tensor_table(opened: Opened) -> list[str]:
    rows = [("tensor", "shape", "dtype", "parameter")]
    paths = {name: path for path, entry in reversed(opened.stored.items()) for name in entry.names}
    for name, header in sorted(opened.found.items()):
        rows.append((header.name, "x".join(map(str, header.shape)) or "scalar", header.dtype, paths.get(name, "-")))
    widths = [max(len(row[i]) for row in rows) for i in range(4)]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]


@dataclasses.dataclass(frozen=True)
class Finding:
    """One thing that was looked at; `problem` is empty where it is as it should be."""

    name: str
    problem: str = ""


def verify(directory: str | Path) -> Iterator[Finding]:
    """Findings about files and tensors: sums, structure, fit to config.json, numbers that are not finite.

    Raises:
        InputError: there is nothing that could be looked at: no directory, no config.json, an unknown family.
    """
    directory = model_folder(Path(directory))
    try:
        opened = open_directory(directory)
    except InputError as error:
        if not directory.is_dir():
            raise
        yield Finding("files", str(error))
        yield from _sums(directory)
        return
    yield Finding("tensors of config.json", "; ".join(opened.difference.problems))
    yield from _index(directory, opened)
    yield from _sums(directory)
    with tensors.Reader(opened.found) as reader:
        for name, header in opened.found.items():
            if header.dtype in tensors.DTYPES and not _is_finite(reader, name):
                yield Finding(header.name, "holds NaN or infinite numbers")
    yield Finding(f"numbers of {len(opened.found)} tensors looked at")


def _is_finite(reader: tensors.Reader, name: str) -> bool:
    whole = layout.whole(reader.found[name].shape)
    if not whole:
        return True
    return all(np.isfinite(block).all() for _, block in reader.blocks(name, whole, rows=1024))


def _index(directory: Path, opened: Opened) -> Iterator[Finding]:
    if not (directory / tensors.INDEX).exists() or (directory / tensors.SINGLE).exists():
        return
    placed = tensors.read_index(directory / tensors.INDEX)
    unlisted = [path.name for path in sorted(directory.glob("model-*.safetensors")) if path.name not in placed]
    yield Finding(tensors.INDEX, f"does not name {tensors.few(unlisted)}" if unlisted else "")
    sizes = {"F32": 4, "BF16": 2, "F16": 2}
    total = sum(
        sizes.get(header.dtype, 0) * int(np.prod(header.shape, dtype=np.int64)) for header in opened.found.values()
    )
    said = (tensors.read_json(directory / tensors.INDEX).get("metadata") or {}).get("total_size")
    is_known = all(header.dtype in sizes for header in opened.found.values())
    wrong = isinstance(said, int) and is_known and said != total
    yield Finding("total_size", f"is {said:,} in the index, the tensors have {total:,} bytes" if wrong else "")


def _sums(directory: Path) -> Iterator[Finding]:
    """Each line of SHA256SUMS, if there is one."""
    path = directory / SUMS
    if not path.exists():
        yield Finding(f"no {SUMS} (--write makes one)")
        return
    for line in path.read_text(encoding="utf-8").splitlines():
        wanted, _, name = line.partition("  ")
        name = name.removeprefix("*").strip()
        if len(wanted) != 64 or not name or Path(name).is_absolute() or ".." in Path(name).parts:
            yield Finding(SUMS, f"has a line that is no sum and name: {line:.60}")
        elif not (directory / name).is_file():
            yield Finding(name, f"is missing, but {SUMS} names it")
        else:
            found = sum_of(directory / name)
            yield Finding(name, "" if found == wanted.lower() else f"has sha256 {found}, {SUMS} says {wanted}")


def write_sums(directory: str | Path) -> Path:
    """SHA256SUMS of every other file, as `sha256sum -c` reads it."""
    directory = Path(directory)
    files = sorted(path for path in directory.rglob("*") if path.is_file() and path.name != SUMS)
    lines = [f"{sum_of(path)}  {path.relative_to(directory).as_posix()}\n" for path in files]
    (directory / SUMS).write_text("".join(lines), encoding="utf-8")
    return directory / SUMS


def sum_of(path: Path) -> str:
    """A file's sha256 in hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
