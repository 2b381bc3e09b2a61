"""A whole Hugging Face model directory: config.json and tensors to (config, parameters), and back."""

import dataclasses
import json
import os
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
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
TIED_HEAD = "lm_head.weight"  # some files hold it beside the embedding that it equals


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
        InputError: unknown family or attribute; missing, unexpected, misshaped or quantised tensors; damaged files;
            pickles.
    """
    found = _inspect(directory, param_dtype=param_dtype, dtype=dtype, softmax_dtype=softmax_dtype)
    names = found.family.tensor_names(found.config)
    if found.config.tie_embeddings:
        tensors.check_tied(found.headers, TIED_HEAD, names["embed/embedding"])
    flat = {}
    for path, name in names.items():
        value = tensors.read(found.headers, name)
        if _is_kernel(path):
            value = np.ascontiguousarray(value.T)
        flat[path] = jnp.asarray(value, None if param_dtype is None else jnp.dtype(param_dtype))
    return Checkpoint(found.config, unflatten_dict(flat, sep="/"), found.attributes)


def load_config(
    directory: str | Path,
    *,
    param_dtype: str | None = None,
    dtype: str | None = None,
    softmax_dtype: str = "float32",
) -> DecoderConfig:
    """The `config` that `load` would give, with its keywords and refusals; of the tensors, only headers are read."""
    return _inspect(directory, param_dtype=param_dtype, dtype=dtype, softmax_dtype=softmax_dtype).config


@dataclasses.dataclass(frozen=True)
class _Inspected:
    config: DecoderConfig
    family: ModuleType
    headers: dict[str, tensors.Header]
    attributes: dict[str, Any]


def _inspect(directory: str | Path, *, param_dtype: str | None, dtype: str | None, softmax_dtype: str) -> _Inspected:
    """config.json and the headers of the files, checked against each other."""
    directory = _existing(directory)
    attributes = tensors.read_json(directory / "config.json")
    model_type = attributes.get("model_type")
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        raise unknown("config.json: model_type", model_type, FAMILIES)
    family, headers = FAMILIES[model_type], tensors.locate(directory)
    stored = _stored_dtype(headers)
    config = family.read_config(
        attributes,
        param_dtype=_dtype_name("param_dtype", param_dtype or stored),
        dtype=_dtype_name("dtype", dtype or stored),
        softmax_dtype=_dtype_name("softmax_dtype", softmax_dtype),
    )
    shapes = _shapes(config)
    expected = {name: _stored_shape(path, shapes[path]) for path, name in family.tensor_names(config).items()}
    tensors.check(headers, expected, ignored=family.IGNORED_TENSORS, optional=(TIED_HEAD,))
    return _Inspected(config, family, headers, attributes)


def _dtype_name(field: str, value: Any) -> str:
    """`bfloat16` for "bfloat16", `jnp.bfloat16` and the like."""
    try:
        name = jnp.dtype(value).name
    except TypeError:
        name = None
    if name not in DTYPES:
        raise unknown(field, value, DTYPES)
    return name


def _existing(directory: str | Path) -> Path:
    if os.path.isdir(directory):
        return Path(directory)
    message = f"{directory} is not a directory: give the folder that holds config.json."
    if re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", str(directory)) and not os.path.exists(directory):
        message += (
            " If it is a Hub id: nothing is downloaded here, so first run "
            f"`hf download {directory} --local-dir DIR` (of huggingface_hub), then give DIR."
        )
    raise InputError(message)


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
    _check_params(config, flat)
    stored = {
        name: np.ascontiguousarray(np.asarray(flat[path]).T) if _is_kernel(path) else np.asarray(flat[path])
        for path, name in names.items()
    }
    config = dataclasses.replace(config, param_dtype=str(flat["embed/embedding"].dtype))
    described = {**(attributes or {}), **family.write_config(config)}
    partial = directory.with_name(f".{directory.name}.partial-{os.getpid()}")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    tensors.write(partial, dict(sorted(stored.items())), shard_bytes=shard_bytes)
    (partial / "config.json").write_text(json.dumps(described, indent=2) + "\n", encoding="utf-8")
    for file in partial.glob("*.safetensors"):
        shutil.copymode(partial / "config.json", file)  # the library makes files that only their owner can read
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
    return tuple(reversed(shape)) if _is_kernel(path) else shape


def _shapes(config: DecoderConfig) -> dict[str, tuple[int, ...]]:
    tree = jax.eval_shape(lambda: init(config, jax.random.key(0)))
    leaves: dict[str, Any] = flatten_dict(tree, sep="/")
    return {path: tuple(leaf.shape) for path, leaf in leaves.items()}


def _check_params(config: DecoderConfig, flat: Mapping[str, Any]) -> None:
    """Names, shapes and dtypes of the parameters; the first that does not fit is named."""
    shapes = _shapes(config)
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


def _stored_dtype(headers: Mapping[str, tensors.Header]) -> str:
    """That of the embedding; one that is absent or not accepted is reported by `tensors.check`, with the rest."""
    header = next((header for name, header in headers.items() if name.endswith("embed_tokens.weight")), None)
    return tensors.DTYPES.get(header.dtype, DTYPES[0]) if header else DTYPES[0]
