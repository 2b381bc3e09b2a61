"""Programs of published models as XLA compiles them for H200s, from a machine without one. Needs `aot`.

    python -m experiments.h200        # prints a table, writes experiments/results/h200.json

Compiled, never timed: one decode step of Llama-3.1-8B on eight GPUs (tensor=8) and on one, there also with weights in 4
and 8 bits, and the prefill of one of its layers, which a host loop runs for all. A row says what a device holds, which
kernels the program calls, and which collectives it waits for.
"""

import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

from jaxfw.audit.programs import decode_step, prefill_layer
from jaxfw.core import aot, hlo, runtime
from jaxfw.models.presets import preset

RESULTS = Path(__file__).parent / "results" / "h200.json"
MODEL = "llama-3.1-8b"
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
    report = {"environment": runtime.environment(), "target": "compiled for H200", "model": MODEL, "programs": rows}
    RESULTS.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    print(f"written: {RESULTS}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
