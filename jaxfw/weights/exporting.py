"""A model directory, or the model of a workdir, to a new directory: parameter by parameter, no model in memory."""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
from flax.traverse_util import unflatten_dict

from jaxfw.core.errors import InputError
from jaxfw.models.hub_names import Stored
from jaxfw.weights import adapter_config, layout, tensors
from jaxfw.weights.adapters import read_adapters
from jaxfw.weights.directory import EMBEDDING, TIED_HEAD, checked, open_directory
from jaxfw.weights.saving import SHARD_BYTES, save

# What is copied beside config.json and tensors: of tokenizers, chat templates, generation, licences.
COPIED = (".json", ".txt", ".model", ".jinja", ".md", ".tiktoken")
LARGEST_COPIED = 2**28


@dataclasses.dataclass(frozen=True)
class _Unread:
    """A parameter that is read when its numbers are asked for, with what an adapter adds to it: (a, b, scale)."""

    reader: tensors.Reader
    stored: Stored
    shape: tuple[int, ...]
    dtype: np.dtype
    adapter: tuple[np.ndarray, np.ndarray, float] | None = None

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        dtype = dtype or self.dtype
        if self.adapter is None:
            return layout.read(self.reader, self.stored, layout.whole(self.shape), dtype)
        a, b, scale = self.adapter
        kernel = layout.read(self.reader, self.stored, layout.whole(self.shape), np.dtype(np.float32))
        return (kernel + np.float32(scale) * (a @ b)).astype(dtype)


def export(
    source: str | Path,
    target: str | Path,
    *,
    param_dtype: str | None = None,
    shard_bytes: int = SHARD_BYTES,
    adapter: str | Path | None = None,
) -> Path:
    """Write a model again: whole, in another dtype, in other shards or with an adapter merged into it.

    Its tokenizer and texts go with it.

    Args:
        source: a directory of the Hub's form, or a workdir with one in its `model` folder.
        target: as the directory of `save`.
        param_dtype: what parameters are written in; None keeps each as it is.
        shard_bytes: as of `save`.
        adapter: a directory of an adapter, as PEFT and `save_adapters` write it.
    """
    source = model_folder(Path(source))
    opened = checked(open_directory(source, param_dtype=param_dtype))
    dtypes, shapes = opened.dtypes(param_dtype), layout.flat_shapes(opened.config)
    added = {}
    if adapter is not None:
        lora, pairs = read_adapters(adapter, opened.config, model_type=opened.family.MODEL_TYPE)
        added = {path: (a, b, lora.scale) for path, (a, b) in pairs.items()}
    with tensors.Reader(opened.found) as reader:
        if opened.config.tie_embeddings:
            tensors.check_tied(reader, TIED_HEAD, opened.stored[EMBEDDING].names[0])
        flat = {
            path: _Unread(reader, entry, shapes[path], np.dtype(dtypes[path]), added.get(path))
            for path, entry in opened.stored.items()
        }
        return save(
            target, opened.config, unflatten_dict(flat, sep="/"), attributes=opened.attributes,
            model_type=opened.family.MODEL_TYPE, shard_bytes=shard_bytes, extra=_beside(source),
        )  # fmt: skip


def model_folder(source: Path) -> Path:
    """The folder of the model: `source`, or its `model` where `source` is a workdir.

    Raises:
        InputError: a workdir without a model.
    """
    if any((source / name).exists() for name in (tensors.SINGLE, tensors.INDEX)) or not source.is_dir():
        return source
    if (source / "model" / "config.json").is_file():
        return source / "model"
    if (source / "adapter" / adapter_config.FILE).is_file():
        raise InputError(
            f"{source} is the workdir of a run that trained an adapter: give its base model, and --adapter={source}."
        )
    if (source / "results.json").exists() or (source / "checkpoints").is_dir():
        raise InputError(
            f"{source} is a workdir without a model folder: its run ended before the model was saved. "
            "The same command goes on from its newest checkpoint."
        )
    return source


def _beside(source: Path) -> dict[str, bytes]:
    ours = {"config.json", tensors.INDEX}
    return {
        path.name: path.read_bytes()
        for path in sorted(source.iterdir())
        if path.is_file() and path.name not in ours and path.stat().st_size <= LARGEST_COPIED
        and (path.suffix in COPIED or path.name.startswith("LICENSE"))
        and not path.name.endswith(".index.json")
    }  # fmt: skip
