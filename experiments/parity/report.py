"""Every case and every fault, measured and written down."""

import dataclasses
import json
from pathlib import Path
from typing import Any

from experiments.parity import dense, llama, moe
from experiments.parity.case import Oracle, build
from experiments.parity.measure import TOLERANCE, VISIBLE, fault_error, gradient_errors, logits_error
from experiments.parity.sharded import MESH, sharded_errors
from jaxfw.core import runtime

_FAMILIES = (llama, dense, moe)
CASES = {case.name: case for family in _FAMILIES for case in family.CASES}
FAULTS = tuple(fault for family in _FAMILIES for fault in family.FAULTS)
RESULTS = Path(__file__).parents[1] / "results" / "parity.json"


def run() -> dict[str, Any]:
    """Every case, every fault, the first case of each family on a mesh; the report that `parity.json` holds."""
    oracles = {name: build(case) for name, case in CASES.items()}
    report = {
        "environment": runtime.environment(),
        "tolerance": TOLERANCE,
        "visible": VISIBLE,
        "mesh": MESH,
        "ok": False,
        "parity": [_logits(oracle) for oracle in oracles.values()],
        "gradients": [_gradients(oracle) for oracle in oracles.values()],
        "sharded": _sharded(oracles),
        "mutations": [_mutation(oracles, fault) for fault in FAULTS],
    }
    report["ok"] = (
        all(row["error"] <= TOLERANCE["logits"] for row in report["parity"] + report["sharded"])
        and all(row["error"] <= TOLERANCE["gradients"] for row in report["gradients"])
        and all(row["times_tolerance"] >= VISIBLE for row in report["mutations"])
    )
    return report


def first_of_families() -> dict[str, str]:
    """model_type -> the name of its first case."""
    first: dict[str, str] = {}
    for name, case in CASES.items():
        first.setdefault(case.model_type, name)
    return first


def _logits(oracle: Oracle) -> dict[str, Any]:
    case, error = oracle.case, logits_error(oracle)
    print(f"{case.name:24} logits {error:.1e}")
    group = oracle.config.heads // oracle.config.kv_heads
    model = dataclasses.asdict(case) | {"group": group}
    return {"case": case.name, "family": case.model_type, "error": error, "deviation": oracle.deviation, "model": model}


def _gradients(oracle: Oracle) -> dict[str, Any]:
    error, leaf = max((error, leaf) for leaf, error in gradient_errors(oracle).items())
    print(f"{oracle.case.name:24} gradients {error:.1e} ({leaf})")
    return {"case": oracle.case.name, "error": error, "worst_parameter": leaf}


def _sharded(oracles: dict[str, Oracle]) -> list[dict[str, Any]]:
    names = first_of_families().values()
    rows = sharded_errors({name: oracles[name] for name in names})
    for row in rows:
        print(f"{row['case']:24} logits {row['error']:.1e} on {MESH}")
    return rows


def _mutation(oracles: dict[str, Oracle], fault: Any) -> dict[str, Any]:
    error = fault_error(oracles[fault.case], fault)
    factor = error / TOLERANCE[fault.shows_in]
    print(f"{fault.name:46} {fault.case:24} {error:.1e} = {factor:9.0f} x tolerance")
    return {"fault": fault.name, "case": fault.case, "shows_in": fault.shows_in, "error": error,
            "times_tolerance": factor}  # fmt: skip


def main() -> int:
    """Print the tables, write the report; 1 when a bound is missed."""
    report = run()
    RESULTS.parent.mkdir(parents=True, exist_ok=True)
    RESULTS.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    worst = {kind: max(row["error"] for row in report[kind]) for kind in ("parity", "gradients")}
    weakest = min(report["mutations"], key=lambda row: row["times_tolerance"])
    print(f"worst error of logits {worst['parity']:.1e}, of gradients {worst['gradients']:.1e}; weakest of")
    print(f"{len(FAULTS)} faults: {weakest['fault']}, {weakest['times_tolerance']:.0f} x tolerance; {RESULTS}")
    return 0 if report["ok"] else 1
