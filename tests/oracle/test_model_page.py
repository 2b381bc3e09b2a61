"""The family written on the page docs/add_a_model.md computes what transformers does."""

import re

import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.oracle

from jaxfw.models import forward  # noqa: E402
from jaxfw.weights import load  # noqa: E402
from tests.model_page import register  # noqa: E402


def starcoder2(seed: int):
    """A small model in which everything matters: sharp attention, biases, a window far shorter than the text."""
    config = transformers.Starcoder2Config(
        vocab_size=61, hidden_size=32, intermediate_size=72, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, sliding_window=7, max_position_embeddings=64, attn_implementation="eager",
        bos_token_id=1, eos_token_id=2, rope_parameters={"rope_type": "default", "rope_theta": 500.0},
    )  # fmt: skip
    model = transformers.Starcoder2ForCausalLM(config).eval()
    rng = np.random.default_rng(seed)
    for name, tensor in model.named_parameters():
        drawn = rng.standard_normal(tuple(tensor.shape)) * (0.5 if re.search(r"[qk]_proj.weight", name) else 0.2)
        tensor.data.copy_(torch.from_numpy((drawn + ("norm.weight" in name)).astype(np.float32)))
    return model


def test_its_logits_equal_transformers(tmp_path, monkeypatch):
    register(monkeypatch)
    model = starcoder2(0)
    model.save_pretrained(tmp_path)
    ours = load(tmp_path)
    assert ours.config.window == 7 and not ours.config.gated
    tokens = np.random.default_rng(1).integers(0, 61, (2, 40))
    with torch.no_grad():
        theirs = model(input_ids=torch.from_numpy(tokens)).logits.numpy()
    error = np.abs(forward(ours.config, ours.params, tokens.astype(np.int32)).logits - theirs).max()
    assert theirs.std() > 1 and error / theirs.std() < 1e-5
