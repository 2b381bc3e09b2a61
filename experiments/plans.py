"""What fits on H200s: published models in training and decoding, from programs compiled here. Needs `aot`.

    python -m experiments.plans        # prints the tables, writes experiments/results/plans.json and docs/what_fits.md

Training: on 1, 8 and 64 GPUs (fsdp), a row of 4,096 tokens on each, AdamW, parameters and state in bfloat16 or float32,
arithmetic in bfloat16; of what a layer may keep for its gradient, everything, its products, or its input only. Decoding
behind full caches on 1 and 8 GPUs (tensor), weights in bfloat16 or 4 bits. Compiled, never timed; times are predicted.
"""

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from jaxfw.audit.audit import Request, audit
from jaxfw.core import runtime
from jaxfw.core.errors import InputError
from jaxfw.core.workdir import replace_text
from jaxfw.models.presets import preset

RESULT = Path(__file__).parent / "results" / "plans.json"
PAGE = Path(__file__).parents[1] / "docs" / "what_fits.md"
MODELS = ("qwen2.5-7b", "llama-3.1-8b", "mixtral-8x7b", "llama-3.1-70b")
GPUS = (1, 8, 64)
LENGTH, CHUNK = 4096, 512
CAPACITY = 1.25  # of experts; dropless ones take minutes to compile for a mesh, and no fewer bytes
REMATS = ("none", "products", "layer")
STATES = ("bfloat16", "float32/bfloat16")
CACHES = ((1, 8192), (32, 8192), (1, 131072))


def training() -> Iterator[tuple[dict[str, Any], Request]]:
    """What is compiled of training steps."""
    for model in MODELS:
        for gpus in GPUS:
            for dtypes in STATES:
                for remat in REMATS:
                    about = {"model": model, "gpus": gpus, "state": dtypes.split("/")[0], "remat": remat}
                    yield about, Request(
                        model=model, target=_target(gpus), mesh=f"fsdp={gpus}", batch=gpus, length=LENGTH,
                        dtypes=dtypes, remat=remat, chunk=CHUNK, capacity=CAPACITY if preset(model).moe else 0.0,
                    )  # fmt: skip


def decoding() -> Iterator[tuple[dict[str, Any], Request]]:
    """What is compiled of decode steps."""
    for model in MODELS:
        for gpus in GPUS[:2]:
            for quantise in ("", "int4"):
                for batch, length in CACHES:
                    about = {"model": model, "gpus": gpus, "weights": quantise or "bfloat16", "batch": batch,
                             "cache": length}  # fmt: skip
                    yield about, Request(
                        model=model, program="decode", target=_target(gpus), mesh=f"tensor={gpus}", batch=batch,
                        length=length, quantise=quantise,
                    )  # fmt: skip


def _target(gpus: int) -> str:
    return f"h200:{max(gpus // 8, 1)}x{min(gpus, 8)}"


def measure(about: dict[str, Any], request: Request) -> dict[str, Any]:
    """A row: bytes, whether it fits, what is predicted; or why it is not compiled."""
    if request.length > request.decoder.context:
        return about | {"skipped": f"the model has {request.decoder.context} positions"}
    try:
        found = audit(request)
    except InputError as error:
        return about | {"skipped": str(error)}
    assert found.timeline is not None
    return about | {
        "bytes": found.account.total, "fits": found.account.fits,
        "predicted_seconds": found.timeline.seconds, "compile_seconds": found.compile_seconds,
    }  # fmt: skip


def cell(row: dict[str, Any]) -> str:
    """`34 GB`, struck out where it does not fit."""
    if "skipped" in row:
        return "-"
    text = f"{row['bytes'] / 1e9:.0f} GB"
    return text if row["fits"] else f"~~{text}~~"


def page(found: dict[str, Any]) -> str:
    """Markdown."""
    lines = [
        "# What fits on H200s", "",
        "Bytes of one device, from programs that XLA compiled for H200s here (`python -m experiments.plans`); struck "
        f"out where {found['capacity'] / 1e9:.0f} GB are not enough. No GPU was there, nothing was timed.", "",
        "## Training", "",
        f"AdamW, one row of {LENGTH:,} tokens on each GPU, everything cut over all of them (`fsdp`), logits {CHUNK} "
        f"tokens at a time, layers in one loop, experts with capacity {CAPACITY}. Columns: what a layer keeps for its "
        "gradient (`remat`).", "",
        "| model | GPUs | parameters and state in | everything | products | its input |", "|---|---|---|---|---|---|",
    ]  # fmt: skip
    rows = found["training"]
    for first in range(0, len(rows), len(REMATS)):
        group = rows[first : first + len(REMATS)]
        about = group[0]
        lines.append(f"| {about['model']} | {about['gpus']} | {about['state']} | {' | '.join(map(cell, group))} |")
    names = [f"{batch} x {length:,}" for batch, length in CACHES]
    lines += [
        "", "## Decoding", "",
        "A step behind a full cache in bfloat16, heads cut over the GPUs (`tensor`) where they divide: 4 key heads "
        "(Qwen2.5-7B) do not by 8, and lie whole on each. Columns: rows x tokens of the cache; - where the model has "
        "fewer positions.", "",
        f"| model | GPUs | weights | {' | '.join(names)} |", "|---|---|---|---|---|---|",
    ]  # fmt: skip
    rows = found["decoding"]
    for first in range(0, len(rows), len(CACHES)):
        group = rows[first : first + len(CACHES)]
        about = group[0]
        lines.append(f"| {about['model']} | {about['gpus']} | {about['weights']} | {' | '.join(map(cell, group))} |")
    return "\n".join([
        *lines, "",
        "Another model, mesh, length or option: `python -m jaxfw.audit --help`. What does not fit is refused there, "
        "with changes that do.", "",
    ])  # fmt: skip


def main() -> int:
    """Compile everything, write results and page."""
    found: dict[str, Any] = {"capacity": int(0.95 * 150e9)}
    for name, requests in (("training", training()), ("decoding", decoding())):
        found[name] = []
        for about, request in requests:
            found[name].append(measure(about, request))
            print(json.dumps(found[name][-1]), flush=True)
    RESULT.write_text(json.dumps(found | {"environment": runtime.environment()}, indent=1) + "\n", encoding="utf-8")
    replace_text(PAGE, page(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
