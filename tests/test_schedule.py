"""The learning rate by update, against formulas in numpy and what every schedule has in common."""

import math

import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxfw.core.errors import InputError
from jaxfw.train import OptimizerConfig
from jaxfw.train.optimizer import make_schedule
from jaxfw.train.schedule import SCHEDULES
from jaxfw.train.schedule import make_schedule as schedule_of

LONGEST = 41


def formula(kind, n, *, peak, warmup, updates, final, decay):
    """Written out, piece by piece."""
    if n < warmup:
        return peak / warmup + (peak - peak / warmup) * n / warmup
    along = (n - warmup) / (updates - warmup)
    if kind == "cosine":
        return peak * (final + (1 - final) * (1 + math.cos(math.pi * along)) / 2)
    if kind == "linear":
        return peak * (1 + (final - 1) * along)
    falls = round(decay * updates)
    if kind == "wsd" and n > updates - falls:
        return peak * (1 + (final - 1) * (n - updates + falls) / falls)
    return peak


@pytest.mark.parametrize("kind", SCHEDULES)
@settings(max_examples=8, deadline=None)
@given(
    peak=st.floats(1e-5, 1.0), warmup=st.integers(0, 10), after=st.integers(10, 30), final=st.floats(0, 1),
    decay=st.floats(0.1, 0.4),
)  # fmt: skip
def test_every_schedule_is_its_formula(kind, peak, warmup, after, final, decay):
    sizes = dict(peak=peak, warmup=warmup, updates=warmup + after, final=final, decay=decay)
    schedule, n = schedule_of(kind, **sizes), np.arange(warmup + after + 1)
    found = np.asarray(schedule(np.arange(LONGEST)), np.float64)[: len(n)]  # of one shape: compiled once
    np.testing.assert_allclose(found, [formula(kind, i, **sizes) for i in n], rtol=2e-6, atol=1e-6 * peak)
    assert np.all(np.diff(found[: warmup + 1]) >= 0) and np.all(np.diff(found[warmup:]) <= 1e-6 * peak)


def test_the_default_is_optax_warm_up_and_cosine():
    ours = make_schedule(OptimizerConfig(learning_rate=6e-3, warmup=40), steps=600)
    theirs = optax.warmup_cosine_decay_schedule(6e-3 / 40, 6e-3, 40, 600, end_value=6e-4)
    n = np.arange(601)
    np.testing.assert_array_equal(ours(n), theirs(n))


def test_it_counts_updates_and_not_batches():
    config = OptimizerConfig(warmup=2, schedule="linear", final=0.0, accumulate=3)
    rates = np.asarray(make_schedule(config, steps=30)(np.array([9, 10])))
    assert rates[0] > 0 and rates[1] == 0


@pytest.mark.parametrize(
    "change, steps, said",
    [
        (dict(warmup=10), 10, r"optimizer\.warmup=10 must be below the run's 10 steps"),
        (
            dict(warmup=5, accumulate=4),
            20,
            r"optimizer\.warmup=5 must be below the run's 5 updates \(of 4 steps each\)",
        ),
        (
            dict(warmup=1, accumulate=4),
            10,
            r"train\.steps=10 is no multiple of optimizer\.accumulate=4.* 8 or 12 steps",
        ),
        (dict(warmup=1, accumulate=4), 3, r"the last 3 would change nothing\. Take 4 steps"),
        (dict(warmup=8, schedule="wsd", decay=0.5), 10, r"optimizer\.decay=0\.5 falls over 5 .*warmup=8 leaves 2"),
    ],
)
def test_what_does_not_fit_into_the_run_is_refused(change, steps, said):
    with pytest.raises(InputError, match=said):
        make_schedule(OptimizerConfig(**change), steps=steps)


def test_an_unknown_schedule_is_named():
    with pytest.raises(InputError, match=r"Did you mean 'cosine'\?"):
        schedule_of("cosin", peak=1.0, warmup=0, updates=2)
