"""Files and checkpoints that are not read, each by its name and with what to do instead."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jaxfw.core.errors import InputError

LFS = b"version https://git-lfs"
PICKLES = (".bin", ".pt", ".pth", ".ckpt")
# quant_method of a config.json -> what people call it.
METHODS = {
    "fp8": "FP8",
    "fbgemm_fp8": "FP8 (FBGEMM)",
    "gptq": "GPTQ",
    "awq": "AWQ",
    "bitsandbytes": "bitsandbytes",
    "compressed-tensors": "compressed-tensors",
    "mxfp4": "MXFP4",
}
_REMEDY = (
    "such tensors are not read. Take the unquantised repository (the base model that its page names) and give "
    "quantise='int8' or quantise='int4', which quantises while it loads"
)


def check_attributes(attributes: Mapping[str, Any]) -> None:
    """Raise an `InputError` for a config.json of a quantised checkpoint."""
    for key in ("quantization_config", "compression_config"):
        found = attributes.get(key)
        if found is None:
            continue
        method = found.get("quant_method") if isinstance(found, dict) else None
        if method is None and isinstance(found, dict) and {"load_in_4bit", "load_in_8bit"} & set(found):
            method = "bitsandbytes"
        method = method or ("compressed-tensors" if key == "compression_config" else None)
        said = METHODS.get(str(method).lower(), method)
        raise InputError(
            f"config.json: {key} says that this checkpoint is quantised by {said or 'an unnamed method'}: {_REMEDY}."
        )


def check_files(directory: Path) -> None:
    """Raise an `InputError` if what a directory without a model in safetensors holds is known, but not read."""
    if any(directory.glob("model*.safetensors*")):
        return
    names = sorted(path.name for path in directory.iterdir() if path.is_file() or path.is_symlink())
    pickles = [name for name in names if Path(name).suffix in PICKLES and not name.startswith("adapter_model")]
    gguf = [name for name in names if name.endswith(".gguf")]
    if "adapter_config.json" in names:
        raise InputError(
            f"{directory} holds an adapter (adapter_config.json), not a model: give its base model's directory, and "
            "the adapter beside it, jaxfw.load(BASE, adapter=...); or merge the two, `python -m jaxfw.weights export "
            "BASE NEW --adapter=...`."
        )
    if gguf:
        raise InputError(f"{directory} holds GGUF files ({gguf[0]}): {_REMEDY}.")
    if pickles:
        raise InputError(
            f"{directory} holds pickled weights ({_few(pickles)}), which can run code when opened and are not read. "
            "Take the repository's safetensors files, or convert once: transformers' "
            "AutoModelForCausalLM.from_pretrained(DIR).save_pretrained(OUT)."
        )


def check_path(path: Path) -> None:
    """Raise an `InputError` if a single file of weights is given where a directory is wanted."""
    if path.suffix == ".gguf":
        raise InputError(f"{path} is a GGUF file: {_REMEDY}.")
    if path.is_file() and path.suffix in PICKLES:
        raise InputError(
            f"{path} is a file of pickled weights, which can run code when opened: give a directory with safetensors."
        )


def check_pointer(path: Path) -> None:
    """Raise an `InputError` if the file is what git leaves in place of a large file that it did not fetch."""
    with path.open("rb") as file:
        is_pointer = file.read(len(LFS)) == LFS
    if is_pointer:
        raise InputError(
            f"{path} is a Git-LFS pointer, not the file itself: run `git lfs install && git lfs pull` in the "
            "repository, or `hf download` it."
        )


def _few(names: list[str], most: int = 5) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
