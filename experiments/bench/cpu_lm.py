"""CPU speed beside transformers + torch: the same weights, two threads each, in one process. Needs `oracle`.

    python -m experiments.bench.cpu_lm [--pairs 9]    # prints a table, writes experiments/results/cpu_lm.json
    python -m experiments.bench.cpu_lm --smoke        # a tiny model, three pairs, writes nothing

A LLaMA of 31.6 M parameters in float32 is made by transformers, saved, and read by `jaxfw.weights.load`. Jobs: a
forward of 4 x 512 tokens to all logits, a train step on as many (loss, gradients, clipping by the global norm,
AdamW), and 64 greedy tokens behind prompts of 64, for one row and for four. Before a job is timed, its results are
compared. Then the sides take turns, torch first, and a pair gives one ratio: torch's seconds over ours, above 1
where we are faster. What counts is the median ratio with its interval of order statistics; seconds alone say little
on a machine with neighbours. Where other work takes the same cores even the ratios flatter us, because torch's OpenMP
threads wait for each other: the report holds the load average before the run, which should be near 0.
"""

import argparse
import dataclasses
import json
import os
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from experiments.bench.pairs import CONFIDENCE, take_turns

THREADS = 2
RESULTS = Path(__file__).parents[1] / "results" / "cpu_lm.json"
LEARNING_RATE, WEIGHT_DECAY, CLIP, BETAS = 3e-4, 0.1, 1.0, (0.9, 0.95)
LOGITS_TOLERANCE = 1e-4  # of the deviation of the logits


@dataclasses.dataclass(frozen=True)
class Size:
    """The model, and how much of each job is done."""

    width: int = 512
    layers: int = 8
    heads: int = 8
    kv_heads: int = 4
    ffn: int = 1376
    vocab: int = 8192
    batch: int = 4
    length: int = 512
    prompt: int = 64
    new: int = 64


SMOKE = Size(width=64, layers=2, heads=4, kv_heads=2, ffn=96, vocab=256, length=32, prompt=16, new=8)


@dataclasses.dataclass(frozen=True)
class Job:
    """The same work on both sides; each call ends when its result is there. `check` raises where they differ."""

    name: str
    theirs: Callable[[], Any]
    ours: Callable[[], Any]
    check: Callable[[], None]


@dataclasses.dataclass(frozen=True)
class Models:
    """One set of weights on both sides, and the tokens of the jobs."""

    size: Size
    torch_model: Any
    config: Any
    params: Any
    tokens: Any


def make_models(size: Size) -> Models:
    """A float32 transformers model with its default initialisation, and what we load from its files."""
    import numpy as np
    import torch  # pyright: ignore[reportMissingImports]
    import transformers  # pyright: ignore[reportMissingImports]

    from jaxfw.weights import load

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    torch.set_num_threads(THREADS)
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=size.vocab, hidden_size=size.width, intermediate_size=size.ffn, num_hidden_layers=size.layers,
        num_attention_heads=size.heads, num_key_value_heads=size.kv_heads, attn_implementation="sdpa",
        max_position_embeddings=2 * size.length, pad_token_id=None, bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config).eval()
    with tempfile.TemporaryDirectory() as directory:
        model.save_pretrained(directory)
        checkpoint = load(directory)
    tokens = np.random.default_rng(0).integers(0, size.vocab, (size.batch, size.length + 1), np.int32)
    return Models(size, model, checkpoint.config, checkpoint.params, tokens)


def forward_job(models: Models) -> Job:
    """All logits of a batch."""
    import jax
    import numpy as np
    import torch  # pyright: ignore[reportMissingImports]

    from jaxfw.models import forward

    tokens = models.tokens[:, :-1]
    torch_tokens = torch.from_numpy(tokens).long()
    run = jax.jit(lambda params, tokens: forward(models.config, params, tokens).logits)

    def theirs():
        with torch.inference_mode():
            return models.torch_model(input_ids=torch_tokens, use_cache=False).logits

    def ours():
        return run(models.params, tokens).block_until_ready()

    def check():
        expected = theirs().numpy()
        error = np.abs(np.asarray(ours()) - expected).max() / expected.std()
        _require(error <= LOGITS_TOLERANCE, f"logits differ by {error:.1e} of their deviation")

    return Job(f"forward {tokens.shape[0]}x{tokens.shape[1]}", theirs, ours, check)


def train_job(models: Models) -> Job:
    """One optimiser step; both sides keep their state from step to step."""
    theirs, ours = _torch_step(models), _jax_step(models)

    def check():
        for step in range(3):
            expected, found = theirs(), ours()
            error = abs(found - expected) / expected
            _require(error <= 1e-5, f"losses of step {step} differ: {found} here, {expected} in torch")

    size = models.size
    return Job(f"train step {size.batch}x{size.length}", theirs, ours, check)


