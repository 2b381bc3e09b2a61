"""Hugging Face model directories to and from parameter trees; no torch, no transformers."""

from jaxfw.weights.directory import Checkpoint, load, save

__all__ = ["Checkpoint", "load", "save"]
