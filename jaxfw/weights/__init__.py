"""Hugging Face model directories to and from parameter trees; no torch, no transformers."""

from jaxfw.weights.directory import Checkpoint, load, load_config, save

__all__ = ["Checkpoint", "load", "load_config", "save"]
