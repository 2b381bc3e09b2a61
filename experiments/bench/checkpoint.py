"""How long a training loop stands still for a checkpoint that orbax writes in the background.

    python -m experiments.bench.checkpoint [--saves 12]    # prints, writes experiments/results/checkpoint.json
    python -m experiments.bench.checkpoint --smoke         # a tiny model, two saves, writes nothing

The model of experiments.bench.cpu_lm (31.6 M parameters in float32, AdamW: 380 MB of state) trains; every tenth step is
saved. Two figures a save: how long `save` itself keeps the loop, and how much longer the next nine steps take than
without a save, as the writer works on the same cores. On a GPU only the first would be seen, and the copy to the host.
"""

import argparse
import dataclasses
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import jax

from experiments.bench.cpu_lm import SMOKE, Size
from jaxfw.core.checkpoint import Checkpoints
from jaxfw.core.runtime import environment
from jaxfw.core.workdir import write_json
from jaxfw.models import DecoderConfig, init
from jaxfw.train import NextTokenLoss, OptimizerConfig, init_state, make_optimizer, make_step

RESULT = Path(__file__).parents[1] / "results" / "checkpoint.json"
EVERY = 10


def measure(size: Size, saves: int) -> dict[str, Any]:
    """Seconds of both figures, as medians over `saves` saves, and the bytes of one."""
    config = DecoderConfig(
        vocab=size.vocab, width=size.width, ffn=size.ffn, layers=size.layers, heads=size.heads, kv_heads=size.kv_heads,
        head_dim=size.width // size.heads, positions=size.length, tie_embeddings=True,
    )  # fmt: skip
    optimizer = make_optimizer(OptimizerConfig(warmup=1), steps=1000)
    state = init_state(init(config, jax.random.key(0)), optimizer)
    size_bytes = sum(leaf.nbytes for leaf in jax.tree.leaves(state))
    step = make_step(NextTokenLoss(config), optimizer)
    batch = {"tokens": jax.random.randint(jax.random.key(1), (1, size.length // 4 + 1), 0, size.vocab)}

    def steps(state: Any, count: int) -> tuple[Any, float]:
        begun = time.perf_counter()
        for _ in range(count):
            state, measured = step(state, batch, jax.random.key(2))
        jax.block_until_ready(measured)
        return state, time.perf_counter() - begun

    state, _ = steps(state, 2)
    stalls, behind, without = [], [], []
    with tempfile.TemporaryDirectory() as folder, Checkpoints(Path(folder) / "checkpoints") as checkpoints:
        for number in range(saves + 1):
            checkpoints.wait()
            state, quiet = steps(state, EVERY - 1)
            begun = time.perf_counter()
            checkpoints.save(number + 1, state)
            stall = time.perf_counter() - begun
            state, busy = steps(state, EVERY - 1)
            if number:  # the first makes folders and threads
                stalls.append(stall)
                without.append(quiet)
                behind.append(busy - quiet)
    return {
        "state_bytes": size_bytes,
        "saves": saves,
        "stall_seconds": _summary(stalls),
        "slower_behind_seconds": _summary(behind),
        "nine_steps_seconds": _summary(without),
    }


def _summary(values: list[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "least": min(values), "most": max(values)}


def main() -> int:
    """Measure, print, and write the committed result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--saves", type=int, default=12)
    parser.add_argument("--smoke", action="store_true")
    options = parser.parse_args()
    found = measure(SMOKE if options.smoke else Size(), 2 if options.smoke else options.saves)
    print(json.dumps(found, indent=2))
    if not options.smoke:
        write_json(RESULT, found | {"size": dataclasses.asdict(Size()), "environment": environment()})
    return 0


if __name__ == "__main__":
    sys.exit(main())
