"""The tensors of a Hugging Face directory, in one file or in shards with an index: read by name, written whole."""

import json
import re
from collections.abc import Mapping
from pathlib import Path

import ml_dtypes  # noqa: F401  (registers bfloat16 with numpy, which safetensors' numpy reader needs)
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from jaxfw.core.errors import InputError

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
SHARD_BYTES = 5_000_000_000  # the shard size of transformers before version 5, and of most of the Hub


def read_json(path: Path) -> dict:
    """A JSON object from a file; `InputError` names the file when it is absent or damaged."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"{path} does not exist: is this a Hugging Face model directory?") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"{path} is not valid JSON ({error}): download it again.") from None
    if not isinstance(value, dict):
        raise InputError(f"{path} must hold a JSON object, not {type(value).__name__}.")
    return value


def _open(path: Path):
    try:
        return safe_open(path, framework="np")
    except FileNotFoundError:
        raise InputError(f"{path} is missing, but the index names it: download the missing shard.") from None
    except SafetensorError as error:
        size = path.stat().st_size
        raise InputError(f"{path} ({size} bytes) is truncated or corrupt ({error}): download it again.") from None


def locate(directory: Path) -> dict[str, Path]:
    """Tensor name -> file that holds it. Checks that every shard exists and holds what the index says."""
    if (directory / SINGLE).exists():
        file = directory / SINGLE
        with _open(file) as tensors:
            return dict.fromkeys(tensors.keys(), file)
    if (directory / INDEX).exists():
        named = read_json(directory / INDEX).get("weight_map")
        if not isinstance(named, dict):
            raise InputError(f"{directory / INDEX} lacks 'weight_map': download it again.")
        for shard in sorted(set(named.values())):
            with _open(directory / shard) as tensors:
                absent = sorted(name for name, file in named.items() if file == shard and name not in tensors.keys())
            if absent:
                raise InputError(f"{directory / shard} lacks {_few(absent)}, which {INDEX} places there.")
        return {name: directory / shard for name, shard in named.items()}
    pickles = sorted(path.name for path in directory.glob("*") if path.suffix in (".bin", ".pt", ".pth", ".ckpt"))
    if pickles:
        raise InputError(
            f"{directory} holds pickled weights ({_few(pickles)}), which can run code when opened and are not read. "
            "Take the repository's safetensors files, or convert once: transformers' "
            "AutoModelForCausalLM.from_pretrained(DIR).save_pretrained(OUT)."
        )
    raise InputError(f"{directory} holds neither {SINGLE} nor {INDEX}.")


def check(
    files: Mapping[str, Path], expected: Mapping[str, tuple[int, ...]], *, ignored: str, tied: Mapping[str, str]
) -> None:
    """Compare names and shapes with what the config asks for; one `InputError` lists everything that is off.

    `tied` maps names that may be present without need to the name they must equal.
    """
    problems = []
    missing = sorted(set(expected) - set(files))
    unexpected = sorted(
        name for name in files if name not in expected and name not in tied and not re.fullmatch(ignored, name)
    )
    if missing:
        problems.append(f"missing: {_few(missing)}")
    if unexpected:
        problems.append(f"unexpected: {_few(unexpected)}")
    misshaped = []
    for file in sorted(set(files.values())):
        with _open(file) as tensors:
            for name in tensors.keys():
                if files.get(name) == file and name in expected:
                    shape = tuple(tensors.get_slice(name).get_shape())
                    if shape != expected[name]:
                        misshaped.append(f"{name} is {list(shape)}, config.json asks for {list(expected[name])}")
    if misshaped:
        problems.append(f"misshaped: {_few(misshaped)}")
    for name, twin in tied.items():
        if name in files and twin in files and not np.array_equal(read(files, name), read(files, twin)):
            problems.append(
                f"{name} differs from {twin}, though config.json says tie_word_embeddings=true (set it to false)"
            )
    if problems:
        raise InputError(f"the tensors do not fit config.json: {'; '.join(problems)}.")


def read(files: Mapping[str, Path], name: str) -> np.ndarray:
    """One tensor in its stored dtype."""
    with _open(files[name]) as tensors:
        return tensors.get_tensor(name)


def write(directory: Path, tensors: Mapping[str, np.ndarray], *, shard_bytes: int = SHARD_BYTES) -> None:
    """Write one file, or numbered shards and an index when the total exceeds `shard_bytes`, named as on the Hub."""
    shards: list[dict[str, np.ndarray]] = [{}]
    size = 0
    for name, tensor in tensors.items():
        if shards[-1] and size + tensor.nbytes > shard_bytes:
            shards.append({})
            size = 0
        shards[-1][name] = tensor
        size += tensor.nbytes
    if len(shards) == 1:
        save_file(shards[0], directory / SINGLE, metadata={"format": "pt"})
        return
    weight_map = {}
    for i, shard in enumerate(shards, start=1):
        file = f"model-{i:05d}-of-{len(shards):05d}.safetensors"
        save_file(shard, directory / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(shard, file)
    total = sum(tensor.nbytes for tensor in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    (directory / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _few(names: list[str], most: int = 5) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more
