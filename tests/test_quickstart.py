"""The main job's own arithmetic: n-gram baselines, intervals, and that it runs as a function without a workdir."""

import itertools
import math
from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from configs import quickstart as config_file
from experiments import quickstart
from experiments.quickstart.ngrams import ngram_nll

TOKENS = st.lists(st.integers(0, 4), min_size=3, max_size=60)


def brute_force(tokens, pair, vocab):
    """Witten & Bell (1991), method C, interpolated with add-one single tokens."""
    before, after = pair
    singles, pairs = Counter(tokens), Counter(itertools.pairwise(tokens))
    single = (singles[after] + 1) / (len(tokens) + vocab)
    follows = {b: n for (a, b), n in pairs.items() if a == before}
    seen = sum(follows.values())
    if not seen:
        return single
    return (follows.get(after, 0) + len(follows) * single) / (seen + len(follows))


@given(TOKENS, TOKENS)
def test_ngram_baselines(training, held_out):
    tokens, window = np.array(training), np.array([held_out])
    bigram = ngram_nll(tokens, [window], 5, order=2)
    expected = np.mean([-math.log(brute_force(training, pair, 5)) for pair in itertools.pairwise(held_out)])
    assert bigram == pytest.approx([expected], rel=1e-5)
    counts = Counter(training)
    unigram = ngram_nll(tokens, [window], 5, order=1)
    expected = np.mean([-math.log((counts[token] + 1) / (len(training) + 5)) for token in held_out[1:]])
    assert unigram == pytest.approx([expected], rel=1e-6)


@given(st.lists(st.integers(0, 4), min_size=2, max_size=40), st.integers(0, 4))
def test_the_bigram_is_a_distribution(training, before):
    windows = [np.array([[before, after] for after in range(5)])]
    nll = ngram_nll(np.array(training), windows, 5, order=2)
    assert np.exp(-nll).sum() == pytest.approx(1, rel=1e-5)


def test_intervals_cover_the_truth_as_often_as_they_say():
    rng = np.random.default_rng(0)
    hits = [quickstart._interval(rng.exponential(size=64)) for _ in range(2000)]
    covered = np.mean([one.low <= 1 <= one.high for one in hits])
    assert 0.91 < covered < 0.97


def test_it_runs_as_a_function_without_a_workdir(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = config_file.get_config("smoke")
    with config.unlocked():
        config.train.steps, config.documents = 6, 100
    result = quickstart.run(config)
    assert {"metrics", "checks", "report"} == set(result)
    assert result["metrics"]["parameters"] == quickstart.describe(config)["parameters"]
    assert not list(tmp_path.iterdir())
