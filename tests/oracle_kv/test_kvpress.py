"""End to end beside kvpress: the same checkpoint, the same prompt, what stays and what is said then."""

import functools

import jax
import jax.numpy as jnp
import kvpress
import numpy as np
import pytest
import torch
from transformers import DynamicCache

from jaxfw.kv import parse
from jaxfw.models import forward
from jaxfw.weights import load
from tests.oracle_kv.kvpress_cases import ARCHITECTURES, LAYERS, PRESSES, ids, model

REMOVED, T, NEW = (0.3, 0.7), 203, 8
# LagKV's ranks tie, and torch.topk takes any of them; AdaKVPress leaves all keys in the cache and masks them.
EXACT = [method for method in PRESSES if not method.startswith(("lagkv", "adakv"))]
LOGITS_ATOL = 5e-5  # of the largest logit: what two float32 forwards of these weights differ by


@functools.cache
def both(name, folder):
    made = model(name, torch.float32)
    made.save_pretrained(folder)
    return made, load(folder, param_dtype="float32", dtype="float32")


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    return functools.cache(lambda name: tmp_path_factory.mktemp(name))


@pytest.mark.parametrize("method", EXACT)
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_the_same_tokens_stay_and_the_same_is_said(name, method, folder):
    made, ours = both(name, str(folder(name)))
    for removed in REMOVED:
        is_share = method.startswith(("pyramidkv", "chunkkv"))
        share = f"keep={1 - removed:.1f}" if is_share else f"budget={int(T * (1 - removed))}"
        policy = parse(f"{method}@{share},decode=grow", layers=LAYERS)
        tokens = ids(T + NEW)
        theirs, caches = decoded(made, PRESSES[method](removed), tokens)
        run = jax.jit(functools.partial(forward, ours.config, policy=policy, room=T + NEW))
        out = run(ours.params, jnp.asarray(tokens[:, :T].numpy(), jnp.int32))
        swaps = 0
        for state, keys in zip(out.cache.layers, caches, strict=True):
            for head in range(keys.shape[0]):
                positions = np.asarray(state.kept_positions[0, head])
                held = np.asarray(state.k[0, head])[positions >= 0]
                assert len(held) == len(keys[head])
                # Each of their keys is one of ours, up to the rounding of another order of sums.
                distance = np.abs(keys[head][:, None] - held[None]).max(axis=-1).min(axis=1)
                swaps += int((distance > 1e-3 * np.abs(held).max()).sum())
        logits = [out.logits[0, -1]]
        for i in range(NEW - 1):
            out = run(ours.params, jnp.asarray(tokens[:, T + i : T + i + 1].numpy(), jnp.int32), cache=out.cache)
            logits.append(out.logits[0, 0])
        case = f"{name} {method} {removed}"
        assert swaps <= 2, f"{case}: {swaps} tokens differ, more than near ties explain"
        if not swaps:
            np.testing.assert_allclose(np.stack(logits), theirs, atol=LOGITS_ATOL * max(1, np.abs(theirs).max()),
                                       err_msg=case)  # fmt: skip


def decoded(made, press, tokens):
    """Their logits behind the prompt and each further token, and the keys of every layer behind the prompt."""
    if not isinstance(press, kvpress.ObservedAttentionPress):
        made.set_attn_implementation("sdpa")
    else:
        made.set_attn_implementation("eager")
    cache, logits = DynamicCache(), []
    with torch.no_grad():
        with press(made):
            out = made(tokens[:, :T], past_key_values=cache, use_cache=True)
        logits.append(out.logits[0, -1])
        keys = [layer.keys[0].numpy().copy() for layer in cache.layers]
        for i in range(NEW - 1):
            at = torch.tensor([[T + i]])  # otherwise the compressed length would be taken for the position
            out = made(tokens[:, T + i : T + i + 1], past_key_values=cache, use_cache=True, position_ids=at)
            logits.append(out.logits[0, -1])
    return torch.stack(logits).numpy(), keys
