"""The scorer written on the page docs/add_a_method.md works, and the page names what exists."""

import re
from pathlib import Path
from types import ModuleType

import jax
import jax.numpy as jnp
import numpy as np

from jaxfw.kv import KVCache
from jaxfw.models import DecoderConfig, forward, init
from jaxfw.models.cache import FullCache

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "add_a_method.md").read_text(encoding="utf-8")
CONFIG = DecoderConfig(vocab=61, width=24, ffn=40, layers=1, heads=6, kv_heads=2, head_dim=8, positions=64)


def scorer():
    (code,) = re.findall(r"```python\n(.*?)```", PAGE, flags=re.S)
    module = ModuleType("add_a_method")
    exec(compile(code, "docs/add_a_method.md", "exec"), vars(module))
    return module.LongValues


def test_the_longest_values_stay_and_the_newest():
    policy, lengths = KVCache(scorer()(recent=2), budget=6), jnp.asarray([20, 13])
    params = init(CONFIG, jax.random.key(0))
    tokens = jax.random.randint(jax.random.key(1), (2, 20), 0, CONFIG.vocab)
    run = jax.jit(forward, static_argnums=0, static_argnames=("policy", "room"))
    full = run(CONFIG, params, tokens, lengths=lengths, policy=FullCache(), room=20).cache.layers[0]
    kept = run(CONFIG, params, tokens, lengths=lengths, policy=policy, room=20).cache.layers[0].kept_positions
    for b, k in np.ndindex(2, 2):
        n = int(lengths[b])
        size = np.linalg.norm(full.v[b, k, : n - 2], axis=-1)
        expected = sorted([*np.argsort(-size)[:4].tolist(), n - 2, n - 1])
        assert kept[b, k].tolist() == expected


def test_the_page_names_files_and_words_that_exist():
    named = set(re.findall(r"(?:jaxfw|tests|configs)/[\w/]+\.py", PAGE))
    assert named and all((ROOT / name).exists() for name in named)
    assert "METHODS" in (ROOT / "jaxfw/kv/spec.py").read_text() and "PRESSES" in PAGE
