"""Small model directories, ways to damage them, and what a refusal must look like."""

import json

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from jaxfw.core.errors import InputError
from jaxfw.models import DecoderConfig, Rope
from jaxfw.weights import load

CONFIG = DecoderConfig(
    vocab=32, width=16, ffn=24, layers=2, heads=4, kv_heads=2, head_dim=8, positions=64, qkv_bias=True,
    out_bias=True, rope=Rope(kind="llama3", factor=8.0, original_positions=16),
)  # fmt: skip
TIED = DecoderConfig(
    vocab=32, width=16, ffn=24, layers=2, heads=4, kv_heads=2, head_dim=8, positions=64, tie_embeddings=True
)
EMBEDDING, QUERY = "model.embed_tokens.weight", "model.layers.0.self_attn.q_proj.weight"
DOWN = "model.layers.0.mlp.down_proj.weight"


def rewrite(directory, change):
    """Replace the tensors of model.safetensors by `change(tensors)`."""
    path = directory / "model.safetensors"
    tensors = load_file(path)
    save_file(change(dict(tensors)), path, metadata={"format": "pt"})


def set_attributes(directory, **attributes):
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | attributes))


def refused(directory, *parts):
    """Load, expect a refusal, and check that its message has each part."""
    with pytest.raises(InputError) as caught:
        load(directory)
    message = str(caught.value)
    for part in parts:
        assert str(part) in message
    assert message.count("\n") == 0 and len(message) < 600
    return message


def equal(a, b):
    same = jax.tree.map(lambda x, y: x.dtype == y.dtype and np.array_equal(x, y), a, b)
    return jax.tree.structure(a) == jax.tree.structure(b) and jax.tree.all(same)
