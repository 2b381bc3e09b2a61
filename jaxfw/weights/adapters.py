"""Adapters as PEFT's files hold them: adapter_config.json and adapter_model.safetensors, both ways.

PEFT names a tensor by the module that it adapts: base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight [R in]
and lora_B.weight [out R]. Where a family keeps several kernels in one module (GPT-2's c_attn), the module's adapter
has their inputs' side in common or, if they differ, one below the other: its rank is then the sum of theirs, and
lora_B is zero outside their blocks. Which ranks belong to which kernel stands in the file's metadata, for `jaxfw` only.
"""

import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import unflatten_dict
from jax.sharding import Mesh
from safetensors import safe_open
from safetensors.numpy import save as to_bytes

from jaxfw.core.errors import InputError
from jaxfw.core.shapes import PyTree
from jaxfw.core.sharding import shardings
from jaxfw.models import DecoderConfig
from jaxfw.models.hub_names import Stored
from jaxfw.models.lora import KERNELS, TARGETS, LoRAConfig, adapter_pairs
from jaxfw.models.sharding import decoder_rules
from jaxfw.weights import adapter_config, layout, tensors
from jaxfw.weights.adapter_config import Described
from jaxfw.weights.families import choose
from jaxfw.weights.saving import on_host, save_files

TENSORS = "adapter_model.safetensors"
PARTS = "jaxfw"  # in the metadata: module -> [kernel, first rank, last rank], ...
_NAME = re.compile(r"base_model\.model\.(.+)\.(lora_[AB])\.weight")
Kernels = dict[str, list[tuple[str, Stored]]]  # module -> the kernels that lie in it, in their order there
Pair = tuple[np.ndarray, np.ndarray]  # a [D R], b [R F]


def save_adapters(
    directory: str | Path,
    config: DecoderConfig,
    adapters: PyTree,
    lora: LoRAConfig,
    *,
    base: str | Path | None = None,
    model_type: str | None = None,
) -> Path:
    """Write adapters as PEFT reads them; the directory appears complete or not at all.

    Args:
        directory: must not exist yet, or be empty.
        config: of the model that they belong to.
        adapters: a key per layer, as `unstack_layers` gives it.
        lora: their scale; ranks are those of the adapters.
        base: where the model lies, for PEFT's base_model_name_or_path.
        model_type: the family whose names are written; None is the first that can express the config.

    Raises:
        InputError: the directory is in use; the adapters are stacked, or of another model.
    """
    pairs = adapter_pairs(adapters)
    modules = _modules(config, model_type)
    shapes = layout.flat_shapes(config)
    _check_fit(pairs, shapes)
    written: dict[str, np.ndarray] = {}
    parts: dict[str, list[tuple[str, int, int]]] = {}
    ranks: dict[str, int] = {}
    for module, kernels in modules.items():
        here = {path: (on_host(pairs[path]["a"]), on_host(pairs[path]["b"])) for path, _ in kernels if path in pairs}
        if not here:
            continue
        a, b, spans = _joined(here, kernels, shapes)
        ranks[module] = a.shape[1]
        if len(kernels) > 1:
            parts[module] = spans
        for name, value in (("lora_A", a), ("lora_B", b)):
            written[f"base_model.model.{module}.{name}.weight"] = np.ascontiguousarray(value.T)
    metadata = {"format": "pt"} | ({PARTS: json.dumps(parts)} if parts else {})
    transposed = {kernels[0][1].transposed for module, kernels in modules.items() if module in ranks}
    described = adapter_config.write(
        lora, ranks, targets=suffixes(ranks, modules), base=base, fan_in_fan_out=not transposed.pop()
    )
    files = {adapter_config.FILE: json.dumps(described, indent=2) + "\n", TENSORS: to_bytes(written, metadata)}
    return save_files(Path(directory), files)


