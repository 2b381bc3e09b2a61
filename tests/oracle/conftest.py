"""Each case of `experiments.parity` is built once for all tests that compare with it."""

import functools

import pytest


@pytest.fixture(scope="session")
def oracle():
    """Case name -> the same model in transformers and here."""
    from experiments import parity

    return functools.cache(lambda name: parity.build(parity.CASES[name]))