def _torch_step(models: Models) -> Callable[[], float]:
    import copy

    import torch  # pyright: ignore[reportMissingImports]

    model = copy.deepcopy(models.torch_model).train()
    parameters = list(model.parameters())
    # On the CPU the fused update is faster than foreach.
    optimizer = torch.optim.AdamW(
        parameters, lr=LEARNING_RATE, betas=BETAS, eps=1e-8, weight_decay=WEIGHT_DECAY, fused=True
    )
    tokens = torch.from_numpy(models.tokens).long()
    inputs, targets = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()

    def step() -> float:
        optimizer.zero_grad(set_to_none=True)
        logits = model(input_ids=inputs, use_cache=False).logits
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, CLIP)
        optimizer.step()
        return loss.item()

    return step


def _jax_step(models: Models) -> Callable[[], float]:
    import jax
    import optax

    from jaxfw.train import NextTokenLoss, init_state, make_step

    optimizer = optax.chain(
        optax.clip_by_global_norm(CLIP),
        optax.adamw(LEARNING_RATE, b1=BETAS[0], b2=BETAS[1], weight_decay=WEIGHT_DECAY),
    )
    update = make_step(NextTokenLoss(models.config), optimizer)
    held = [init_state(jax.tree.map(jax.numpy.copy, models.params), optimizer)]  # each step donates what it is given
    batch, key = {"tokens": jax.numpy.asarray(models.tokens)}, jax.random.key(0)

    def step() -> float:
        held[0], metrics = jax.block_until_ready(update(held[0], batch, key))
        return float(metrics["train/loss"])

    return step


def decode_job(models: Models, batch: int) -> Job:
    """Prompt and new tokens, greedy, with a cache; prompts of one length, so that neither side pads."""
    import torch  # pyright: ignore[reportMissingImports]

    from jaxfw.generate import generate

    size = models.size
    prompts = models.tokens[:batch, : size.prompt]
    torch_prompts = torch.from_numpy(prompts).long()
    mask = torch.ones_like(torch_prompts)

    def theirs():
        with torch.inference_mode():
            ids = models.torch_model.generate(
                torch_prompts, attention_mask=mask, do_sample=False, use_cache=True,
                max_new_tokens=size.new, min_new_tokens=size.new,
            )  # fmt: skip
        return ids[:, size.prompt :]

    def ours():
        return generate(models.config, models.params, prompts.tolist(), max_new_tokens=size.new).tokens

    def check():
        expected, found = theirs().tolist(), [list(row) for row in ours()]
        _require(expected == found, f"greedy ids differ: {found} here, {expected} in transformers")

    return Job(f"generate {size.prompt}+{size.new}, B={batch}", theirs, ours, check)


def _require(is_met: bool, message: str) -> None:
    if not is_met:
        raise RuntimeError(f"{message}: nothing was timed.")


def measure(job: Job, pairs: int) -> dict[str, Any]:
    """Check, then take turns."""
    job.check()
    return {"job": job.name, **take_turns({"theirs": job.theirs, "ours": job.ours}, pairs)}


def run(size: Size, pairs: int) -> list[dict[str, Any]]:
    """Every job; prints a row as soon as it is known."""
    models = make_models(size)
    print(f"{'job':22} {'ratio':>6} {f'{CONFIDENCE:.0%} interval':>16} {'range':>14} {'torch s':>9} {'ours s':>9}")
    rows = []
    jobs = (forward_job, train_job, lambda m: decode_job(m, 1), lambda m: decode_job(m, size.batch))
    for make in jobs:
        row = measure(make(models), pairs)
        low, high, least, most = *row["interval"], *row["range"]
        theirs, ours = row["median_seconds"].values()
        print(f"{row['job']:22} {row['ratio']:6.2f} {low:10.2f}..{high:4.2f} {least:8.2f}..{most:4.2f} "
              f"{theirs:9.3f} {ours:9.3f}", flush=True)  # fmt: skip
        rows.append(row)
    return rows


def main() -> int:
    """Print the table; write the report unless this is a smoke run."""
    parser = argparse.ArgumentParser(description="CPU speed beside transformers + torch.")
    parser.add_argument("--pairs", type=int, default=15)
    parser.add_argument("--smoke", action="store_true")
    options = parser.parse_args()
    # XLA takes as many threads as the process may use cores; this must come before jax starts.
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:THREADS])
    os.environ["JAX_PLATFORMS"] = "cpu"
    if options.smoke:
        run(SMOKE, pairs=3)
        return 0
    load = os.getloadavg()[0]
    rows = run(Size(), options.pairs)

    from jaxfw.core import runtime

    settings = {"threads": THREADS, "dtype": "float32", "ratio": "torch's seconds / ours", "load_before": load}
    report = {
        "environment": runtime.environment(),
        "settings": {**settings, **dataclasses.asdict(Size())},
        "jobs": rows,
    }
    RESULTS.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    print(f"written: {RESULTS}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