def load_adapters(
    directory: str | Path, config: DecoderConfig, *, mesh: Mesh | None = None, model_type: str | None = None
) -> tuple[PyTree, LoRAConfig]:
    """Adapters that PEFT or `save_adapters` wrote, in float32, and their `LoRAConfig`, for `adapt` and `merge`.

    Args:
        directory: holds adapter_config.json and adapter_model.safetensors; or a workdir with them in `adapter`.
        config: of the model that they belong to.
        mesh: where they go, by `decoder_rules`; None is the default device.
        model_type: the family whose names were written; None is the first that can express the config.

    Raises:
        InputError: files that are missing or damaged; a kind of adapter that is not understood, by the name of its
            field; tensors that are missing, unexpected or misshaped.
    """
    lora, pairs = read_adapters(directory, config, model_type=model_type)
    flat = {f"{path}/{name}": value for path, pair in pairs.items() for name, value in zip("ab", pair, strict=True)}
    tree = unflatten_dict(flat, sep="/")
    if mesh is None:
        return jax.tree.map(jnp.asarray, tree), lora
    return jax.device_put(tree, shardings(decoder_rules(config), mesh, tree)), lora


def read_adapters(
    directory: str | Path, config: DecoderConfig, *, model_type: str | None = None
) -> tuple[LoRAConfig, dict[str, Pair]]:
    """The same on the host: path of each adapted kernel -> (a, b)."""
    directory = adapter_config.folder(Path(directory))
    described = adapter_config.read(directory)
    modules, shapes = _modules(config, model_type), layout.flat_shapes(config)
    found, parts = _read_tensors(directory / TENSORS)
    _check_found(described, found, {module: _sizes(kernels, shapes) for module, kernels in modules.items()})
    pairs: dict[str, Pair] = {}
    for module in dict.fromkeys(module for module, _ in found):
        lora_A, lora_B = found[module, "lora_A"], found[module, "lora_B"]
        kernels = dict(modules[module])
        everything = [(path, 0, len(lora_A)) for path in kernels]
        for path, first, last in parts.get(module, everything):
            if path not in kernels:
                raise InputError(f"{directory}: the metadata of {module} names {path}, which is no part of it.")
            start, size = kernels[path].part or (0, len(lora_B))
            b = lora_B[start : start + size, first:last].T
            pairs[path] = (lora_A[first:last].T, b)
    return described.lora(_targets(pairs, shapes)), pairs


def _read_tensors(path: Path) -> tuple[dict[tuple[str, str], np.ndarray], dict[str, list[Any]]]:
    """(module, "lora_A" or "lora_B") -> the tensor in float32, and what the metadata says of modules' parts."""
    if not path.exists():
        pickled = path.with_suffix(".bin").exists()
        how = "convert adapter_model.bin, which is pickled, by PEFT's save_pretrained()" if pickled else "download it"
        raise InputError(f"{path} is missing: {how}.")
    headers = tensors.headers(path)
    odd = [name for name, header in headers.items() if header.dtype not in tensors.DTYPES or not _NAME.fullmatch(name)]
    if odd:
        raise InputError(
            f"{path} holds {tensors.few(odd)} ({headers[odd[0]].dtype}), which are not read: only lora_A and lora_B of "
            f"linear layers, stored as {', '.join(tensors.DTYPES)}."
        )
    found = {}
    with tensors.Reader(headers) as reader:
        for name, header in headers.items():
            module, part = re.fullmatch(_NAME, name).groups()  # pyright: ignore[reportOptionalMemberAccess]
            found[module, part] = reader.read(name, layout.whole(header.shape)).astype(np.float32)
            if not np.isfinite(found[module, part]).all():
                raise InputError(f"{path}: {name} holds numbers that are not finite: it is of no use.")
    with safe_open(path, framework="np") as file:
        return found, json.loads((file.metadata() or {}).get(PARTS, "{}"))


def _check_found(
    described: Described, found: Mapping[tuple[str, str], np.ndarray], sizes: Mapping[str, tuple[int, int]]
) -> None:
    """Every module is one of the model's, is whole, has the shapes that it should have, and none is left out."""
    here = dict.fromkeys(module for module, _ in found)
    unexpected = [module for module in here if module not in sizes]
    missing = [f"{module}.{part}" for module in here for part in ("lora_A", "lora_B") if (module, part) not in found]
    missing += [module for module in sizes if module not in here and described.asked_for(module)]
    if unexpected or missing:
        said = [f"{kind}: {tensors.few(names)}" for kind, names in
                (("missing", missing), ("unexpected", unexpected)) if names]  # fmt: skip
        raise InputError(
            f"{described.path.parent} does not fit the model: {'; '.join(said)}. What can be adapted are kernels of "
            "attention and of dense or shared feed-forwards: is this the adapter's own base model?"
        )
    for module in here:
        rank, (D, F) = described.rank_of(module), sizes[module]
        for part, wanted in (("lora_A", (rank, D)), ("lora_B", (F, rank))):
            given = found[module, part].shape
            if given != wanted:
                raise InputError(
                    f"{described.path.parent} does not fit the model: {module}.{part} is {list(given)}, wanted "
                    f"{list(wanted)}."
                )


