"""Presets have as many parameters as transformers' own models of those sizes, built without memory."""

import jax
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.oracle

from jaxfw.models import init  # noqa: E402
from jaxfw.models.llama import write_config  # noqa: E402
from jaxfw.models.presets import preset  # noqa: E402

LLAMAS = ["llama-3.1-8b", "llama-3.1-70b", "llama-3.2-1b"]


def sizes_there(config, kind):
    """Parameter sizes of a model on the meta device, each once."""
    with torch.device("meta"):
        model = kind(config)
    return sorted(p.numel() for p in model.parameters())


def sizes_here(name):
    return sorted(leaf.size for leaf in jax.tree.leaves(jax.eval_shape(lambda: init(preset(name), jax.random.key(0)))))


@pytest.mark.parametrize("name", LLAMAS)
def test_llamas(name):
    config = transformers.LlamaConfig(**write_config(preset(name)))
    assert sizes_there(config, transformers.LlamaForCausalLM) == sizes_here(name)


def test_mixtral():
    """Experts may be stored apart or together, gate and up in one: only their sum is the same."""
    config = transformers.MixtralConfig(
        vocab_size=32000, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32,
        num_key_value_heads=8, num_local_experts=8, num_experts_per_tok=2, tie_word_embeddings=False,
    )  # fmt: skip
    assert sum(sizes_there(config, transformers.MixtralForCausalLM)) == sum(sizes_here("mixtral-8x7b"))
