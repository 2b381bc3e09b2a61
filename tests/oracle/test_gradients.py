"""Gradients of a next-token loss equal transformers', and faults that only gradients see are seen."""

import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")
pytestmark = pytest.mark.oracle

from experiments import parity  # noqa: E402

TOLERANCE = parity.TOLERANCE["gradients"]
FAULTS = {fault.name: fault for fault in parity.FAULTS if fault.shows_in == "gradients"}


@pytest.mark.parametrize("name", parity.CASES)
def test_gradients(oracle, name):
    """Every leaf by itself: its largest difference in units of its largest gradient."""
    errors = parity.gradient_errors(oracle(name))
    assert {leaf: error for leaf, error in errors.items() if not error <= TOLERANCE} == {}


@pytest.mark.parametrize("name", FAULTS)
def test_a_planted_fault_shows_in_gradients_only(oracle, name):
    built = oracle(FAULTS[name].case)
    assert parity.fault_error(built, FAULTS[name]) >= parity.VISIBLE * TOLERANCE
    assert parity.logits_error(built, FAULTS[name]) <= parity.TOLERANCE["logits"]
