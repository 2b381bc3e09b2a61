"""Greedy ids equal transformers' in padded batches, a fault of generation shows, stop ids end rows as eos does."""

import json

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")
pytestmark = pytest.mark.oracle

from experiments import greedy, parity  # noqa: E402
from jaxfw.generate.engine import generate  # noqa: E402


@pytest.fixture(scope="module")
def report():
    """The whole comparison, as `python -m experiments.greedy` runs it."""
    return greedy.run()


def test_greedy_ids_of_all_prompts(report):
    total = report["total"]
    assert total["rows"] >= 200 and total["different"] == 0 and total["near_tied"] < greedy.FEW * total["rows"]
    for row in report["cases"]:
        assert row["distinct"] > 4, "rows that repeat one token would prove little"


def test_every_planted_fault_shows(report):
    assert report["faults"] and all(row["different"] > 0 for row in report["faults"])


def test_a_planted_fault_leaves_no_trace():
    built = greedy.build(parity.CASES["default"], batches=1, rows=5)
    assert greedy.measure(built, greedy.FAULTS[0]).different > 0
    assert greedy.measure(built).different == 0


def test_stop_ids_end_rows_where_eos_ends_them_there():
    built = greedy.build(parity.CASES["default"], batches=1, rows=5)
    batch, reference = built.batches[0], built.references[0]
    stop_ids = [int(reference.tokens[0, 5]), int(reference.tokens[1, 9])]
    model, longest = built.oracle.model, max(len(row) for row in batch)
    out = model.generate(
        input_ids=torch.tensor([[0] * (longest - len(row)) + row for row in batch]),
        attention_mask=torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in batch]),
        max_new_tokens=greedy.STEPS, do_sample=False, eos_token_id=stop_ids, pad_token_id=0,
    )  # fmt: skip
    theirs = out[:, longest:].tolist()
    ours = generate(built.oracle.config, built.oracle.params, batch, max_new_tokens=greedy.STEPS, stop_ids=stop_ids)
    assert ours.stopped[0] and ours.stopped[1]
    for row, expected in zip(ours.tokens, theirs):
        assert list(row) == expected[: len(row)]
        assert row[-1] in stop_ids or len(row) == greedy.STEPS
        assert set(expected[len(row) :]) <= {0}, "padding, after eos"


def test_gaps_and_near_ties_are_counted():
    """A made-up reference: row 0 leaves at a near-tie, row 1 before one, row 2 without one, row 3 never."""
    tokens = np.zeros((4, greedy.STEPS), int)
    gaps = np.ones((4, greedy.STEPS))
    gaps[0, 3] = gaps[1, 9] = gaps[3, 5] = greedy.NEAR_TIE / 2
    ours = tokens.copy()
    ours[0, 3:] = ours[1, 4:] = ours[2, 31:] = 1
    counts = greedy.count(ours, greedy.Reference(tokens, gaps))
    assert (counts.rows, counts.equal, counts.near_tied, counts.different) == (4, 1, 3, 2)


def test_the_committed_report_is_of_these_cases_and_faults():
    report = json.loads(greedy.RESULTS.read_text())
    assert report["ok"] and report["steps"] == greedy.STEPS == 32 and report["near_tie"] == greedy.NEAR_TIE == 2e-5
    assert [row["case"] for row in report["cases"]] == list(greedy.CASES)
    assert [row["fault"] for row in report["faults"]] == [fault.name for fault in greedy.FAULTS]
    total = report["total"]
    assert total["rows"] >= 200 and total["different"] == 0 and total["near_tied"] < greedy.FEW * total["rows"]
    assert {"linear", "dynamic", "yarn", "llama3"} <= {row["rope"] for row in report["cases"]}
    assert {3, 7} <= {row["group"] for row in report["cases"]} and any(row["tied"] for row in report["cases"])
