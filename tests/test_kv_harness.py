"""lm-eval through a compressed cache, and the command line: texts are read through it, never by one forward."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

pytest.importorskip("lm_eval")

from lm_eval.api.instance import Instance

import jaxfw
from jaxfw.core.errors import InputError
from jaxfw.evals.harness import HarnessLM
from jaxfw.generate.__main__ import main
from jaxfw.kv import parse
from jaxfw.models import forward

CONTEXT = "The red lion.\nThe blue cat.\nThe old wolf.\nThe big cow.\n\nQ: Which animal is blue?\nA:"
TEXTS = (" The blue cat => cat\n", " The old wolf => wolf\n", " no\n")
KV = "snapkv(w=4)@keep=0.3"


@functools.cache
def lm():
    return jaxfw.load("embedded-1")


def scored(kv, protocol="full"):
    requests = [Instance("loglikelihood", {}, (CONTEXT, text), i) for i, text in enumerate(TEXTS)]
    return [score for score, _ in HarnessLM(lm(), kv=kv, protocol=protocol).loglikelihood(requests)]


def token_by_token(kv):
    """The same from plain forwards: a prompt, then one token after the other."""
    policy, found = parse(kv, layers=lm().config.layers), []
    run = jax.jit(functools.partial(forward, lm().config, policy=policy, room=96))
    ids = lm().tokenizer.encode(CONTEXT)
    for text in TEXTS:
        out, total = run(lm().params, jnp.asarray([ids])), 0.0
        for token in lm().tokenizer.encode(CONTEXT + text)[len(ids) :]:
            total += float(jax.nn.log_softmax(out.logits[0, -1])[token])
            out = run(lm().params, jnp.asarray([[token]]), cache=out.cache)
        found.append(total)
    return found


@pytest.mark.slow
def test_log_likelihoods_are_those_behind_the_compressed_cache():
    full, compressed = scored(None), scored(KV)
    np.testing.assert_allclose(compressed, token_by_token(KV), atol=1e-4)
    np.testing.assert_allclose(scored("snapkv@keep=1"), full, atol=1e-4)
    assert max(abs(a - b) for a, b in zip(full, compressed)) > 0.1
    assert not np.allclose(scored(KV, "refeed"), compressed, atol=1e-3)


def test_continuations_take_it_and_whole_texts_do_not():
    harness = HarnessLM(lm(), kv="shotkv(extra=0)@keep=0.5;rd=0.5", protocol="refeed")
    request = Instance("generate_until", {}, (CONTEXT, {"until": ["\n"], "max_gen_toks": 8}), 0)
    assert harness.generate_until([request])[0]
    with pytest.raises(InputError, match="nothing there: run such tasks without kv="):
        harness.loglikelihood_rolling([Instance("loglikelihood_rolling", {}, (CONTEXT,), 0)])


def test_the_command_line_takes_it(capsys):
    ask = ["--model=embedded-1", f"--prompt={CONTEXT}", "--max-new-tokens=2"]
    assert main([*ask, f"--kv={KV}", "--protocol=refeed"]) == 0
    assert main([*ask, "--kv=snapvk@keep=0.3"]) == 2
    assert "Did you mean 'snapkv'?" in capsys.readouterr().err
