"""Throughput of an evaluation beside lm-eval's own `hf` backend: the same model, the same requests. Needs `oracle`.

    python -m experiments.bench.harness [--pairs 9]    # prints, writes experiments/results/harness.json
    python -m experiments.bench.harness --smoke        # a tiny model, two pairs, writes nothing

Jobs: log-likelihoods of four answers to each question behind four solved ones, the sum of whole texts, and greedy
continuations up to a stop. Both sides get requests as lm-eval makes them, cut and batch them themselves (16 rows),
and use two threads. Answers are compared before anything is timed. Above 1 we are faster.
"""

import argparse
import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

from experiments.bench.cpu_lm import RESULTS, THREADS
from experiments.bench.pairs import take_turns

RESULT = RESULTS.with_name("harness.json")
BATCH, NEW = 16, 32


def requests(count: int) -> dict[str, list[Any]]:
    """By the method that answers them."""
    from lm_eval.api.instance import Instance

    from jaxfw.evals import TASKS, items
    from jaxfw.evals.evaluate import examples
    from jaxfw.evals.shots import few_shot

    task = TASKS["facts"]
    asked = items(task, n=count, level=1, seed=0)
    prompts = [few_shot(item, examples(task, 1, 4, seed=0, place=i)).text for i, item in enumerate(asked)]
    choices = [
        (prompt, f" {choice}")
        for prompt, item in zip(prompts, asked, strict=True)
        for choice in (item.answer, *[other for other in item.choices if other != item.answer][:3])
    ]
    texts = ["".join(item.prompt + item.target for item in asked[i::8]) for i in range(8)]

    def made(kind: Any, arguments: list[tuple[Any, ...]]) -> list[Any]:
        return [Instance(kind, {}, found, i) for i, found in enumerate(arguments)]

    return {
        "loglikelihood": made("loglikelihood", list(choices)),
        "loglikelihood_rolling": made("loglikelihood_rolling", [(text,) for text in texts]),
        "generate_until": made(
            "generate_until", [(prompt, {"until": ["\n\n"], "max_gen_toks": NEW}) for prompt in prompts[: 2 * BATCH]]
        ),
    }


def model(directory: Path, *, width: int, layers: int) -> Path:
    """A LLaMA with random weights and a tokenizer of the tasks."""
    import jax

    from experiments.embedded.lessons import vocabulary_texts
    from jaxfw.data import train_bpe
    from jaxfw.generate import LM
    from jaxfw.models import DecoderConfig, init

    config = DecoderConfig(
        vocab=2048, width=width, ffn=11 * width // 4, layers=layers, heads=width // 64, kv_heads=width // 64,
        head_dim=64, positions=1024, init_std=width**-0.5,
    )  # fmt: skip
    tokenizer = train_bpe(vocabulary_texts(), vocab_size=config.vocab, single_digits=True)
    params = jax.jit(lambda: init(config, jax.random.key(0)))()
    return LM(config, params, tokenizer, (tokenizer.eos_id or 0,)).save(directory)


def compare(kind: str, ours: list[Any], theirs: list[Any]) -> None:
    """Refuse to time sides that disagree; one string in ten may differ, by a near-tie of random weights."""
    if kind == "generate_until":
        same = sum(one == other for one, other in zip(ours, theirs, strict=True))
        assert same >= 0.9 * len(ours), f"{same} of {len(ours)} strings are equal"
        return
    for one, other in zip(ours, theirs, strict=True):
        a, b = (found[0] if isinstance(found, tuple) else found for found in (one, other))
        assert abs(a - b) <= 1e-4 + 1e-5 * abs(b), f"{kind}: {a} here, {b} there"


def main() -> int:
    """Compare, time, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=9)
    parser.add_argument("--smoke", action="store_true")
    options = parser.parse_args()
    os.environ["HF_HUB_OFFLINE"] = "1"
    import torch  # pyright: ignore[reportMissingImports]
    from lm_eval.models.huggingface import HFLM

    from jaxfw.core.runtime import environment
    from jaxfw.evals.harness import HarnessLM

    torch.set_num_threads(THREADS)
    pairs, count = (2, 4) if options.smoke else (options.pairs, 64)
    jobs = []
    with tempfile.TemporaryDirectory() as folder:
        width, layers = (64, 1) if options.smoke else (256, 4)
        directory = str(model(Path(folder) / "model", width=width, layers=layers))
        backend: Any = HFLM
        sides: dict[str, Any] = {
            "hf": backend(pretrained=directory, device="cpu", dtype="float32", batch_size=BATCH),
            "ours": HarnessLM(directory, batch_size=BATCH),
        }
        for kind, asked in requests(count).items():
            answers = {name: getattr(side, kind)(asked, disable_tqdm=True) for name, side in sides.items()}
            compare(kind, answers["ours"], answers["hf"])
            timed = {
                name: lambda side=side, kind=kind, asked=asked: getattr(side, kind)(asked, disable_tqdm=True)
                for name, side in sides.items()
            }
            jobs.append({"job": kind, "requests": len(asked), **take_turns(timed, pairs)})
            low, high = jobs[-1]["interval"]
            print(
                f"{kind:22} {len(asked):4} requests  ratio {jobs[-1]['ratio']:.2f} [{low:.2f}, {high:.2f}]", flush=True
            )
    if not options.smoke:
        report = {"jobs": jobs, "model": {"width": 256, "layers": 4}, "environment": environment()}
        RESULT.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
