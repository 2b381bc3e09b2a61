"""Loading a model directory beside safetensors + torch: the same files, warm in the page cache. Needs `oracle`.

    python -m experiments.bench.load [--pairs 9]    # prints a table, writes experiments/results/load.json
    python -m experiments.bench.load --smoke        # a tiny model, three pairs, writes nothing

A LLaMA of 1 GiB is written in float32 (one file) and in bfloat16 (three). Torch reads each shard by
`safetensors.torch.load_file` and copies every tensor, as what comes back are maps of the file, of which nothing has
been read. We check the files against config.json, transpose the kernels and hand the parameters to jax; the rows "to
int8" and "to int4" also quantise them, while torch loads as before. The sides take turns; what counts is the median
ratio of a pair, torch's seconds over ours, above 1 where we are faster.
"""

import argparse
import dataclasses
import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

from experiments.bench.pairs import CONFIDENCE, take_turns

THREADS = 2
GIB = 2**30
RESULTS = Path(__file__).parents[1] / "results" / "load.json"


@dataclasses.dataclass(frozen=True)
class Job:
    """A directory of that dtype, and how it is loaded; `layers` make it a GiB."""

    name: str
    dtype: str
    layers: int
    shard_bytes: int
    quantise: str | None = None


JOBS = (
    Job("float32, one file", "float32", 13, 5 * 10**9),
    Job("bfloat16, three files", "bfloat16", 28, 4 * 10**8),
    Job("bfloat16 to int8", "bfloat16", 28, 4 * 10**8, "int8"),
    Job("bfloat16 to int4", "bfloat16", 28, 4 * 10**8, "int4"),
)


def write_model(folder: Path, job: Job, width: int) -> Path:
    """A directory with numbers that are quickly made and differ from place to place."""
    import jax
    import numpy as np

    from jaxfw.models import DecoderConfig
    from jaxfw.weights import abstract_params, save

    directory = folder / f"{job.dtype}-{job.layers}"
    if directory.exists():
        return directory
    config = DecoderConfig(
        vocab=32 * width, width=width, ffn=4 * width, layers=job.layers, heads=16, kv_heads=16, head_dim=width // 16,
        positions=2048, param_dtype=job.dtype, dtype=job.dtype,
    )  # fmt: skip
    wave = np.sin(np.arange(10007))
    params = jax.tree.map(lambda x: np.resize(wave, x.shape).astype(x.dtype), abstract_params(config))
    return save(directory, config, params, shard_bytes=job.shard_bytes)


def measure(directory: Path, job: Job, pairs: int) -> dict[str, Any]:
    """Check that both sides hold the same numbers, then take turns."""
    import jax
    import numpy as np
    from safetensors.torch import load_file  # pyright: ignore[reportMissingImports]

    from jaxfw.weights import load

    def theirs() -> dict[str, Any]:
        shards = sorted(directory.glob("*.safetensors"))
        return {name: tensor.clone() for shard in shards for name, tensor in load_file(shard).items()}

    def ours() -> Any:
        return jax.block_until_ready(load(directory, quantise=job.quantise).params)

    if job.quantise is None:
        kernel = ours()["layers_0"]["mlp"]["down"]["kernel"]
        expected = theirs()["model.layers.0.mlp.down_proj.weight"].float().numpy().T
        if not np.array_equal(np.asarray(kernel, np.float32), expected):
            raise RuntimeError("the sides hold different numbers: nothing was timed.")
    size = sum(path.stat().st_size for path in directory.glob("*.safetensors"))
    row = {"job": job.name, "bytes": size, **take_turns({"theirs": theirs, "ours": ours}, pairs)}
    row["seconds_per_gib"] = {side: seconds * GIB / size for side, seconds in row["median_seconds"].items()}
    return row


def run(jobs: tuple[Job, ...], width: int, pairs: int) -> list[dict[str, Any]]:
    """Every job; prints a row as soon as it is known."""
    interval = f"{CONFIDENCE:.0%} interval"
    print(f"{'job':24} {'GiB':>6} {'ratio':>6} {interval:>16} {'torch s/GiB':>12} {'ours s/GiB':>12}")
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for job in jobs:
            row = measure(write_model(Path(folder), job, width), job, pairs)
            low, high = row["interval"]
            theirs, ours = row["seconds_per_gib"].values()
            print(f"{job.name:24} {row['bytes'] / GIB:6.2f} {row['ratio']:6.2f} {low:10.2f}..{high:4.2f} "
                  f"{theirs:12.2f} {ours:12.2f}", flush=True)  # fmt: skip
            rows.append(row)
    return rows


def main() -> int:
    """Print the table; write the report unless this is a smoke run."""
    parser = argparse.ArgumentParser(description="Load time beside safetensors + torch.")
    parser.add_argument("--pairs", type=int, default=9)
    parser.add_argument("--smoke", action="store_true")
    options = parser.parse_args()
    # XLA takes as many threads as the process may use cores; this must come before jax starts.
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:THREADS])
    os.environ["JAX_PLATFORMS"] = "cpu"
    if options.smoke:
        run(tuple(dataclasses.replace(job, layers=2) for job in JOBS), width=64, pairs=3)
        return 0
    load = os.getloadavg()[0]
    rows = run(JOBS, width=1024, pairs=options.pairs)

    from jaxfw.core import runtime

    settings = {"threads": THREADS, "ratio": "torch's seconds / ours", "load_before": load, "page_cache": "warm"}
    report = {"environment": runtime.environment(), "settings": settings, "jobs": rows}
    RESULTS.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    print(f"written: {RESULTS}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
