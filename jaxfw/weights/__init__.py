"""Hugging Face model directories to and from parameter trees, streaming; no torch, no transformers.

python -m jaxfw.weights inspect DIR
"""

from jaxfw.weights.adapters import load_adapters, save_adapters
from jaxfw.weights.arrays import abstract_params, quantise_params
from jaxfw.weights.directory import Checkpoint, load, load_config
from jaxfw.weights.memory import device_bytes, preflight
from jaxfw.weights.saving import save
from jaxfw.weights.shipped import model_sha256

__all__ = [
    "Checkpoint", "abstract_params", "device_bytes", "load", "load_adapters", "load_config", "model_sha256",
    "preflight", "quantise_params", "save", "save_adapters",
]  # fmt: skip