def _modules(config: DecoderConfig, model_type: str | None) -> Kernels:
    """The modules with kernels that can be adapted, as the family of a config names them."""
    modules: Kernels = {}
    for path, stored in choose(config, model_type).tensors(config).items():
        if KERNELS.fullmatch(path):
            modules.setdefault(stored.names[0].removesuffix(".weight"), []).append((path, stored))
    return modules


def _sizes(kernels: list[tuple[str, Stored]], shapes: Mapping[str, tuple[int, ...]]) -> tuple[int, int]:
    """Inputs and outputs of a module."""
    path, _ = kernels[0]
    return shapes[path][0], sum(shapes[path][1] for path, _ in kernels)


def _joined(
    here: Mapping[str, Pair], kernels: list[tuple[str, Stored]], shapes: Mapping[str, tuple[int, ...]]
) -> tuple[np.ndarray, np.ndarray, list[tuple[str, int, int]]]:
    """The one adapter of a module, and which of its ranks belong to each kernel."""
    sides = [a for a, _ in here.values()]
    shared = all(np.array_equal(a, sides[0]) for a in sides)
    ranks = [sides[0].shape[1]] if shared else [a.shape[1] for a in sides]
    first, spans = 0, []
    joined = np.zeros((sum(ranks), _sizes(kernels, shapes)[1]), np.float32)
    for path, stored in kernels:
        if path not in here:
            continue
        b = here[path][1]
        start, size = stored.part or (0, b.shape[1])
        joined[first : first + len(b), start : start + size] = b
        spans.append((path, first, first + len(b)))
        first += 0 if shared else len(b)
    return sides[0] if shared else np.concatenate(sides, axis=1), joined, spans


def _check_fit(pairs: Mapping[str, Mapping[str, Any]], shapes: Mapping[str, tuple[int, ...]]) -> None:
    for path, pair in pairs.items():
        if path not in shapes:
            how = "unstack_layers(adapters) first" if path.startswith("layers/") else "give the model's own config"
            raise InputError(f"the adapters hold {path}, which the model lacks: {how}.")
        given = (*pair["a"].shape[:-1], *pair["b"].shape[1:])
        if given != shapes[path] or pair["a"].shape[-1] != pair["b"].shape[0]:
            raise InputError(f"the adapter of {path} fits a kernel {list(given)}, the model has {list(shapes[path])}.")


def suffixes(wanted: Iterable[str], known: Iterable[str]) -> list[str]:
    """The shortest ends of dotted names that match all `wanted` and no other `known` name.

    >>> suffixes(["h.0.attn.c_proj", "h.1.attn.c_proj"], ["h.0.attn.c_proj", "h.0.mlp.c_proj", "h.1.attn.c_proj"])
    ['attn.c_proj']
    """
    wanted, found = set(wanted), []
    others = [f".{name}" for name in known if name not in wanted]
    for name in sorted(wanted):
        words = name.split(".")
        ends = (".".join(words[i:]) for i in range(len(words) - 1, -1, -1))
        end = next(end for end in ends if not any(other.endswith(f".{end}") for other in others))
        if end not in found:
            found.append(end)
    return found


def _targets(pairs: Iterable[str], shapes: Iterable[str]) -> str:
    """A value of `LoRAConfig.targets` that matches just these kernels of the model."""
    paths = set(pairs)
    every = [path for path in shapes if KERNELS.fullmatch(path)]
    kinds = sorted({path.partition("/")[2].removesuffix("/kernel") for path in paths})
    for targets in (*TARGETS, rf"layers_\d+/({'|'.join(kinds)})/kernel"):
        if {path for path in every if re.fullmatch(LoRAConfig(targets=targets).pattern, path)} == paths:
            return targets
    return "|".join(sorted(paths))
