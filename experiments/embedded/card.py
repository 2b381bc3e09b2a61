"""What the embedded model can do, measured: `experiments/results/embedded.json`, and the card beside its weights.

    python -m experiments.embedded.card                  # a quarter of an hour on two cores
    python -m experiments.embedded.card --from-results   # only writes the card anew

Every task at every level; four solved examples against none; a sliding cache of half the size against the full one;
bits a byte of English that it was not trained on.
"""

import argparse
import dataclasses
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jinja2
import numpy as np

from experiments.embedded import HELD_OUT
from experiments.embedded.lessons import BEYOND
from experiments.perplexity import score as score_windows
from jaxfw.core.runtime import enable_compilation_cache, environment
from jaxfw.core.workdir import replace_text, write_json
from jaxfw.data import stdlib_docstrings
from jaxfw.evals import ABILITIES, TASKS, items, paired_difference
from jaxfw.evals.evaluate import Score, baselines, evaluate, half_window, row, tokens_needed
from jaxfw.generate import LM, load
from jaxfw.models.accounting import parameter_count
from jaxfw.models.cache import RingCache
from jaxfw.report import ratio_interval
from jaxfw.weights import model_sha256
from jaxfw.weights.shipped import located

MODEL = "embedded-1"
RESULT = Path(__file__).parents[1] / "results" / "embedded.json"
TEMPLATE = Path(__file__).with_name("card.md.j2")
SHOTS = 4


def by_level(lm: LM, *, n: int, seed: int) -> list[dict[str, Any]]:
    """Every task at every level, beside its trivial answers."""
    rows = []
    for task in TASKS.values():
        for level in task.levels:
            found = evaluate(lm, task, n=n, level=level, seed=seed)
            needed = tokens_needed(lm, task, n=n, level=level, seed=seed)
            rows.append(row(found, baselines(task, n=n, level=level, seed=seed)) | {"tokens": needed})
            print(f"{task.name:12} {level:3}  {found.accuracy.value:.3f}", flush=True)
    return rows


def compared(lm: LM, *, n: int, seed: int) -> list[dict[str, Any]]:
    """Each ability at its standard level: with examples, and with half the cache, against neither."""
    rows = []
    window = half_window(lm, ABILITIES.values(), n=n, seed=seed)
    for name, task in ABILITIES.items():
        plain = evaluate(lm, task, n=n, seed=seed)
        few = evaluate(lm, task, n=n, seed=seed, shots=SHOTS)
        half = evaluate(lm, task, n=n, seed=seed, policy=RingCache(window))
        rows.append({"task": name, "n": n, "plain": dataclasses.asdict(plain.accuracy), "few_shot": against(plain, few),
                     "half_cache": against(plain, half) | {"window": window}})  # fmt: skip
        print(f"{name:12} few-shot {few.accuracy.value:.3f}  half cache {half.accuracy.value:.3f}", flush=True)
    return rows


def against(plain: Score, other: Score) -> dict[str, Any]:
    """Accuracy, and what it gains on the same items."""
    gain = paired_difference(plain.shares, other.shares)
    return {"accuracy": dataclasses.asdict(other.accuracy), "gain": dataclasses.asdict(gain)}


def english(lm: LM) -> dict[str, Any]:
    """Documents that were kept from training, as one stream in windows of 512 tokens."""
    text = "\n\n".join(stdlib_docstrings()[::HELD_OUT])
    tokens = np.asarray(lm.tokenizer.encode(text), np.int32)
    nll, count = score_windows(lm, tokens, context=512, stride=256, batch=8, chunk=128)
    bits = float(nll.sum()) / np.log(2) / len(text.encode())
    return {"nats_per_token": dataclasses.asdict(ratio_interval(nll, count)), "bits_per_byte": bits,
            "tokens": int(count.sum()), "bytes": len(text.encode())}  # fmt: skip


def measure(lm: LM, *, n: int, seed: int) -> dict[str, Any]:
    """All that the card says of a model."""
    return {"parameters": parameter_count(lm.config), "context": lm.config.context, "n": n, "seed": seed,
            "shots": SHOTS, "by_level": by_level(lm, n=n, seed=seed), "compared": compared(lm, n=n, seed=seed),
            "english": english(lm)}  # fmt: skip


def card_text(found: Mapping[str, Any]) -> str:
    """The card, from what `experiments/results/embedded.json` holds."""
    page = jinja2.Environment(trim_blocks=True, keep_trailing_newline=True, undefined=jinja2.StrictUndefined)
    page.filters["interval"] = lambda x: f"{x['value']:.3f} [{x['low']:.3f}, {x['high']:.3f}]"
    about = {
        name: len({item.identity for item in items(task, n=found["n"], level=task.standard, seed=found["seed"])})
        for name, task in TASKS.items()
    }
    repeated = _listed([f"{count} of {name}" for name, count in about.items() if count < 0.9 * found["n"]])
    text = TEMPLATE.read_text(encoding="utf-8")
    return page.from_string(text).render(found, beyond=_listed(list(BEYOND)), repeated=f"they are about {repeated}")


def _listed(words: list[str]) -> str:
    *some, last = words
    return f"{', '.join(some)} and {last}" if some else last


def main() -> int:
    """Measure, and write both files."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=MODEL, help="a name or a directory; the card is written into it")
    parser.add_argument("--n", type=int, default=500, help="items of each task and level")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, default=RESULT)
    parser.add_argument("--from-results", action="store_true")
    options = parser.parse_args()
    if not options.from_results:
        enable_compilation_cache()
        found = measure(load(options.model), n=options.n, seed=options.seed)
        about = {"model": options.model, "model_sha256": model_sha256(options.model)}
        write_json(options.json, about | found | {"environment": environment()})
    found = json.loads(options.json.read_text(encoding="utf-8"))
    replace_text(located(options.model) / "README.md", card_text(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
