"""The study of cache compression: what is measured, what its statements conclude, and one run of it."""

import dataclasses
from typing import Any

import numpy as np
import pytest

from configs import kv as config_file
from experiments.kv import KVConfig, claim, observations, page, recall, run, study
from experiments.kv.observations import Loss, Statement
from jaxfw.core.config import to_dataclass
from jaxfw.core.errors import InputError
from jaxfw.evals import TASKS

N = 40


def smoke():
    return to_dataclass(KVConfig, config_file.get_config("smoke"))


def line(task, shots, marks, method="full cache", keep=1.0, protocol="full", level=0, **more):
    marks = list(map(float, marks))
    kv = None if method == "full cache" else f"{method}@keep={keep}"
    accuracy = {"value": float(np.mean(marks)), "low": 0.0, "high": 1.0}
    found = {"task": task, "shots": shots, "level": level or TASKS[task].standard, "method": method, "kv": kv}
    found |= {"keep": keep, "protocol": protocol, "n": len(marks), "marks": marks, "accuracy": accuracy}
    return found | {"trivial": 0.0, "kept": keep, "bytes": keep, "tokens": 9} | more


def marks(share, n=N):
    return [i < round(share * n) for i in range(n)]


def verdict(full, one, other, monkeypatch, trivial=0.0):
    """Of "knorm loses more than snapkv" on arithmetic."""
    more, less = (Loss("arithmetic", 4, (method,), 0.2) for method in ("knorm", "snapkv"))
    monkeypatch.setattr(observations, "STATEMENTS", (Statement("s", "p", "h", more, less),))
    lines = [line("arithmetic", 4, full, trivial=trivial)]
    lines += [
        line("arithmetic", 4, found, method, 0.2, "refeed") for method, found in (("knorm", one), ("snapkv", other))
    ]
    (found,) = observations.judged(lines)
    return found


@pytest.mark.parametrize(
    ("full", "one", "other", "says"),
    [
        (1.0, 0.2, 0.9, "held"),
        (1.0, 0.9, 0.2, "not held: the reverse"),
        (1.0, 0.5, 0.5, "not held"),
        (0.4, 0.5, 0.9, "not testable here: nothing is lost"),
        (0.1, 0.0, 0.1, "not testable here: arithmetic is at 0.10, a trivial answer at 0.00"),
    ],
)
def test_a_statement_is_judged_by_its_interval(full, one, other, says, monkeypatch):
    found = verdict(marks(full), marks(one), marks(other), monkeypatch)
    assert found["verdict"] == says
    if "value" in found:
        assert found["low"] <= found["value"] <= found["high"]
        np.testing.assert_allclose(found["value"], (other - one) / full)


def test_losses_over_the_same_items_are_paired(monkeypatch):
    """What makes items hard for both sides does not count: a difference on every item has no spread."""
    rng = np.random.default_rng(0)
    hard = rng.integers(0, 2, N)
    found = verdict(np.ones(N), hard * 0.5, hard * 0.5 + 0.25, monkeypatch)
    np.testing.assert_allclose([found["low"], found["high"]], 0.25, atol=1e-9)


def test_what_was_not_measured_is_said(monkeypatch):
    monkeypatch.setattr(observations, "STATEMENTS", observations.STATEMENTS[:1])
    (found,) = observations.judged([line("arithmetic", 4, marks(1.0)), line("facts", 12, marks(1.0))])
    assert found["verdict"] == "not measured in this run"


def test_changes_are_to_the_full_cache_of_the_same_level():
    lines = [line("facts", 2, marks(1.0), level=1), line("facts", 2, marks(0.5), level=2)]
    lines += [line("facts", 2, marks(share), "h2o", 0.2, "refeed", level) for level, share in ((1, 1.0), (2, 0.5))]
    changes = [found["change"]["value"] for found in study.with_changes(lines) if found["kv"]]
    assert changes == [0.0, 0.0]


def test_cells_are_every_method_and_budget_and_for_a_few_the_protocols():
    c = dataclasses.replace(smoke().study, keeps=(0.4, 0.2), more=("arithmetic:1@0.4",))
    cells = [(cell.asked.name, cell.label, cell.keep, cell.protocol) for cell in c.cells()]
    assert len(cells) == len(set(cells))
    both = [("snapkv(w=8)", keep, "refeed") for keep in (0.4, 0.2)]
    few = [("snapkv(w=8)", 0.2, protocol) for protocol in ("full", "ctx")]
    shot = [("shotkv(w=8), rd", keep, "refeed") for keep in (0.4, 0.2)]
    assert cells == [
        ("retrieval", "full cache", 1.0, "full"), *(("retrieval", *cell) for cell in (*both, *few, *shot)),
        ("arithmetic, 1 shots", "full cache", 1.0, "full"), ("arithmetic, 1 shots", "snapkv(w=8)", 0.4, "refeed"),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"abilities": ("arithmetik:4",)}, r"study\.task='arithmetik' is unknown\..*'arithmetic'"),
        ({"abilities": ("arithmetic",)}, r"write task:shots or task:shots:level, as in arithmetic:4"),
        ({"methods": ("snapkv@keep=0.3",)}, r"study\.methods has 'snapkv@keep=0\.3': write \{keep\}"),
        ({"compared": 0.3}, r"study\.compared=0\.3 must be one of study\.keeps=\(0\.2,\)"),
        ({"asked": 0}, r"study\.asked=0 must be at least 1"),
        ({"protocol": "half"}, r"study\.protocol='half' is unknown\. Known: full, refeed, ctx"),
    ],
)
def test_wrong_fields_are_named(change, message):
    with pytest.raises(InputError, match=message):
        dataclasses.replace(smoke().study, **change)


