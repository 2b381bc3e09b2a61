"""The tensors of a Hugging Face directory, in one file or in shards with an index: read by name, written whole."""

import dataclasses
import json
import re
from collections.abc import Collection, Mapping
from pathlib import Path

import ml_dtypes  # noqa: F401  (registers bfloat16 with numpy, which safetensors' numpy reader needs)
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from jaxfw.core.errors import InputError

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
SHARD_BYTES = 5_000_000_000  # the shard size of transformers before version 5, and of most of the Hub
DTYPES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}  # as a file's header names them, and as we do


@dataclasses.dataclass(frozen=True)
class Header:
    """What a file says of a tensor before any of its bytes are read; `dtype` in the file's own spelling."""

    file: Path
    dtype: str
    shape: tuple[int, ...]


def read_json(path: Path) -> dict:
    """A JSON object from a file; `InputError` names the file when it is absent or damaged."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"{path} does not exist: is this a Hugging Face model directory?") from None
    except OSError as error:
        raise _unreadable(path, error) from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
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
        size = path.stat().st_size
        raise InputError(f"{path} ({size} bytes) is truncated or corrupt ({error}): download it again.") from None


def _headers(file: Path) -> dict[str, Header]:
    with _open(file) as tensors:
        slices = {name: tensors.get_slice(name) for name in tensors.keys()}
        return {name: Header(file, part.get_dtype(), tuple(part.get_shape())) for name, part in slices.items()}


def locate(directory: Path) -> dict[str, Header]:
    """Tensor name -> header, from every file. Checks that each shard exists and holds what the index says."""
    if (directory / SINGLE).exists():
        return _headers(directory / SINGLE)
    if (directory / INDEX).exists():
        found = {}
        for shard, names in _index(directory / INDEX).items():
            headers = _headers(directory / shard)
            absent = sorted(set(names) - set(headers))
            if absent:
                raise InputError(f"{directory / shard} lacks {_few(absent)}, which {INDEX} places there.")
            found |= {name: headers[name] for name in names}
        return found
    pickles = sorted(path.name for path in directory.glob("*") if path.suffix in (".bin", ".pt", ".pth", ".ckpt"))
    if pickles:
        raise InputError(
            f"{directory} holds pickled weights ({_few(pickles)}), which can run code when opened and are not read. "
            "Take the repository's safetensors files, or convert once: transformers' "
            "AutoModelForCausalLM.from_pretrained(DIR).save_pretrained(OUT)."
        )
    raise InputError(f"{directory} holds neither {SINGLE} nor {INDEX}.")


def _index(path: Path) -> dict[str, list[str]]:
    """Shard -> the tensors that the index places there."""
    named = read_json(path).get("weight_map")
    if not isinstance(named, dict) or not named or not all(isinstance(file, str) for file in named.values()):
        raise InputError(f"{path} lacks 'weight_map', the file of each tensor: download it again.")
    shards: dict[str, list[str]] = {}
    for name, file in sorted(named.items(), key=lambda pair: pair[::-1]):
        shards.setdefault(file, []).append(name)
    return shards


def check(
    found: Mapping[str, Header], expected: Mapping[str, tuple[int, ...]], *, ignored: str, optional: Collection[str]
) -> None:
    """Compare names, shapes and dtypes with what the config asks for; one `InputError` lists everything that is off."""
    missing = sorted(set(expected) - set(found))
    extra = set(found) - set(expected) - set(optional)
    unexpected = sorted(name for name in extra if not re.fullmatch(ignored, name))
    misshaped = [
        f"{name} is {list(found[name].shape)}, config.json asks for {list(shape)}"
        for name, shape in sorted(expected.items())
        if name in found and found[name].shape != shape
    ]
    lists = {"missing": missing, "unexpected": unexpected, "misshaped": misshaped}
    problems = [f"{kind}: {_few(names)}" for kind, names in lists.items() if names]
    problems += _odd_dtypes({name: found[name].dtype for name in sorted(found) if name in expected or name in optional})
    if problems:
        raise InputError(f"the tensors do not fit config.json: {'; '.join(problems)}.")


def _odd_dtypes(stored: Mapping[str, str]) -> list[str]:
    odd = sorted(set(stored.values()) - set(DTYPES))
    problems = [f"stored as {dtype}: {_few([n for n in stored if stored[n] == dtype], most=2)}" for dtype in odd]
    if odd:
        problems[-1] += f" (accepted: {', '.join(DTYPES)}. A quantised checkpoint? Take the unquantised one)"
    return problems


def check_tied(found: Mapping[str, Header], name: str, twin: str) -> None:
    """A tensor that is stored although it is tied must equal its twin."""
    if name in found and not np.array_equal(read(found, name), read(found, twin)):
        raise InputError(
            f"the tensors do not fit config.json: {name} differs from {twin}, though config.json says "
            "tie_word_embeddings=true (set it to false)."
        )


def read(found: Mapping[str, Header], name: str) -> np.ndarray:
    """One tensor in its stored dtype."""
    with _open(found[name].file) as tensors:
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
