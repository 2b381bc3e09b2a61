"""What a method's string means, and what is said where it, or what comes with it, cannot be used."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import pytest

import jaxfw
from jaxfw.core.errors import InputError
from jaxfw.kv import METHODS, KVCache, decoding, granularity, parse, scorers
from jaxfw.kv.budgets import Pyramid, Uniform
from jaxfw.kv.heads import Ada
from jaxfw.kv.pooled_cache import PooledCache
from jaxfw.kv.stores import Kivi
from jaxfw.models import forward
from jaxfw.models.cache import FullCache


@pytest.mark.parametrize("name", METHODS)
def test_a_name_gives_the_parts_of_its_row(name):
    made, method = parse(f"{name}@keep=0.5", layers=3), METHODS[name]
    parts = (made.scorer, made.granularity, made.layer_budget, made.decode, made.reassign)
    assert parts == (method.scorer, method.by, method.layers, method.decode, method.reassign)
    assert (made.keep, made.budget, made.layers, made.units) == (0.5, None, 3, "blocks")
    assert parse(f"{name}@budget=7").budget == 7


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("snapkv(w=16,kernel=7,pool=max)@keep=0.3", KVCache(scorers.SnapKV(16, 7, "max"), keep=0.3)),
        (" snapkv( w = 16 ) @ keep = 0.3 ", KVCache(scorers.SnapKV(16), keep=0.3)),
        ("knorm@budget=9,", KVCache(scorers.Knorm(), budget=9)),
        # A field reaches every part that has it.
        (
            "streaming(sinks=2)@budget=9",
            KVCache(scorers.Sinks(2), decode=decoding.Newest(2), budget=9, reassign=True),
        ),
        (
            "streaming(sinks=2,reassign=False)@budget=9",
            KVCache(scorers.Sinks(2), decode=decoding.Newest(2), budget=9),
        ),
        (
            "h2o(recent=0.25,normalise=true)@keep=0.5",
            KVCache(scorers.HeavyHitters(0.25, True), decode=decoding.Heavy(0.25), keep=0.5),
        ),
        (
            "pyramidkv(w=8,beta=10)@keep=0.5",
            KVCache(scorers.SnapKV(8), layer_budget=Pyramid(10, 8), keep=0.5),
        ),
        (
            "chunkkv(size=5,reuse=2,w=4)@keep=0.5",
            KVCache(scorers.SnapKV(4, 1), granularity.Chunks(5, "fill", 2), keep=0.5),
        ),
        (
            "shotkv(scope=global,fill=stop,extra=0,units=lines,w=8)@keep=0.5,rd=0.4",
            KVCache(
                scorers.QuestionMass(8), granularity.Units("global", "stop", 0), decode=decoding.Shots(0.4), keep=0.5,
                units="lines",
            ),
        ),
        # Axes, with fields of their own; semicolons as well as commas.
        (
            "knorm@keep=0.5;by=chunks(size=4);layers=pyramid(beta=10;w=2);decode=slide(window=9;recent=3)",
            KVCache(
                scorers.Knorm(), granularity.Chunks(4), Pyramid(10, 2), decoding.Slide(9, 3), keep=0.5
            ),
        ),
        ("knorm@keep=0.5,by=units(extra=3)", KVCache(scorers.Knorm(), granularity.Units(extra=3), keep=0.5)),
        ("shotkv(extra=3)@keep=0.5", KVCache(scorers.QuestionMass(), granularity.Units(extra=3), keep=0.5)),
        ("h2o(recent=0.25)@keep=0.5,decode=grow", KVCache(scorers.HeavyHitters(0.25), keep=0.5)),
        (
            "adakv(w=8,floor=0.1)@keep=0.5,kv=int4",
            PooledCache(scorers.SnapKV(8), keep=0.5, heads=Ada(0.1), store=Kivi(4)),
        ),
        ("pyramidkv@keep=0.5,layers=uniform", KVCache(scorers.SnapKV(), layer_budget=Uniform(), keep=0.5)),
        ("h2o@keep=0.5,decode=grow,rd=0.3", KVCache(scorers.HeavyHitters(), decode=decoding.Shots(0.3), keep=0.5)),
        ("knorm@keep=1,decode=shots(rd=0.3,recent=2)", KVCache(scorers.Knorm(), decode=decoding.Shots(0.3, 2), keep=1)),
        ("knorm@keep=0.5,decode=tova", KVCache(scorers.Knorm(), decode=decoding.Tova(), keep=0.5)),
        ("knorm@budget=8,decode=newest(sinks=2)", KVCache(scorers.Knorm(), decode=decoding.Newest(2), budget=8)),
        # The first tokens are moved only where the method still slides.
        ("streaming@budget=9,decode=grow", KVCache(scorers.Sinks(), budget=9)),
        # With all kept, a cache that keeps its size keeps everything.
        ("streaming@keep=1", KVCache(scorers.Sinks(), keep=1.0)),
        ("h2o@keep=1.0", KVCache(scorers.HeavyHitters(), keep=1.0)),
    ],
)  # fmt: skip
def test_a_string_gives_the_values_that_it_names(text, expected):
    assert parse(text) == expected


def test_decode_policies_go_by_their_names():
    names = ("grow", "shots", "heavy", "newest", "tova", "slide", "adaptive", "discontinuous")
    found = [type(parse(f"knorm@budget=8,decode={name}").decode).__name__.lower() for name in names]
    assert found == list(names)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (0.3, r"kv=0\.3 must be a string such as 'snapkv@keep=0\.3'"),
        ("snapk@keep=0.3", r"kv method='snapk' is unknown\. Known: streaming, .*Did you mean 'snapkv'\?"),
        ("pyramidinfer@keep=0.3", r"pyramidinfer drops tokens between layers .*: take pyramidkv"),
        ("@keep=0.3", r"kv method='' is unknown\. Known: streaming"),
        ("snapkv", r"'snapkv' does not say how much stays: add @keep=0\.3 .* or @budget=256"),
        ("snapkv@", r"does not say how much stays"),
        ("snapkv@rd=0.5", r"does not say how much stays"),
        ("snapkv@keep=0", r"keep=0\.0 must lie in \(0, 1\]: the share of the prompt that stays"),
        ("snapkv@keep=1.5", r"keep=1\.5 must lie in \(0, 1\]"),
        ("snapkv@keep=nan", r"keep=nan must lie in \(0, 1\]"),
        ("snapkv@keep=most", r"keep=most must be a number"),
        ("snapkv@keep=0.3,budget=9", r"keep=0\.3 and budget=9: give one of them"),
        ("snapkv@budget=0", r"budget=0 must be at least 1 token"),
        ("snapkv@budget=1.5", r"budget=1\.5 must be a whole number"),
        ("snapkv@keep=0.3,layer=uniform", r"option='layer' is unknown\. Known: keep, budget, .* mean 'layers'\?"),
        ("snapkv@keep=0.3,chunks", r"'chunks' must be name=value"),
        ("snapkv@keep=0.3,keep=0.4", r"keep is given twice: give it once"),
        ("snapkv(w=3,w=4)@keep=0.3", r"w is given twice"),
        ("snapkv(window=3)@keep=0.3", r"field of snapkv='window' is unknown\. Known: kernel, pool, w\."),
        ("knorm(w=3)@keep=0.3", r"knorm takes nothing in brackets, and w was given"),
        ("snapkv(w=3@keep=0.3", r"the bracket behind 'snapkv' is not closed"),
        ("snapkv@keep=0.3,by=chunks(size=3", r"brackets that do not match"),
        ("snapkv@keep=0.3)", r"brackets that do not match"),
        ("snapkv(w=many)@keep=0.3", r"w=many must be a whole number"),
        ("snapkv(w=0)@keep=0.3", r"w=0 must be at least 1"),
        ("snapkv(kernel=4)@keep=0.3", r"kernel=4 must be an odd number of tokens"),
        ("snapkv(pool=mean)@keep=0.3", r"pool='mean' is unknown\. Known: avg, max"),
        ("h2o(normalise=1)@keep=0.3", r"normalise=1 must be true or false"),
        ("h2o(recent=1)@keep=0.3", r"recent=1\.0 must lie in \[0, 1\)"),
        ("streaming(sinks=-1)@keep=0.3", r"sinks=-1 must be 0 or more first tokens"),
        ("lagkv(lag=1)@keep=0.3", r"lag=1 must be at least 2 tokens"),
        ("expected(future=0)@keep=0.3", r"future=0 must be at least 1"),
        ("pyramidkv(beta=0.5)@keep=0.3", r"beta=0\.5 must be at least 1"),
        ("chunkkv(size=0)@keep=0.3", r"size=0 and reuse=1 must be at least 1"),
        ("chunkkv(rule=all)@keep=0.3", r"rule='all' is unknown\. Known: fill, count"),
        ("shotkv(scope=head)@keep=0.3", r"scope='head' is unknown\. Known: layer, global"),
        ("shotkv(fill=split)@keep=0.3", r"fill='split' is unknown\. Known: skip, stop"),
        ("shotkv(extra=-1)@keep=0.3", r"extra=-1 must be 0 or more slots"),
        ("shotkv(units=line)@keep=0.3", r"units='line' is unknown\. Known: blocks, lines, sentences\. .*'lines'"),
        ("snapkv(units=lines)@keep=0.3", r"field of snapkv='units' is unknown\. Known: kernel, pool, w\."),
        ("shotkv@keep=0.3,rd=0", r"rd=0\.0 must lie in \(0, 1\]"),
        ("shotkv@keep=0.3,rd=1.1", r"rd=1\.1 must lie in \(0, 1\]"),
        ("shotkv@keep=0.3,rd=few", r"rd=few must be a number"),
        ("shotkv@keep=0.3,rd=0.5,decode=tova", r"rd=0\.5 is short for decode=shots\(rd=0\.5\), .*Tova\(\): give one"),
        ("tova@keep=0.3,rd=0.5", r"rd=0\.5 is short for decode=shots"),
        ("snapkv@keep=0.3,decode=shots(score=age)", r"score='age' is unknown\. Known: mass, sum"),
        ("snapkv@keep=0.3,decode=shots(recent=0)", r"recent=0 must be at least 1"),
        ("snapkv@keep=0.3,decode=slide(window=3,recent=3)", r"window=3 must exceed recent=3"),
        ("snapkv@keep=0.3,decode=adaptive(delta=0)", r"delta=0 must be at least 1 step"),
        ("snapkv@keep=0.3,decode=slid", r"decode='slid' is unknown\. Known: grow, .*Did you mean 'slide'\?"),
        ("snapkv@keep=0.3,layers=cone", r"layers='cone' is unknown\. Known: uniform, pyramid"),
        ("snapkv@keep=0.3,by=words", r"by='words' is unknown\. Known: tokens, chunks, units"),
        ("snapkv@keep=0.3,by=chunks(w=3)", r"field of chunks='w' is unknown\. Known: reuse, rule, size"),
        ("knorm(reassign=true)@keep=0.3,decode=newest", r"reassign=True moves the first tokens .*reassign=false"),
        ("streaming@keep=0.3,by=chunks(size=3)", r"token by token, .*Chunks\(size=3.*reassign=false"),
        ("streaming(reassign=true)@keep=0.3,decode=grow", r"field of streaming='reassign' is unknown"),
        ("shotkv(scope=global)@keep=0.3,decode=heavy", r"scope=global does not go with Heavy.*: take scope=layer"),
        ("shotkv(scope=global)@keep=0.3,layers=pyramid", r"scope=global is one choice for all layers"),
        ("chunkkv(reuse=2)@keep=0.3,layers=pyramid", r"reuse=2 takes over the choice .*: take reuse=1, or layers=unif"),
        ("snapkv@keep=0.3,heads=odd", r"heads='odd' is unknown\. Known: even, ada"),
        ("adakv(floor=1.5)@keep=0.3", r"floor=1\.5 must lie in \[0, 1\]: the share of an even budget"),
        ("adakv@keep=0.3,by=chunks", r"heads=Ada.* keep unequal numbers of tokens, and Chunks.*: take by=tokens"),
        ("shotkv@keep=0.3,heads=ada", r"heads=Ada.* and Units.*take by=tokens, or heads=even"),
        ("adakv@keep=0.3,decode=heavy", r"Heavy.* forgets tokens of the prompt, whose pool never changes .*=grow"),
        ("tova@keep=0.3,kv=int8", r"Tova\(\) forgets tokens of the prompt, .*kv=PerToken"),
        ("streaming@keep=0.3,kv=int4", r"Newest.* forgets tokens of the prompt, .*take decode=grow"),
        ("critical(first=-0.1)@keep=0.3", r"first=-0\.1 must lie in \[0, 1\]"),
        ("snapkv@keep=0.3,kv=int3", r"kv='int3' is unknown\. Known: full, kivi, int2, int4, int8, fp8\. Did you mean"),
        ("snapkv@keep=0.3,kv=kivi(bits=3)", r"bits=3 must be one of 2, 4, 8"),
        ("snapkv@keep=0.3,kv=int4(group=0)", r"group=0 must be at least 1"),
        ("snapkv@keep=0.3,kv=int4(residual=-1)", r"residual=-1 0 or more tokens"),
        ("snapkv@keep=0.3,kv=fp8(residual=-1)", r"residual=-1 must be 0 or more tokens"),
        ("snapkv@keep=0.3,kv=int8(kind=int7)", r"kind='int7' is unknown\. Known: int8, fp8"),
        ("snapkv@keep=0.3,kv=int4(width=3)", r"field of int4='width' is unknown\. Known: bits, group, residual"),
    ],
)  # fmt: skip
def test_what_cannot_be_used_is_said_in_one_line(text, message):
    with pytest.raises(InputError, match=message) as found:
        parse(text)
    assert_one_line(found.value)


def test_parts_that_do_not_fit_are_refused_without_a_string_too():
    with pytest.raises(InputError, match=r"keep=None and budget=None: give one of them"):
        KVCache(scorers.Knorm())
    with pytest.raises(InputError, match=r"reassign=True .* this is Sinks\(sinks=4\), Tokens\(\), Newest\(sinks=2\)"):
        KVCache(scorers.Sinks(4), decode=decoding.Newest(2), keep=0.5, reassign=True)


# --- what comes with a model

PROMPT = "The red lion.\n\nThe blue cat.\n\nQ: Which animal is blue?\nA:"


@functools.cache
def lm():
    return jaxfw.load("embedded-1")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"kv": "snapkv@keep=0.5", "policy": FullCache()}, r"kv='snapkv@keep=0\.5' and policy=.* give one"),
        ({"kv": "snapkv@keep=0.5", "protocol": "refed"}, r"protocol='refed' is unknown\. .*Did you mean 'refeed'\?"),
        ({"kv": "snapkv@keep=0.5", "protocol": "ctx", "units": [[(0, len(PROMPT))]]}, r"behind the last unit"),
        ({"kv": "shotkv@keep=0.5", "units": [[(0, 15), (14, 20)]]}, r"units\[0\] has the span \(14, 20\).*not overlap"),
        ({"kv": "shotkv@keep=0.5", "units": [[(0, 999)]]}, r"units\[0\] has the span \(0, 999\).*inside of the text"),
        ({"kv": "shotkv@keep=0.5", "units": []}, r"units has 0 lists of spans for 1 prompts: give one for each"),
        ({"kv": "shotk@keep=0.5"}, r"kv method='shotk' is unknown\. .*Did you mean 'shotkv'\?"),
    ],
)  # fmt: skip
def test_what_a_model_cannot_use_is_said_in_one_line(given, message):
    with pytest.raises(InputError, match=message) as found:
        lm().generate(PROMPT, max_new_tokens=2, **given)
    assert_one_line(found.value)


@pytest.mark.parametrize(
    ("text", "given", "message"),
    [
        ("shotkv@keep=0.5", {}, r"keeps whole units .*the prompt came without any: .*unit_id= to forward"),
        ("random@keep=0.5", {}, r"draws which tokens stay: give a key, e\.g\. key=jax\.random\.key\(0\)"),
        ("randomshot@keep=0.5", {"unit_id": jnp.zeros((1, 4), jnp.int32)}, r"draws which tokens stay: give a key"),
        ("knorm@keep=0.5,decode=tova", {}, r"Tova\(\) makes one choice for all heads.* in each: take the method tova"),
    ],
)
def test_what_a_forward_pass_lacks_is_said_in_one_line(text, given, message):
    with pytest.raises(InputError, match=message) as found:
        forward(lm().config, lm().params, jnp.ones((1, 4), jnp.int32), policy=parse(text), room=8, **given)
    assert_one_line(found.value)


def test_positions_cannot_be_assigned_anew_without_a_rotation():
    config, tokens = dataclasses.replace(lm().config, rope=None), jnp.ones((1, 4), jnp.int32)

    def read(text):
        policy = parse(text)
        cache = forward(config, lm().params, tokens, policy=policy, room=8).cache
        return forward(config, lm().params, tokens[:, :1], policy=policy, cache=cache).logits

    with pytest.raises(InputError, match=r"no rotary embedding: take streaming\(reassign=false\)") as found:
        jax.eval_shape(lambda: read("streaming@keep=0.5"))
    assert_one_line(found.value)
    jax.eval_shape(lambda: read("streaming(reassign=false)@keep=0.5"))


def assert_one_line(error):
    (message,) = error.args
    assert not re.search(r"[\n\t]|  ", message)
    assert len(message) < 350, message