def recalled(method, budget, protocol, first, exact, seed=0):
    return {"task": "rows", "seed": seed, "method": method, "budget": budget, "protocol": protocol,
            "first": {"value": first}, "exact": {"value": exact}}  # fmt: skip


def claimed(shot=(1.0, 0.9), snap=(0.4, 0.2), first=1.0):
    lines = [recalled("full", None, "full", 1.0, 1.0)]
    for i, budget in enumerate((20, 13)):
        for protocol in ("full", "refeed"):
            for method, exact in (("shotkv", shot[i]), ("snapkv(w=2)", snap[i]), ("randomshot", 0.2)):
                lines.append(recalled(method, budget, protocol, first if protocol == "full" else 0.95, exact))
    return {check["name"]: check["ok"] for check in claim.checks(lines, "rows", (20, 13), models=1)}


def test_the_claim_fails_by_each_of_its_bounds():
    assert all(claimed().values())
    assert not claimed(shot=(0.8, 0.9))["rows: ShotKV, 20 tokens"]
    assert not claimed(snap=(0.75, 0.2))["rows: ShotKV before snapkv(w=2), 20 tokens"]
    assert not claimed(snap=(0.4, 0.7))["rows: ShotKV before snapkv(w=2), 13 tokens"]
    assert not claimed(first=0.99)["rows: first tokens that differ from the full cache's (full)"]


def test_a_model_that_has_not_learned_counts_for_nothing():
    lines = [recalled("full", None, "full", 0.3, 0.1, seed=2)]
    assert claim.learned(lines) == []
    (only,) = claim.checks(lines, "rows", (20, 13), models=1)
    assert only["name"] == "rows: models that learned it" and not only["ok"]
    assert "rows seed 2" in page.claim_page(smoke().recall, lines)["summary"]


def test_an_ability_may_be_asked_with_several_numbers_of_shots():
    c = dataclasses.replace(smoke().study, abilities=("arithmetic:1", "arithmetic:2"))
    lines = [line("arithmetic", shots, marks(share)) for shots, share in ((1, 0.5), (2, 1.0))]
    lines += [line("arithmetic", shots, marks(0.5), "snapkv(w=8)", 0.2, "refeed") for shots in (1, 2)]
    lines = study.with_changes(lines)
    overview, tables = page._overview(c, lines), page._abilities(c, lines)
    level = TASKS["arithmetic"].standard
    assert overview.columns[-2:] == (f"arithmetic, 1 shots, level {level}", f"arithmetic, 2 shots, level {level}")
    assert [row[-2:] for row in overview.rows] == [(0.5, 1.0), (0.0, 0.0), (0.5, 0.5)]
    assert [table.rows[-1][-1] for table in tables] == [0.0, -0.5], "of each table the change to its own full cache"


@pytest.mark.slow
def test_the_study_runs_and_goes_on_where_it_was(tmp_path):
    config: Any = config_file.get_config("smoke")
    config.unlock()
    config.study.asked = 3
    config.study.methods = ("snapkv(w=8)@keep={keep}", "adakv(w=8)@keep={keep},kv=int4(residual=8)")
    found = run(config, tmp_path)
    assert all(check["ok"] for check in found["checks"])
    _, snap, _, _, packed = found["metrics"]["cells"]
    assert packed["bytes"] < 0.5 * snap["bytes"] and abs(packed["kept"] - snap["kept"]) < 0.01
    cells = (tmp_path / "cells.jsonl").read_text().splitlines()
    assert len(cells) == 5
    (tmp_path / "cells.jsonl").write_text("\n".join(cells[:-1]) + "\n")
    assert run(config, tmp_path)["metrics"] == found["metrics"]
    assert len((tmp_path / "cells.jsonl").read_text().splitlines()) == 5


@pytest.mark.slow
def test_a_model_is_trained_and_asked():
    c = dataclasses.replace(smoke().recall, steps=2, batch=2, asked=4)
    lines = recall.run_models(c, None)
    assert [one["method"] for one in lines] == ["full"], "two steps teach nothing: nothing more is asked"
