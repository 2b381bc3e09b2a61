"""Batches made ahead are those made when asked for; errors come where they belong, and the thread ends."""

import threading
import time

import numpy as np
import pytest

from jaxfw.core.errors import InputError
from jaxfw.data import Prefetch, RandomWindows


def threads():
    return [thread for thread in threading.enumerate() if thread.name == "prefetch"]


def test_it_changes_nothing_and_stays_within_its_depth():
    source, made = RandomWindows(np.arange(99), 2, 4), []

    def batches(step):
        made.append(step)
        return source(step)

    with Prefetch(batches, lambda batch: batch["tokens"] + 1, first=3, steps=9, depth=2) as ready:
        for step in range(3, 10):
            np.testing.assert_array_equal(ready(step), source(step)["tokens"] + 1)
            assert max(made) <= step + 2
    assert made == list(range(3, 10)) and not threads()


def test_it_works_while_the_step_does():
    with Prefetch(lambda step: time.sleep(0.05), steps=6, depth=3) as ready:
        time.sleep(0.4)
        since = time.perf_counter()
        for step in (1, 2, 3):
            ready(step)
        assert time.perf_counter() - since < 0.04


def test_an_error_comes_as_it_is_with_its_step():
    class Own(Exception):
        pass

    def batches(step):
        if step == 3:
            raise Own("row 7")
        return step

    with Prefetch(batches, steps=9) as ready:
        assert [ready(1), ready(2)] == [1, 2]
        for _ in range(2):
            with pytest.raises(Own, match="row 7"):
                ready(3)
    assert not threads()


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_leaving_ends_the_thread_whatever_happened(error):
    with pytest.raises(error), Prefetch(lambda step: step, steps=10**9) as ready:
        ready(1)
        raise error
    assert not threads()


def test_nothing_to_do():
    with Prefetch(lambda step: step, first=5, steps=4):
        pass
    assert not threads()


def test_other_steps_are_refused():
    with Prefetch(lambda step: step, steps=2) as ready:
        with pytest.raises(InputError, match="step=2 was asked for, but batches come in order"):
            ready(2)
        assert [ready(1), ready(2)] == [1, 2]
        with pytest.raises(InputError, match=r"step=3 .* 1 to 2"):
            ready(3)
    with pytest.raises(InputError, match="outside the context"):
        Prefetch(lambda step: step, steps=2)(1)
    with pytest.raises(InputError, match="depth=0"):
        Prefetch(lambda step: step, steps=2, depth=0)
