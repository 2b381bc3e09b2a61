"""Programs of published models as XLA compiles them for H200s, from a machine without one. Needs `aot`.

    python -m experiments.h200        # prints a table, writes experiments/results/h200.json

Compiled, never timed: one decode step of Llama-3.1-8B on eight GPUs (tensor=8) and on one, there also with weights in 4
and 8 bits, and the prefill of one of its layers, which a host loop runs for all. A row says what a device holds, which
kernels the program calls, and which collectives it waits for. A second table has decode steps of 64 rows behind 131,072
tokens with caches that keep a part, or hold it in few bits, and the time that a model of the machine predicts for them.
"""

import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

from jaxfw.audit.audit import Request, audit
from jaxfw.audit.programs import decode_step, prefill_layer
from jaxfw.core import aot, hlo, runtime
from jaxfw.models.presets import preset

RESULTS = Path(__file__).parent / "results" / "h200.json"
MODEL = "llama-3.1-8b"
CACHES = ("full", "adakv@keep=0.2", "knorm@keep=1,kv=int4", "adakv@keep=0.2,kv=int4")
KERNELS = {"__gpu$xla.gpu.triton": "decode_attention", "__cudnn$fmhaSoftmax": "cuDNN attention"}


def describe(compiled: aot.Compiled) -> dict[str, Any]:
    """Bytes of a device, calls of kernels, and collectives by kind: how often, and the bytes of the largest."""
    kinds: dict[str, dict[str, int]] = {}
    for found in hlo.collectives(compiled.text):
        entry = kinds.setdefault(found.kind, {"times": 0, "largest_bytes": 0})
        entry["times"] += found.times
        entry["largest_bytes"] = max(entry["largest_bytes"], found.bytes)
    calls = hlo.custom_calls(compiled.text)
    return {
        "bytes_per_device": dataclasses.asdict(compiled.bytes) | {"total": compiled.bytes.total},
        "kernels": {KERNELS[target]: count for target, count in calls.items() if target in KERNELS},
        "collectives": kinds,
    }


def cache_row(kv: str) -> dict[str, Any]:
    """Of a decode step of 64 rows behind 131,072 tokens on one GPU: bytes, whether they fit, and a predicted time."""
    name = "" if kv == "full" else kv
    asked = {"program": "decode", "target": "h200:1x1", "batch": 64, "length": 131072, "dtypes": "bfloat16", "kv": name}
    found = audit(Request(model=MODEL, **asked))
    assert found.timeline is not None
    return {
        "cache_bytes": found.account.parts["cache"], "total_bytes": found.account.total, "fits": found.account.fits,
        "predicted_seconds": found.timeline.seconds,
    }  # fmt: skip


def main() -> int:
    """Compile everything, print and write the table."""
    config = preset(MODEL)
    eight, one = aot.cluster("h200:1x8", tensor=8), aot.cluster("h200:1x1")
    programs = {
        "decode step, tensor=8, batch 8, cache 32768": decode_step(config, eight, batch=8, length=32768).compile(),
        "decode step, one GPU, batch 8, cache 32768": decode_step(config, one, batch=8, length=32768).compile(),
        **{
            f"decode step, one GPU, batch 1, cache 8192, {name}": decode_step(
                config, one, batch=1, length=8192, quantise=name
            ).compile()
            for name in ("int4", "int8")
        },
        "prefill of a layer, tensor=8, batch 8 x 4096": prefill_layer(config, eight, batch=8, length=4096).compile(),
        "prefill of a layer, one GPU, batch 1 x 32768": prefill_layer(config, one, batch=1, length=32768).compile(),
    }
    rows = {name: describe(program) for name, program in programs.items()}
    for name, row in rows.items():
        held = ", ".join(f"{part} {count / 2**30:.2f}" for part, count in row["bytes_per_device"].items())
        print(f"{name}\n    GiB a device: {held}\n    kernels: {row['kernels']}\n    collectives: {row['collectives']}")
    caches = {kv: cache_row(kv) for kv in CACHES}
    for kv, row in caches.items():
        verdict, step = "fits" if row["fits"] else "does not fit", row["predicted_seconds"] * 1e3
        print(f"64 rows behind 131,072 tokens, one GPU, {kv:24} cache {row['cache_bytes'] / 1e9:7.1f} GB, {verdict}, "
              f"a step {step:.0f} ms (predicted)")  # fmt: skip
    report = {
        "environment": runtime.environment(), "target": "compiled for H200", "model": MODEL, "programs": rows,
        "caches": caches,
    }  # fmt: skip
    RESULTS.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    print(f"written: {RESULTS}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
