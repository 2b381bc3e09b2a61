"""The family written on the page docs/add_a_model.md reads and writes files like the ten that are built in."""

import json
import re
from pathlib import Path

import jax
import numpy as np
import pytest

from jaxfw.core.errors import InputError
from jaxfw.models import forward, init
from jaxfw.weights import load, save
from tests.model_page import PAGE, page_module, register

# As far as remembered from bigcode/starcoder2-7b.
PUBLISHED = {
    "architectures": ["Starcoder2ForCausalLM"], "attention_dropout": 0.1, "bos_token_id": 0, "embedding_dropout": 0.1,
    "eos_token_id": 0, "hidden_act": "gelu_pytorch_tanh", "hidden_size": 4608, "initializer_range": 0.018042,
    "intermediate_size": 18432, "max_position_embeddings": 16384, "mlp_type": "default", "model_type": "starcoder2",
    "norm_epsilon": 1e-05, "norm_type": "layer_norm", "num_attention_heads": 36, "num_hidden_layers": 32,
    "num_key_value_heads": 4, "residual_dropout": 0.1, "rope_theta": 1000000, "sliding_window": 4096,
    "torch_dtype": "bfloat16", "transformers_version": "4.37.0.dev0", "use_bias": True, "use_cache": True,
    "vocab_size": 49152,
}  # fmt: skip
SMALL = {
    "hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 32,
    "num_hidden_layers": 2, "max_position_embeddings": 64, "sliding_window": 5,
}  # fmt: skip
DTYPES = dict.fromkeys(("param_dtype", "dtype", "softmax_dtype"), "float32")


def test_the_published_file_and_the_newer_form_say_the_same():
    module = page_module()
    config = module.read_config(PUBLISHED, **DTYPES)
    assert (config.window, config.head_dim, config.tie_embeddings, config.mlp_bias) == (4096, 128, True, True)
    written = json.loads(json.dumps(module.write_config(config)))
    assert module.read_config(written, **DTYPES) == config
    newer = {
        name: value for name, value in written.items() if name not in ("rope_theta", "rope_scaling", "torch_dtype")
    }
    assert module.read_config(newer, **DTYPES) == config


@pytest.mark.parametrize("changed", [{"norm_type": "rms_norm"}, {"hidden_act": "relu"}, {"parallel": True}])
def test_what_it_does_not_know_is_refused(changed):
    with pytest.raises(InputError, match=next(iter(changed))):
        page_module().read_config(PUBLISHED | changed, **DTYPES)


def test_a_model_goes_through_files_and_keeps_its_logits(tmp_path, monkeypatch):
    module = register(monkeypatch)
    config = module.read_config(PUBLISHED | SMALL, **DTYPES)
    params = init(config, jax.random.key(0))
    directory = save(tmp_path / "model", config, params, model_type="starcoder2")
    again = load(directory)
    assert again.config == config
    jax.tree.map(np.testing.assert_array_equal, again.params, params)
    assert np.isfinite(forward(config, again.params, np.arange(8, dtype=np.int32)[None]).logits).all()


def test_the_page_names_files_that_exist():
    root = Path(__file__).parents[1]
    named = set(re.findall(r"(?:jaxfw|tests|experiments)/[\w/]+\.py", PAGE))
    assert len(named) > 5 and [name for name in named if not (root / name).exists()] == []
