"""What the first token sees under each protocol, and lm-eval's requests through a compressed cache."""

import functools

import jax
import numpy as np
import pytest

import jaxfw
from jaxfw.evals import TASKS, items
from jaxfw.generate import engine
from jaxfw.generate.compression import reading
from jaxfw.generate.prompts import bucket, default_room, pack_units
from jaxfw.kv import METHODS, parse
from jaxfw.kv.units import lines
from jaxfw.models.cache import FullCache

N, NEW = 8, 4
# A tenth of these prompts is 9 tokens: a wider window would be all that stays, whatever the method.
FIELDS = {
    "snapkv": "(w=4)",
    "pyramidkv": "(w=2,beta=4)",
    "chunkkv": "(w=4,size=3)",
    "lagkv": "(lag=3,sinks=2)",
} | dict.fromkeys(("shotkv", "randomshot", "oracleshot"), "(extra=0)")


@functools.cache
def lm():
    return jaxfw.load("embedded-1")


@functools.cache
def asked():
    """Prompts with their units, the lines of their contexts, in tokens."""
    texts = [(item.prompt, lines(item.context)) for item in items(TASKS["retrieval"], n=N, level=16, seed=0)]
    encode, units = lm().tokenizer.encode, lm().tokenizer.unit_ids
    return [encode(text) for text, _ in texts], [units(text, spans) for text, spans in texts]


def policy(method, keep):
    return parse(f"{method}{FIELDS.get(method, '')}@keep={keep}", layers=lm().config.layers)


@functools.cache
def first_logits(policy, protocol):
    """Behind each prompt."""
    prompts, unit_ids = asked()
    T = bucket(max(map(len, prompts)))
    given = reading(protocol, unit_ids)
    logits, _ = engine.read(
        lm().config, lm().params, prompts, policy=policy, room=default_room(T, NEW), new=NEW,
        units=pack_units(given.pop("unit_ids"), prompts, T), key=jax.random.split(jax.random.key(0), N), **given,
    )  # fmt: skip
    return np.asarray(logits)


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_the_first_token_sees_all_under_full_and_what_is_kept_under_the_others(method):
    whole = first_logits(FullCache(), "full")
    assert np.array_equal(first_logits(policy(method, 0.1), "full"), whole)
    for protocol in ("refeed", "ctx"):
        change = np.abs(first_logits(policy(method, 0.1), protocol) - whole).max(axis=1)
        assert np.mean(change > 1e-3) > 0.5, protocol


@pytest.mark.slow
@pytest.mark.parametrize("method", ["streaming", "h2o", "pyramidkv", "adakv", "shotkv"])  # of each state one
def test_keeping_all_changes_nothing_under_refeed(method):
    whole = first_logits(FullCache(), "full")
    np.testing.assert_allclose(first_logits(policy(method, 1), "refeed"), whole, atol=1e-4, rtol=0)


def test_the_harness_reads_semicolons_in_its_model_args():
    """Its own commas part the arguments."""
    harness = pytest.importorskip("jaxfw.evals.harness", exc_type=ImportError)
    given = "pretrained=embedded-1,kv=snapkv(w=4;kernel=3)@keep=0.2;rd=0.5,protocol=refeed"
    found = harness.HarnessLM.create_from_arg_string(given)
    assert found.policy == parse("snapkv(w=4,kernel=3)@keep=0.2,rd=0.5", layers=lm().config.layers)
    assert found.protocol == "refeed"
