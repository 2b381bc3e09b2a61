"""Policies that keep a part of a prompt hold to the contract of every cache policy."""

import pytest

pytest.register_assert_rewrite("tests.cache_contract")

from jaxfw.kv import parse  # noqa: E402
from tests.cache_contract import CacheContract  # noqa: E402


class TestTokens(CacheContract):
    policy = parse("snapkv(w=2)@keep=0.5", layers=2)
    is_exact = False


class TestHeavyHitters(CacheContract):
    policy = parse("h2o@budget=6", layers=2)
    is_exact = False


class TestMovedSinks(CacheContract):
    policy = parse("streaming(sinks=2)@budget=8", layers=2)
    is_exact = False


class TestUnits(CacheContract):
    policy = parse("shotkv@keep=0.5,rd=0.5", layers=2)
    is_exact = False


class TestReusedChunks(CacheContract):
    policy = parse("chunkkv(w=2,size=3,reuse=2)@keep=0.5", layers=2)
    is_exact = False


class TestWaiting(CacheContract):
    policy = parse("knorm@keep=0.5,decode=discontinuous(recent=2,delta=3)", layers=2)
    is_exact = False
