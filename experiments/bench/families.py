"""CPU speed of every family beside transformers + torch: the same weights, two threads each. Needs `oracle`.

    python -m experiments.bench.families [--pairs 9] [--only mixtral]   # a table, experiments/results/families.json
    python -m experiments.bench.families --smoke                        # tiny models, two pairs, writes nothing

A float32 model of some 5 to 9 M parameters of each family is made by transformers with its default initialisation,
saved, and read by `jaxfw.weights.load`. Jobs: a forward of 4 x 256 tokens to all logits, and 64 greedy tokens behind 4
prompts of 64. Results are compared before anything is timed; then the sides take turns as in
`experiments.bench.cpu_lm`, and a ratio is torch's seconds over ours: above 1 we are faster. transformers keeps its
defaults but for attention ("sdpa"); how it runs experts ("grouped_mm" or a loop, by its version) is in the report.
Where other work takes the same cores the ratios flatter us, because torch's OpenMP threads wait for each other. So a
job waits (`--wait` seconds at most) until the machine is quiet, and is measured again, three times at most, when others
took more than 5 % of the cores meanwhile; the report holds the share that they took.
"""

import argparse
import dataclasses
import json
import os
import sys
import tempfile
from typing import Any

from experiments.bench import cpu_lm
from experiments.bench.cpu_lm import THREADS, Models, Size
from experiments.bench.neighbours import QUIET, Neighbours, wait_until_quiet

RESULTS = cpu_lm.RESULTS.with_name("families.json")
SIZE = Size(width=256, layers=4, heads=8, kv_heads=2, ffn=704, vocab=4096, length=256)
SMOKE = Size(width=64, layers=2, heads=4, kv_heads=2, ffn=96, vocab=256, length=32, prompt=16, new=8)


def families(size: Size) -> dict[str, dict[str, Any]]:
    """model_type -> attributes of its configuration in transformers."""
    shared = {
        "vocab_size": size.vocab, "hidden_size": size.width, "intermediate_size": size.ffn,
        "num_hidden_layers": size.layers, "num_attention_heads": size.heads, "num_key_value_heads": size.kv_heads,
        "head_dim": size.width // size.heads, "max_position_embeddings": 2 * size.length, "tie_word_embeddings": False,
        "pad_token_id": None, "bos_token_id": None, "eos_token_id": None,
    }  # fmt: skip
    narrow = size.ffn // 3
    return {
        "llama": shared,
        "mistral": shared | {"sliding_window": size.length // 2},
        "qwen2": shared,
        "qwen3": shared,
        "gpt2": {
            "vocab_size": size.vocab, "n_embd": size.width, "n_layer": size.layers, "n_head": size.heads,
            "n_positions": 2 * size.length, "pad_token_id": None, "bos_token_id": None, "eos_token_id": None,
        },
        "mixtral": shared | {"num_local_experts": 8, "num_experts_per_tok": 2, "intermediate_size": narrow,
                             "sliding_window": None},
        "qwen2_moe": shared | {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": narrow,
                               "shared_expert_intermediate_size": narrow},
        "qwen3_moe": shared | {"num_experts": 16, "num_experts_per_tok": 4, "moe_intermediate_size": narrow // 2,
                               "norm_topk_prob": True},
        "olmoe": shared | {"num_experts": 16, "num_experts_per_tok": 4, "intermediate_size": narrow // 2},
    }  # fmt: skip


def make_models(size: Size, model_type: str) -> Models:
    """A family's model on both sides."""
    import numpy as np
    import torch  # pyright: ignore[reportMissingImports]
    import transformers  # pyright: ignore[reportMissingImports]

    from jaxfw.weights import load

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    torch.set_num_threads(THREADS)
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(model_type, **families(size)[model_type])
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").eval()
    with tempfile.TemporaryDirectory() as directory:
        model.save_pretrained(directory)
        checkpoint = load(directory)
    tokens = np.random.default_rng(0).integers(0, size.vocab, (size.batch, size.length + 1), np.int32)
    return Models(size, model, checkpoint.config, checkpoint.params, tokens)


def measure(size: Size, model_type: str, pairs: int, wait: float) -> dict[str, Any]:
    """Both jobs of a family, with tokens a second of each side by its median."""
    import jax

    models = make_models(size, model_type)
    row: dict[str, Any] = {
        "family": model_type,
        "parameters": sum(leaf.size for leaf in jax.tree.leaves(models.params)),
        "experts_there": getattr(models.torch_model.config, "_experts_implementation", None),
    }
    for job, tokens in (
        (cpu_lm.forward_job(models), size.batch * size.length),
        (cpu_lm.decode_job(models, size.batch), size.batch * size.new),
    ):
        found = undisturbed(job, pairs, wait)
        found["tokens_per_second"] = {side: tokens / s for side, s in found["median_seconds"].items()}
        row[job.name.split()[0]] = found
    return row


def undisturbed(job: cpu_lm.Job, pairs: int, wait: float) -> dict[str, Any]:
    """`cpu_lm.measure` while the machine is quiet: of three tries at most, the one with the least of others."""
    tries = []
    for _ in range(3):
        wait_until_quiet(wait)
        watch = Neighbours()
        tries.append(cpu_lm.measure(job, pairs) | {"others": watch.share()})
        if (tries[-1]["others"] or 0) < QUIET or not wait:
            break
    return min(tries, key=lambda found: found["others"] or 0) | {"tries": len(tries)}


def show(row: dict[str, Any]) -> None:
    """A line of the table for each job."""
    for job in ("forward", "generate"):
        found, (theirs, ours) = row[job], row[job]["tokens_per_second"].values()
        low, high, least, most = *found["interval"], *found["range"]
        print(f"{row['family']:10} {row['parameters'] / 1e6:5.1f} M {job:9} {found['ratio']:6.2f} "
              f"{low:8.2f}..{high:5.2f} {least:8.2f}..{most:5.2f} {theirs:9.0f} {ours:9.0f} "
              f"{found['others'] or 0:6.0%}", flush=True)  # fmt: skip


def main() -> int:
    """Print the table; write the report unless this is a smoke run or not all families."""
    parser = argparse.ArgumentParser(description="CPU speed of every family beside transformers + torch.")
    parser.add_argument("--pairs", type=int, default=9)
    parser.add_argument("--wait", type=float, default=600)
    parser.add_argument("--only", choices=tuple(families(SMOKE)))
    parser.add_argument("--smoke", action="store_true")
    options = parser.parse_args()
    # XLA takes as many threads as the process may use cores; this must come before jax starts.
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:THREADS])
    os.environ["JAX_PLATFORMS"] = "cpu"
    size, pairs, wait = (SMOKE, 2, 0) if options.smoke else (SIZE, options.pairs, options.wait)
    print(f"{'family':10} {'size':>7} {'job':9} {'ratio':>6} {'95% interval':>15} {'range':>15} {'torch t/s':>9} "
          f"{'ours t/s':>9} {'others':>6}")  # fmt: skip
    rows = []
    for model_type in (options.only,) if options.only else families(size):
        rows.append(measure(size, model_type, pairs, wait))
        show(rows[-1])
    if options.smoke or options.only:
        return 0

    from jaxfw.core import runtime

    settings = {"threads": THREADS, "dtype": "float32", "ratio": "torch's seconds / ours", "pairs": pairs}
    report = {
        "environment": runtime.environment(),
        "settings": settings | dataclasses.asdict(size),
        "families": rows,
    }
    RESULTS.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    print(f"written: {RESULTS}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
