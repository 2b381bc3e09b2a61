"""The policy written on the page docs/add_a_cache.md holds to the contract, and keeps what the page says."""

import re
from pathlib import Path

import pytest

pytest.register_assert_rewrite("tests.cache_contract")

from tests.cache_contract import LENGTHS, CacheContract  # noqa: E402
from tests.cache_page import PAGE, page_module  # noqa: E402

SinkCache = page_module().SinkCache


class TestSinkCache(CacheContract):
    policy = SinkCache(sinks=2, recent=6)
    is_exact = False


def test_the_first_and_the_last_tokens_are_kept():
    contract = TestSinkCache()
    cache = contract.prefilled().cache
    for _ in range(3):
        cache = contract.extended(cache, LENGTHS, (5, 5, 5)).cache
    for state in cache.layers:
        for row, n in zip(state.kept_positions, (length + 15 for length in LENGTHS)):
            for head in row:
                assert sorted(head.tolist()) == [0, 1, *range(n - 6, n)]


def test_the_page_names_files_that_exist_and_the_class_that_this_file_runs():
    root = Path(__file__).parents[1]
    named = set(re.findall(r"(?:jaxfw|tests)/[\w/]+\.py", PAGE))
    assert named and all((root / name).exists() for name in named)
    lines = ("class TestSinkCache(CacheContract):", "    policy = SinkCache(sinks=2, recent=6)", "    is_exact = False")
    here = Path(__file__).read_text(encoding="utf-8")
    assert "\n".join(f"    {line}" for line in lines) in PAGE and "\n".join(lines) in here
