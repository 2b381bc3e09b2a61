"""A whole Hugging Face model directory: config.json and tensors to (config, parameters), and back."""

import dataclasses
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from jaxfw.core.errors import InputError, unknown
from jaxfw.core.shapes import PyTree
from jaxfw.models import DecoderConfig, init, llama
from jaxfw.nn.config import DTYPES
from jaxfw.weights import tensors

FAMILIES = {llama.MODEL_TYPE: llama}


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """What a directory holds; `attributes` is config.json as it was read."""

    config: DecoderConfig
    params: PyTree
    attributes: dict[str, Any]


def load(
    directory: str | Path,
    *,
    param_dtype: str | None = None,
    dtype: str | None = None,
    softmax_dtype: str = "float32",
) -> Checkpoint:
    """Read config.json and the safetensors of a directory into parameters on the default device.

    Args:
        directory: holds config.json and model.safetensors, or shards with an index.
        param_dtype: what parameters are kept in; None keeps each tensor as it is stored.
        dtype: what they are multiplied in; None means the stored dtype of the embedding.
        softmax_dtype: what attention weights are computed in.

    Raises:
        InputError: unknown family or attribute; missing, unexpected or misshaped tensors; damaged files; pickles.
    """
    directory = Path(directory)
    if not directory.is_dir():
        raise InputError(f"{directory} is not a directory: give the folder that holds config.json.")
    attributes = tensors.read_json(directory / "config.json")
    family = FAMILIES.get(attributes.get("model_type", ""))
    if family is None:
        raise unknown("config.json: model_type", attributes.get("model_type"), FAMILIES)
    files = tensors.locate(directory)
    stored = _stored_dtype(files)
    for name, value in {"param_dtype": param_dtype, "dtype": dtype, "softmax_dtype": softmax_dtype}.items():
        if value is not None and value not in DTYPES:
            raise unknown(name, value, DTYPES)
    config = family.read_config(
        attributes, param_dtype=param_dtype or stored, dtype=dtype or stored, softmax_dtype=softmax_dtype
    )
    names = family.tensor_names(config)
    shapes: dict[str, Any] = flatten_dict(jax.eval_shape(lambda: init(config, jax.random.key(0))), sep="/")
    expected = {name: _stored_shape(path, shapes[path].shape) for path, name in names.items()}
    tied = {"lm_head.weight": names["embed/embedding"]} if config.tie_embeddings else {}
    tensors.check(files, expected, ignored=family.IGNORED_TENSORS, tied=tied)
    flat = {}
    for path, name in names.items():
        value = tensors.read(files, name)
        if _is_kernel(path):
            value = np.ascontiguousarray(value.T)
        flat[path] = jnp.asarray(value, None if param_dtype is None else jnp.dtype(param_dtype))
    return Checkpoint(config, unflatten_dict(flat, sep="/"), attributes)


def save(
    directory: str | Path,
    config: DecoderConfig,
    params: PyTree,
    *,
    attributes: Mapping[str, Any] | None = None,
    model_type: str = llama.MODEL_TYPE,
    shard_bytes: int = tensors.SHARD_BYTES,
    extra: Mapping[str, bytes | str] | None = None,
) -> Path:
    """Write config.json and safetensors as the Hub holds them: its tensor names, each in the parameter's own dtype.

    Args:
        directory: must not exist yet, or be empty: nothing is overwritten. It appears complete or not at all.
        config: the model; its `param_dtype` should be that of `params`.
        params: the parameter tree.
        attributes: further attributes for config.json (token ids, say).
        model_type: the family whose names are written.
        shard_bytes: a larger model is cut into shards of at most this many bytes.
        extra: further files, by their path in the directory (those of a tokenizer, say).

    Raises:
        InputError: the directory is in use, or the tree does not fit the config.
    """
    directory = Path(directory)
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise InputError(f"{directory} exists and is not empty: give a new directory, or remove it first.")
    family = FAMILIES[model_type]
    flat: dict[str, Any] = flatten_dict(params, sep="/")
    names = family.tensor_names(config)
    if set(flat) != set(names):
        odd = sorted(set(flat) ^ set(names))
        raise InputError(f"params do not fit the config: {', '.join(odd[:5])} is in one of the two only.")
    stored = {
        name: np.ascontiguousarray(np.asarray(flat[path]).T) if _is_kernel(path) else np.asarray(flat[path])
        for path, name in names.items()
    }
    config = dataclasses.replace(config, param_dtype=str(flat["embed/embedding"].dtype))
    partial = directory.with_name(f".{directory.name}.partial-{os.getpid()}")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    tensors.write(partial, dict(sorted(stored.items())), shard_bytes=shard_bytes)
    described = {**(attributes or {}), **family.write_config(config)}
    (partial / "config.json").write_text(json.dumps(described, indent=2) + "\n", encoding="utf-8")
    for name, content in (extra or {}).items():
        (partial / name).parent.mkdir(parents=True, exist_ok=True)
        (partial / name).write_bytes(content.encode() if isinstance(content, str) else content)
    if directory.exists():
        directory.rmdir()
    partial.rename(directory)
    return directory


def _is_kernel(path: str) -> bool:
    """Kernels are [in, out] here and [out, in] on the Hub; everything else has the same shape in both."""
    return path.endswith("/kernel")


def _stored_shape(path: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(reversed(shape)) if _is_kernel(path) else tuple(shape)


def _stored_dtype(files: Mapping[str, Path]) -> str:
    name = next((name for name in files if name.endswith("embed_tokens.weight")), next(iter(files)))
    dtype = str(tensors.read(files, name).dtype)
    if dtype not in DTYPES:
        raise InputError(f"{files[name]}: {name} is stored as {dtype}; accepted: {', '.join(DTYPES)}.")
    return dtype
