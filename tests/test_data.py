"""Text at hand, and batches as functions of the step."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxfw.core.errors import InputError
from jaxfw.data import RandomWindows, consecutive_windows, stdlib_docstrings


def test_docstrings_are_the_real_ones():
    import argparse
    import inspect

    documents = stdlib_docstrings()
    assert len(documents) > 1000 and sum(map(len, documents)) > 500_000
    assert len(set(documents)) == len(documents) and min(map(len, documents)) >= 200
    assert inspect.getdoc(argparse.Action) in documents
    assert documents[:300] == stdlib_docstrings(most=300)


@given(st.integers(2, 60), st.integers(1, 5), st.integers(1, 20), st.integers(0, 9), st.integers(0, 9))
def test_windows_are_pieces_of_the_text_and_follow_from_the_step(size, batch, length, seed, step):
    tokens = np.arange(size)
    if size <= length:
        with pytest.raises(InputError, match=f"{size} tokens are fewer than one window of length={length}"):
            RandomWindows(tokens, batch, length)
        return
    windows = RandomWindows(tokens, batch, length, seed)(step)["tokens"]
    assert windows.shape == (batch, length + 1)
    assert np.all(np.diff(windows, axis=1) == 1) and windows.min() >= 0 and windows.max() < size
    np.testing.assert_array_equal(windows, RandomWindows(tokens, batch, length, seed)(step)["tokens"])


def test_every_place_is_drawn_and_steps_differ():
    batches = RandomWindows(np.arange(12), batch=64, length=4)
    starts = {int(row[0]) for step in range(8) for row in batches(step)["tokens"]}
    assert starts == set(range(8)), "the last window ends with the last token"
    assert not np.array_equal(batches(1)["tokens"], batches(2)["tokens"])


@given(st.integers(2, 200), st.integers(1, 4), st.integers(1, 12))
def test_consecutive_windows_predict_each_token_once(size, batch, length):
    tokens = np.arange(size)
    count = (size - 1) // length // batch
    if count == 0:
        with pytest.raises(InputError, match=r"tokens (do not fill one batch|are fewer than one window)"):
            list(consecutive_windows(tokens, batch=batch, length=length))
        return
    batches = list(consecutive_windows(tokens, batch=batch, length=length))
    assert len(batches) == count
    predicted = np.concatenate(batches)[:, 1:].ravel()
    np.testing.assert_array_equal(predicted, np.arange(1, count * batch * length + 1))
    assert len(list(consecutive_windows(tokens, batch=batch, length=length, most=1))) == 1
