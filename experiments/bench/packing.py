"""What packing documents into rows wastes, and what it costs.

    python -m experiments.bench.packing    # prints, writes experiments/results/packing.json

Padding of the documentation strings of Python's standard library, by a byte-pair vocabulary of 8,000 made of them, at
four lengths, beside one document a row (cut at the row's end). Seconds of a plan and of an epoch's order for a million
documents of log-normal length at 2,048, and of a batch of 32 rows.
"""

import json
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

from jaxfw.core.runtime import environment
from jaxfw.core.workdir import write_json
from jaxfw.data import Corpus, Packed, encode_documents, stdlib_docstrings, train_bpe

RESULT = Path(__file__).parents[1] / "results" / "packing.json"
LENGTHS = (128, 512, 1024, 2048)
MANY = 1_000_000


def padding() -> dict[str, Any]:
    """Shares of all places, by length."""
    texts = stdlib_docstrings()
    tokenizer = train_bpe(texts, vocab_size=8000)
    corpus = Corpus.of(encode_documents(texts, tokenizer), vocab_size=tokenizer.vocab_size)
    filled = {T: np.minimum(corpus.lengths, T + 1).sum() / ((T + 1) * len(corpus)) for T in LENGTHS}
    return {
        "documents": len(corpus),
        "mean_tokens": corpus.size / len(corpus),
        "packed": {str(T): Packed(corpus, batch=8, length=T).padding for T in LENGTHS},
        "one_document_a_row": {str(T): 1 - float(share) for T, share in filled.items()},
    }


def costs() -> dict[str, float]:
    """Seconds."""
    rng = np.random.default_rng(0)
    lengths = np.clip(rng.lognormal(5.5, 1.2, MANY), 2, 8192).astype(np.int64)
    ends = np.cumsum(lengths)
    tokens = np.zeros(ends[-1], np.uint16)
    corpus = Corpus(tokens, ends - lengths, ends, None, 2, "zeros")
    begun = time.perf_counter()
    batches = Packed(corpus, batch=32, length=2048)
    planned = time.perf_counter()
    batches(1)
    first = time.perf_counter()
    for step in range(2, 102):
        batches(step)
    return {
        "plan": planned - begun,
        "epoch_and_first_batch": first - planned,
        "batch": (time.perf_counter() - first) / 100,
    }


def main() -> int:
    """Measure, print and write."""
    found = padding() | {"seconds": costs(), "million_documents": MANY}
    print(json.dumps(found, indent=2))
    write_json(RESULT, found | {"environment": environment()})
    return 0


if __name__ == "__main__":
    sys.exit(main())
