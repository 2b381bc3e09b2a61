"""A Hugging Face model directory as it is read: config.json and tensors to (config, parameters)."""

import dataclasses
import os
import re
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import jax.numpy as jnp
from jax.sharding import Mesh

from jaxfw.core.errors import InputError, unknown
from jaxfw.core.shapes import PyTree
from jaxfw.models import DecoderConfig
from jaxfw.models.hub_names import Stored
from jaxfw.nn.config import DTYPES
from jaxfw.weights import layout, refusals, tensors
from jaxfw.weights.arrays import make_params
from jaxfw.weights.families import family
from jaxfw.weights.memory import preflight
from jaxfw.weights.shipped import located

TIED_HEAD = "lm_head.weight"  # some files hold it beside the embedding that it equals
EMBEDDING = "embed/embedding"
WIDEST = "float32"


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """What a directory holds; `attributes` is config.json as it was read."""

    config: DecoderConfig
    params: PyTree
    attributes: dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Opened:
    """config.json and the headers of the files, before any tensor is read.

    Attributes:
        config: what the family reads from config.json.
        family: its module.
        stored: path of each parameter -> the tensors that it lies in.
        found: tensor name, as the family has it -> header.
        difference: how the tensors differ from what config.json asks for.
        attributes: config.json.
    """

    config: DecoderConfig
    family: ModuleType
    stored: dict[str, Stored]
    found: dict[str, tensors.Header]
    difference: tensors.Difference
    attributes: dict[str, Any]

    def dtypes(self, param_dtype: str | None) -> dict[str, jnp.dtype]:
        """Path -> dtype of each parameter: `param_dtype`, else its tensor's, or what config.json widens that to."""
        if param_dtype is not None or _is_widened(self.attributes):
            return dict.fromkeys(self.stored, jnp.dtype(param_dtype or WIDEST))
        spelled = {path: self.found[entry.names[0]].dtype for path, entry in self.stored.items()}
        return {path: jnp.dtype(tensors.DTYPES[dtype]) for path, dtype in spelled.items()}


def load(
    directory: str | Path,
    *,
    mesh: Mesh | None = None,
    param_dtype: str | None = None,
    dtype: str | None = None,
    softmax_dtype: str = "float32",
    quantise: str | None = None,
) -> Checkpoint:
    """Read config.json and the safetensors of a directory into parameters on devices, one parameter at a time.

    Beside the parameters, at most one of them is held in memory. With a mesh, each process reads only what its devices
    hold, laid out by `jaxfw.models.sharding.decoder_rules`.

    Args:
        directory: holds config.json and model.safetensors, or shards with an index; or the name of a model that comes
            with jaxfw, "embedded-1".
        mesh: where the parameters go; None is the default device.
        param_dtype: what parameters are kept in; None keeps each tensor as it is stored, or in float32 where
            config.json's `dtype` says so of narrower tensors.
        dtype: what they are multiplied in; None means what the embedding is kept in.
        softmax_dtype: what attention weights are computed in.
        quantise: "int8" or "int4" keeps the matrices of attention, feed-forwards, experts and an untied head as
            `jaxfw.ops.quant.Quantised`, whose bounds on the error are there; the rest stays as it is.

    Raises:
        InputError: unknown family or attribute; missing, unexpected, misshaped or quantised tensors; damaged files;
            pickles, GGUF files, adapters; more bytes than the devices have free.
    """
    found = checked(open_directory(directory, param_dtype=param_dtype, dtype=dtype, softmax_dtype=softmax_dtype))
    dtypes = found.dtypes(param_dtype)
    preflight(found.config, mesh=mesh, quantise=quantise, dtypes=dtypes)
    with tensors.Reader(found.found) as reader:
        if found.config.tie_embeddings:
            tensors.check_tied(reader, TIED_HEAD, found.stored[EMBEDDING].names[0])
        params = make_params(found.config, reader, found.stored, dtypes, mesh=mesh, quantise=quantise)
    return Checkpoint(found.config, params, found.attributes)


def load_config(
    directory: str | Path,
    *,
    param_dtype: str | None = None,
    dtype: str | None = None,
    softmax_dtype: str = "float32",
) -> DecoderConfig:
    """The `config` that `load` would give, with its keywords and refusals; of the tensors, only headers are read."""
    opened = open_directory(directory, param_dtype=param_dtype, dtype=dtype, softmax_dtype=softmax_dtype)
    return checked(opened).config


def open_directory(
    directory: str | Path,
    *,
    param_dtype: str | None = None,
    dtype: str | None = None,
    softmax_dtype: str = "float32",
) -> Opened:
    """config.json and the headers of the files beside each other; that they differ is for the caller to refuse."""
    directory = _existing(directory)
    refusals.check_files(directory)
    attributes = tensors.read_json(directory / "config.json")
    refusals.check_attributes(attributes)
    module, given = family(attributes.get("model_type")), {"param_dtype": param_dtype, "dtype": dtype}
    found = tensors.renamed(tensors.locate(directory), getattr(module, "ALIASES", ()))
    config = module.read_config(
        attributes,
        softmax_dtype=_dtype_name("softmax_dtype", softmax_dtype),
        **{name: _dtype_name(name, value or DTYPES[0]) for name, value in given.items()},
    )
    stored = module.tensors(config)
    kept = WIDEST if _is_widened(attributes) else _stored_dtype(found, stored)
    config = dataclasses.replace(config, **{name: kept for name, value in given.items() if value is None})
    expected = layout.stored_shapes(stored, layout.flat_shapes(config))
    difference = tensors.compare(found, expected, ignored=module.IGNORED_TENSORS, optional=(TIED_HEAD,))
    return Opened(config, module, stored, found, difference, attributes)


def checked(opened: Opened) -> Opened:
    """The same, or an `InputError` that lists how its tensors differ from config.json."""
    if opened.difference.problems:
        raise InputError(f"the tensors do not fit config.json: {'; '.join(opened.difference.problems)}.")
    return opened


def _is_widened(attributes: Mapping[str, Any]) -> bool:
    """Files in 16 bits may say that they are meant for arithmetic in 32, which loses nothing."""
    return attributes.get("dtype", attributes.get("torch_dtype")) == WIDEST


def _stored_dtype(found: Mapping[str, tensors.Header], stored: Mapping[str, Stored]) -> str:
    """That of the embedding; one that is absent or not accepted is reported with the other differences."""
    header = found.get(stored[EMBEDDING].names[0])
    return tensors.DTYPES.get(header.dtype, DTYPES[0]) if header else DTYPES[0]


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
    found = located(directory)
    if found.is_dir():
        return found
    refusals.check_path(found)
    message = f"{directory} is not a directory: give the folder that holds config.json."
    if re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", str(directory)) and not os.path.exists(directory):
        message += (
            " If it is a Hub id: nothing is downloaded here, so first run "
            f"`hf download {directory} --local-dir DIR` (of huggingface_hub), then give DIR."
        )
    raise InputError(message)
