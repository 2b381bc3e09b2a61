"""Parameters to a Hugging Face model directory, one at a time: its tensor names, shards and index; whole or not at all.

The files are laid out first, which needs shapes only. Then each parameter is brought to the host and written to its
place, whichever tensors and shards that is in.
"""

import dataclasses
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import ml_dtypes  # noqa: F401  (registers bfloat16 with numpy)
import numpy as np
from flax.traverse_util import flatten_dict
from jax.experimental import multihost_utils

from jaxfw.core.errors import InputError, RunError
from jaxfw.core.shapes import PyTree
from jaxfw.models import DecoderConfig
from jaxfw.models.hub_names import Stored
from jaxfw.nn.config import DTYPES
from jaxfw.ops.adapted import Adapted
from jaxfw.ops.quant import Quantised
from jaxfw.weights import layout, tensors
from jaxfw.weights.families import choose

SHARD_BYTES = 5_000_000_000  # the shard size of transformers before version 5, and of most of the Hub
_SPELLED = {ours: theirs for theirs, ours in tensors.DTYPES.items()}


def save(
    directory: str | Path,
    config: DecoderConfig,
    params: PyTree,
    *,
    attributes: Mapping[str, Any] | None = None,
    model_type: str | None = None,
    shard_bytes: int = SHARD_BYTES,
    extra: Mapping[str, bytes | str] | None = None,
) -> Path:
    """Write config.json and safetensors as the Hub holds them: its tensor names, each in the parameter's own dtype.

    The directory appears complete or not at all: until then, everything lies in a hidden folder beside it, which may be
    removed when a run was killed. Of parameters on the devices of several processes, the first process writes; all
    must call this.

    Args:
        directory: must not exist yet, or be empty: nothing is overwritten.
        config: the model; its `param_dtype` should be that of `params`.
        params: the parameter tree, on any devices.
        attributes: further attributes for config.json (token ids, say).
        model_type: the family whose names are written; None is the first of `jaxfw.weights.families.FAMILIES` that can
            express the config.
        shard_bytes: a larger model is cut into shards of at most this many bytes.
        extra: further files, by their path in the directory (those of a tokenizer, say).

    Raises:
        InputError: the directory is in use, the tree does not fit the config, it is quantised, or no family can
            express the config.
    """
    directory = Path(directory)
    flat: dict[str, Any] = flatten_dict(params, sep="/")
    _check_params(config, flat)
    _agree(lambda: _check_free(directory))
    config = dataclasses.replace(config, param_dtype=str(flat["embed/embedding"].dtype))
    family = choose(config, model_type)
    described = {**(attributes or {}), **family.write_config(config)}
    partial = directory.with_name(f".{directory.name}.partial-{os.getpid()}")

    def write() -> None:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        _write_extra(partial, {"config.json": json.dumps(described, indent=2) + "\n"} | dict(extra or {}))

    _agree(write)
    _write_tensors(partial, family.tensors(config), flat, shard_bytes)
    _agree(lambda: partial.rename(directory))  # takes the place of an empty directory
    return directory


def save_files(directory: Path, files: Mapping[str, bytes | str]) -> Path:
    """A directory of small files, by their paths in it: whole or not at all, as `save`; all processes must call this.

    Raises:
        InputError: the directory is in use.
        RunError: it cannot be written.
    """
    partial = directory.with_name(f".{directory.name}.partial-{os.getpid()}")

    def write() -> None:
        _check_free(directory)
        try:
            partial.mkdir(parents=True)
            _write_extra(partial, files)
            _sync(partial)
            partial.rename(directory)
        except OSError as error:
            shutil.rmtree(partial, ignore_errors=True)
            raise RunError(f"{directory} cannot be written ({error}): nothing was saved.") from error

    _agree(write)
    return directory


def _check_free(directory: Path) -> None:
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise InputError(f"{directory} exists and is not empty: give a new directory, or remove it first.")


def _write_extra(folder: Path, files: Mapping[str, bytes | str]) -> None:
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content.encode() if isinstance(content, str) else content)


@dataclasses.dataclass(frozen=True)
class _Place:
    """Where a tensor lies: a file, the offset in it, and what it is."""

    file: str
    offset: int
    dtype: np.dtype
    shape: tuple[int, ...]


def _write_tensors(folder: Path, stored: Mapping[str, Stored], flat: Mapping[str, Any], shard_bytes: int) -> None:
    """All parameters, gathered one at a time by all processes, written by the first."""
    failure: Exception | None = None
    places: dict[str, _Place] = {}
    if jax.process_index() == 0:
        try:
            places = _lay_out(folder, stored, flat, shard_bytes)
        except OSError as error:
            failure = error
    for path, entry in stored.items():
        value = on_host(flat[path])
        if jax.process_index() == 0 and failure is None:
            try:
                _write_parameter(folder, places, entry, value)
            except OSError as error:
                failure = error

    def finish() -> None:
        if failure is not None:
            shutil.rmtree(folder, ignore_errors=True)
            raise RunError(f"{folder} cannot be written ({failure}): nothing was saved.") from failure
        _sync(folder)

    _agree(finish)


