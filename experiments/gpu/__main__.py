"""Every check and benchmark that needs a GPU, in one call under nine minutes: does it compute the same, and how fast?

    python -m experiments.gpu              # on a GPU: writes experiments/results/gpu/*.json
    python -m experiments.gpu --smoke      # tiny shapes on any platform; writes nothing
    python -m experiments.gpu --only=training,generation_1

Each part runs in a process of its own, for a time of its own: one that fails, hangs or takes the device down costs only
itself, and what the others found is already written. Needs no ml_collections, as GPU images lack it. Exit codes: 0; 1
when a part failed; 2 where there is no GPU.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jaxfw.core.errors import unknown
from jaxfw.core.workdir import write_json

RESULTS = Path(__file__).parents[1] / "results" / "gpu"
NO_GPU = 2
PROBE = "import jax; print(jax.devices()[0].platform)"
SHOWN = ("ok", "error", "mfu", "tokens_per_second", "prefill_tokens_per_second", "decode_tokens_per_second", "seconds",
         "decode_step_seconds", "predicted_seconds")  # fmt: skip


def run_part(name: str, *, smoke: bool, out: Path) -> int:
    """One part in this process; what it found goes to `out`."""
    from experiments.gpu.parts import FULL, PARTS, SMOKE
    from jaxfw.core import runtime

    runtime.enable_compilation_cache()
    found = PARTS[name][0](SMOKE if smoke else FULL)
    write_json(out, found | {"environment": runtime.environment()})
    return 0 if found.get("ok", True) else 1


def supervise(name: str, limit: float, words: Sequence[str]) -> dict[str, Any]:
    """A part in a process of its own; what it found, or why it found nothing."""
    begun = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "found.json"
        command = [sys.executable, "-m", "experiments.gpu", f"--part={name}", f"--out={out}", *words]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=limit)
            said, code = done.stderr, done.returncode
        except subprocess.TimeoutExpired:
            said, code = f"stopped after its {limit:.0f} seconds", -1
        found = json.loads(out.read_text(encoding="utf-8")) if out.exists() else {"error": _last_line(said)}
    return found | {"ok": code == 0 and found.get("ok", True), "part_seconds": time.perf_counter() - begun}


def _last_line(said: str) -> str:
    lines = [line for line in said.splitlines() if line.strip()]
    return lines[-1][:500] if lines else "it said nothing"


def table(found: dict[str, dict[str, Any]]) -> str:
    """The parts and their main figures."""
    rows = []
    for name, result in found.items():
        figures = "  ".join(
            f"{key} {result[key]:.4g}" if isinstance(result[key], float) else f"{key} {result[key]}"
            for key in SHOWN[1:]
            if result.get(key) is not None and not isinstance(result[key], dict)
        )
        rows.append(f"{'ok    ' if result['ok'] else 'FAILED'} {name:24} {result['part_seconds']:6.1f} s  {figures}")
    return "\n".join(rows)


def main(argv: Sequence[str]) -> int:
    """Run all parts, or those that are named."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smoke", action="store_true", help="tiny shapes on any platform, nothing is written")
    parser.add_argument("--only", default="", help="parts, with commas")
    parser.add_argument("--part", help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if options.part:
        return run_part(options.part, smoke=options.smoke, out=options.out)
    from experiments.gpu.parts import PARTS

    names = [name for name in options.only.split(",") if name] or list(PARTS)
    for name in names:
        if name not in PARTS:
            print(f"error: {unknown('--only', name, PARTS)}", file=sys.stderr)
            return NO_GPU
    platform = subprocess.run([sys.executable, "-c", PROBE], capture_output=True, text=True).stdout.strip()
    if platform != "gpu" and not options.smoke:
        print(f"error: no GPU here, jax sees {platform!r}: install jax[cuda13], or try --smoke.", file=sys.stderr)
        return NO_GPU
    found: dict[str, dict[str, Any]] = {}
    for name in names:
        found[name] = supervise(name, PARTS[name][1], ["--smoke"] if options.smoke else [])
        print(table({name: found[name]}), flush=True)
        if not options.smoke:
            RESULTS.mkdir(parents=True, exist_ok=True)
            write_json(RESULTS / f"{name}.json", found[name])
    print(f"{sum(result['ok'] for result in found.values())} of {len(found)} parts are fine")
    return int(not all(result["ok"] for result in found.values()))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
