"""docs/taps.md: its table is that of the code, its recipes run and do what they say."""

import re
from pathlib import Path

import jax
import numpy as np
import pytest

from jaxfw.models import forward
from jaxfw.models.taps import EDITS, REDUCTIONS, SITES

PAGE = (Path(__file__).parents[1] / "docs" / "taps.md").read_text(encoding="utf-8")


def test_the_table_is_that_of_the_code():
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in PAGE.splitlines() if line[:3] == "| `"]
    found = {row[0].strip("`"): (row[1], row[5], row[6]) for row in rows}
    yes = {True: "yes", False: "no"}
    expected = {
        name: (site.axes, yes[site.can_edit], yes[site.reductions == REDUCTIONS]) for name, site in SITES.items()
    }
    assert found == expected
    assert list(found) == list(SITES), "in the code's order"
    assert all(f'"{op}"' in PAGE for op in EDITS) and all(f'"{name}"' in PAGE for name in REDUCTIONS if name)


@pytest.fixture(scope="module")
def page():
    """What the page's code leaves behind, run block by block in the order of the page."""
    names: dict = {}
    for block in re.findall(r"```python\n(.*?)```", PAGE, flags=re.S):
        exec(block, names)
    return names


def test_first_block(page):
    printed = re.search(r"print\(out.taps\[0\].shape\)  # (\(.*?\)):", PAGE)
    assert printed and printed[1] == "(2, 2, 5, 4, 4)"


def test_steering(page):
    """What generation draws is what scoring with the same edit says, and not what it says without."""
    prompt, new = [5, 8, 2], page["steered"][0]
    tokens = np.array([prompt + list(new)])
    for taps, is_equal in ([page["steer"]], True), ((), False):
        logits = page["run"](page["config"], page["params"], tokens, taps=taps).logits[0]
        assert (np.argmax(logits[2:-1], axis=-1).tolist() == list(new)) == is_equal


def test_patching(page):
    """Before the first layer, the changed token is all there is to restore, and no other position restores anything."""
    final = {
        name: forward(page["config"], page["params"], page[name]).logits[0, -1, page["answer"]]
        for name in ("clean", "corrupted")
    }
    effect = page["effect"]
    assert effect.shape == (3, 5) and abs(final["clean"] - final["corrupted"]) > 1e-3
    np.testing.assert_allclose(effect[0, 1], final["clean"], atol=1e-5)
    np.testing.assert_allclose(effect[0, [0, 2, 3, 4]], final["corrupted"], atol=1e-5)
    np.testing.assert_allclose(effect[:, 0], final["corrupted"], atol=1e-5)


def test_importance_of_heads(page):
    """The sum over heads of a gradient by a scale of all of them equals a finite difference."""
    assert page["importance"].shape == (3, 4) and np.all(np.asarray(page["importance"]) > 0)
    ones, example, step = np.ones((3, 4, 1), np.float32), page["examples"][0], np.float32(1e-2)
    loss = jax.jit(page["loss"])
    difference = (loss(ones + step, example) - loss(ones - step, example)) / (2 * step)
    np.testing.assert_allclose(page["of_examples"][0].sum(), difference, rtol=2e-2, atol=1e-3)


def test_logit_lens(page):
    assert page["lens"].shape == (3, 2, 5, 50)
    expected = page["run"](page["config"], page["params"], page["tokens"], lengths=page["lengths"]).logits
    for b, length in enumerate(page["lengths"]):
        np.testing.assert_allclose(page["lens"][-1, b, :length], expected[b, :length], atol=1e-5)


def test_second_moments(page):
    assert page["total"].count.tolist() == [13]
    covariance = np.asarray(page["covariance"], np.float64)
    np.testing.assert_allclose(covariance, covariance.T, atol=1e-6)
    assert np.linalg.eigvalsh(covariance).min() > -1e-6 and np.linalg.matrix_rank(covariance, tol=1e-6) <= 13
    assert page["directions"].shape == page["keys"].shape == (2, 24)
    back = (covariance + 1e-4 * np.eye(24)) @ np.asarray(page["directions"], np.float64).T
    np.testing.assert_allclose(back.T, page["keys"], atol=1e-3)