def on_host(value: Any) -> np.ndarray:
    """The whole parameter; of one that lies on devices of several processes, all of them must ask."""
    if isinstance(value, jax.Array) and not value.is_fully_addressable:
        return np.asarray(multihost_utils.process_allgather(value, tiled=True))
    return np.asarray(value)


def _write_parameter(folder: Path, places: Mapping[str, _Place], stored: Stored, value: np.ndarray) -> None:
    for region in layout.regions(stored, layout.whole(value.shape)):
        place, source = places[region.name], value[region.place]
        source = source[0] if source.ndim == 3 else source
        tensor = np.memmap(folder / place.file, place.dtype, "r+", place.offset, place.shape)
        target, source = tensor[region.index], source.T if region.transposed else source
        for start in range(0, len(target), tensors.BLOCK_ROWS if target.ndim > 1 else max(len(target), 1)):
            rows = slice(start, start + tensors.BLOCK_ROWS) if target.ndim > 1 else slice(None)
            target[rows] = source[rows]


def _lay_out(
    folder: Path, stored: Mapping[str, Stored], flat: Mapping[str, Any], shard_bytes: int
) -> dict[str, _Place]:
    """Make the files with their headers and room for every tensor; more than one with an index, named as on the Hub."""
    shapes = layout.stored_shapes(stored, {path: tuple(flat[path].shape) for path in stored})
    dtypes = {name: np.dtype(flat[path].dtype) for path, entry in stored.items() for name in entry.names}
    sizes = {name: int(np.prod(shapes[name], dtype=np.int64)) * dtypes[name].itemsize for name in sorted(shapes)}
    shards = list(_shards(sizes, shard_bytes))
    places: dict[str, _Place] = {}
    for i, names in enumerate(shards, start=1):
        file = tensors.SINGLE if len(shards) == 1 else f"model-{i:05d}-of-{len(shards):05d}.safetensors"
        places |= _make_file(folder / file, {name: (dtypes[name], shapes[name]) for name in names})
    if len(shards) > 1:
        weight_map = {name: places[name].file for name in sizes}
        index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": weight_map}
        (folder / tensors.INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    return places


def _shards(sizes: Mapping[str, int], most: int) -> Iterator[list[str]]:
    names: list[str] = []
    total = 0
    for name, size in sizes.items():
        if names and total + size > most:
            yield names
            names, total = [], 0
        names.append(name)
        total += size
    yield names


def _make_file(path: Path, entries: Mapping[str, tuple[np.dtype, tuple[int, ...]]]) -> dict[str, _Place]:
    """A safetensors file without its numbers: 8 bytes of length, a JSON header, room for the tensors.

    In the order of the library: wide types first, then by name. The library itself writes from memory only.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    begins, end = {}, 0
    for name, (dtype, shape) in sorted(entries.items(), key=lambda item: (-item[1][0].itemsize, item[0])):
        begins[name], end = end, end + int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
        header[name] = {"dtype": _SPELLED[dtype.name], "shape": list(shape), "data_offsets": [begins[name], end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    first = 8 + len(text)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.flush()
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(file.fileno(), 0, first + end)  # a full disk is told here: writing to a map would crash
        file.truncate(first + end)
    return {name: _Place(path.name, first + begins[name], *entries[name]) for name in entries}


def _sync(folder: Path) -> None:
    """Everything on the disk before the folder gets its name."""
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())


def _agree(act: Any) -> None:
    """The first process acts; an error of its is one of all, so that none waits for a process that has given up."""
    error: Exception | None = None
    if jax.process_index() == 0:
        try:
            act()
        except Exception as caught:
            error = caught
    if jax.process_count() > 1:
        has_failed = multihost_utils.broadcast_one_to_all(np.array(error is not None))
        if has_failed and error is None:
            raise RunError("saving failed in the first process, which says why.")
    if error is not None:
        raise error


def _check_params(config: DecoderConfig, flat: Mapping[str, Any]) -> None:
    """Names, shapes and dtypes of the parameters; the first that does not fit is named."""
    quantised = [path for path, leaf in flat.items() if isinstance(leaf, Quantised)]
    if quantised:
        raise InputError(
            f"params are quantised ({tensors.few(quantised, most=1)}), and files of the Hub hold weights in full: "
            "load the directory that they came from without quantise=, and save that."
        )
    adapted = [path for path, leaf in flat.items() if isinstance(leaf, Adapted)]
    if adapted:
        raise InputError(
            f"params have adapters beside them ({tensors.few(adapted, most=1)}), which no file of a model holds: "
            "jaxfw.models.lora.merge them first, or save_adapters alone."
        )
    shapes = layout.flat_shapes(config)
    if set(flat) != set(shapes):
        odd = sorted(set(flat) ^ set(shapes))
        raise InputError(f"params do not fit the config: {', '.join(odd[:5])} is in one of the two only.")
    for path, leaf in flat.items():
        shape, dtype = tuple(np.shape(leaf)), str(getattr(leaf, "dtype", type(leaf).__name__))
        if shape != shapes[path]:
            raise InputError(
                f"params do not fit the config: {path} is {list(shape)}, the config asks for {list(shapes[path])}."
            )
        if dtype not in DTYPES:
            raise InputError(f"params.{path} is {dtype}; accepted: {', '.join(DTYPES)}. Convert it before saving.")
