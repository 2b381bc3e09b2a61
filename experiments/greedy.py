"""Greedy generation beside transformers: the same token ids, up to the first near-tie. Needs the `oracle` extra.

    python -m experiments.greedy        # prints both tables, writes experiments/results/greedy.json

The models are those of `experiments.parity`, with stronger layers and weaker biases: as they are, half of them repeat
one token for ever, which a wrong cache would do as well. Prompts of unequal lengths go through in batches: right-padded
here, left-padded with an attention mask there. Of kind `dynamic`, whose frequencies depend on a row's length,
transformers runs each row alone. Nothing stops a row.

Where transformers' two largest logits differ by less than `NEAR_TIE` of the logits' deviation, rounding may choose
either token and the rest of the row means nothing. Such a step is a near-tie, by transformers' own logits; a row counts
as near-tied when it meets one, and as different when it leaves transformers' path before. Each fault of `FAULTS` is
planted alone in our side and must make rows different.

Not planted, because ids are too coarse for it: a prompt kept in bfloat16 changes no row. `tests/test_cache.py` sees it.
"""

import dataclasses
import functools
import json
import re
import sys
import tempfile
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments import parity
from jaxfw.core import runtime
from jaxfw.generate import engine, programs
from jaxfw.models import decoder
from jaxfw.models.cache import FullCache
from jaxfw.weights import load

NEAR_TIE = 2e-5  # of the logits' deviation: twice what parity allows a logit
FEW = 0.02  # of all rows may meet a near-tie
STEPS = 32
BATCHES, ROWS = 2, 12
LONGEST = 150
RESULTS = parity.RESULTS.with_name("greedy.json")
# All of LLaMA's, for every kind of rotary embedding, and the first of each other family.
CASES = {
    name: case
    for name, case in parity.CASES.items()
    if case.model_type == "llama" or name in parity.first_of_families().values()
}

Batch = list[list[int]]


@dataclasses.dataclass(frozen=True)
class Reference:
    """What transformers chose for a batch, and how clearly: the gap of the two largest logits in deviations."""

    tokens: np.ndarray
    gaps: np.ndarray


@dataclasses.dataclass(frozen=True)
class Trial:
    """A model on both sides, batches of prompts, and what transformers continues them with."""

    oracle: parity.Oracle
    batches: list[Batch]
    references: list[Reference]


@dataclasses.dataclass(frozen=True)
class Counts:
    """Rows by how they compare; `distinct` is the mean number of different tokens in a row of transformers'."""

    rows: int
    equal: int
    near_tied: int
    different: int
    smallest_gap: float
    distinct: float


def build(case: parity.Case, *, batches: int = BATCHES, rows: int = ROWS) -> Trial:
    """A case's model made lively, through `save_pretrained` and `jaxfw.weights.load`, and transformers' answers."""
    model = _lively(parity.make_model(case))
    with tempfile.TemporaryDirectory() as directory:
        model.save_pretrained(directory)
        checkpoint = load(directory)
    oracle = parity.Oracle(case, model, checkpoint.config, checkpoint.params, np.empty(0), np.empty(0))
    drawn = _prompts(oracle, batches, rows)
    return Trial(oracle, drawn, [_reference(oracle, batch) for batch in drawn])


def _lively(model: Any) -> Any:
    for name, tensor in model.named_parameters():
        if name.endswith("bias"):
            tensor.data.mul_(0.05)
        elif re.search(r"mlp\.\w+_proj|[vo]_proj|mlp\.c_|attn\.c_proj|experts\.", name):
            tensor.data.mul_(4)
    return model


def _prompts(oracle: parity.Oracle, batches: int, rows: int) -> list[Batch]:
    """Random, of random lengths, one of a single token and one of the longest length in each batch."""
    rng = np.random.default_rng([2, *oracle.case.name.encode()])
    longest = min(max(LONGEST, max(oracle.case.lengths)), oracle.config.context - STEPS)
    drawn = []
    for _ in range(batches):
        lengths = [1, longest, *rng.integers(2, longest, rows - 2)]
        drawn.append([rng.integers(0, oracle.config.vocab, n).tolist() for n in rng.permutation(lengths)])
    return drawn


def _reference(oracle: parity.Oracle, batch: Batch) -> Reference:
    alone = oracle.case.rope.get("rope_type") == "dynamic"
    outs = [_generate(oracle, rows) for rows in ([[row] for row in batch] if alone else [batch])]
    tokens, logits = (np.concatenate(parts) for parts in zip(*outs))
    largest = np.sort(logits, axis=-1)[..., -2:]
    return Reference(tokens, (largest[..., 1] - largest[..., 0]) / logits.std())


def _generate(oracle: parity.Oracle, batch: Batch) -> tuple[np.ndarray, np.ndarray]:
    """New ids [B n] and the logits that they were chosen by [B n V]."""
    import torch  # pyright: ignore[reportMissingImports]

    model, longest = oracle.model, max(len(row) for row in batch)
    model.generation_config.eos_token_id = None
    if hasattr(model, "model"):  # it keeps the frequencies of the longest row it has met: start afresh
        model.model.rotary_emb = type(model.model.rotary_emb)(model.config)
    with torch.no_grad():
        out = model.generate(
            input_ids=torch.tensor([[0] * (longest - len(row)) + row for row in batch]),
            attention_mask=torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in batch]),
            max_new_tokens=STEPS, do_sample=False, pad_token_id=0, return_dict_in_generate=True, output_logits=True,
        )  # fmt: skip
    return out.sequences[:, longest:].numpy(), torch.stack(out.logits, dim=1).numpy()


def measure(trial: Trial, fault: parity.Fault | None = None) -> Counts:
    """The rows of a trial by kind, with a fault planted or without."""
    if fault is None:
        ours = _ours(trial)
    else:
        jax.clear_caches()  # what was compiled without the fault, and afterwards what was compiled with it
        with fault.planted():
            ours = _ours(trial)
        jax.clear_caches()
    tokens, gaps = (np.concatenate([getattr(x, field) for x in trial.references]) for field in ("tokens", "gaps"))
    return count(ours, Reference(tokens, gaps))


def count(ours: np.ndarray, theirs: Reference) -> Counts:
    """The rows by kind, each judged up to its first near-tie."""
    left, tied = _first(ours != theirs.tokens), _first(theirs.gaps < NEAR_TIE)
    return Counts(
        rows=len(ours),
        equal=int(np.sum(left == STEPS)),
        near_tied=int(np.sum(tied < STEPS)),
        different=int(np.sum(left < tied)),
        smallest_gap=float(theirs.gaps.min()),
        distinct=float(np.mean([len(set(row)) for row in theirs.tokens.tolist()])),
    )


def _ours(trial: Trial) -> np.ndarray:
    config, params = trial.oracle.config, trial.oracle.params
    outs = [engine.generate(config, params, batch, max_new_tokens=STEPS).tokens for batch in trial.batches]
    return np.concatenate([np.asarray(tokens) for tokens in outs])


def _first(marks: np.ndarray) -> np.ndarray:
    """Of each row, the first marked step, `STEPS` where none is."""
    return np.where(marks.any(axis=1), marks.argmax(axis=1), STEPS)


# --- faults that show in generation only: parity's are found by parity


def _one_late(real):
    def rotation(rope, positions, **options):
        return real(rope, positions + (positions.shape[1] == 1), **options)

    return rotation


def _longest_row(real):
    def rotation(rope, positions, *, width, seq_len):
        return real(rope, positions, width=width, seq_len=jnp.full_like(seq_len, seq_len.max()))

    return rotation


def _padding_seen(real):
    def prefill(self, qkv, step, **options):
        lengths = jnp.full_like(step.lengths, qkv.k.shape[1])
        return real(self, qkv, dataclasses.replace(step, lengths=lengths), **options)

    return prefill


def _prompt_end(real):
    def last_logits(config, params, x, step, taps):
        longest = jnp.full_like(step.lengths, step.lengths.max())
        return real(config, params, x, dataclasses.replace(step, lengths=longest), taps)

    return last_logits


def _new_not_kept(real):
    @functools.wraps(real)
    def extend(self, state, qkv, step, **options):
        out, after = real(self, state, qkv, step, **options)
        return out, dataclasses.replace(state, seen=after.seen)

    return extend


FAULTS = (
    parity.Fault("positions of new tokens one too high", "default", patch=(decoder, "rotation", _one_late)),
    parity.Fault("dynamic by the longest row's length", "dynamic", patch=(decoder, "rotation", _longest_row)),
    parity.Fault("padding of prompts counts as seen", "linear", patch=(FullCache, "prefill", _padding_seen)),
    parity.Fault("first token from the longest prompt's end", "llama3", patch=(programs, "_last_logits", _prompt_end)),
    parity.Fault("new tokens are not kept", "llama3, biased", patch=(FullCache, "extend", _new_not_kept)),
)  # fmt: skip


def run() -> dict[str, Any]:
    """Every case, every fault; the report that `greedy.json` holds."""
    trials = {name: build(case) for name, case in CASES.items()}
    cases, faults = [], []
    for name, trial in trials.items():
        oracle, counts = trial.oracle, measure(trial)
        group = oracle.config.heads // oracle.config.kv_heads
        model = {"rope": oracle.case.rope.get("rope_type"), "group": group, "tied": oracle.case.tied}
        cases.append({"case": name, **model, **dataclasses.asdict(counts)})
        print(f"{name:24} {counts}")
    for fault in FAULTS:
        counts = measure(trials[fault.case], fault)
        faults.append({"fault": fault.name, "case": fault.case, "rows": counts.rows, "different": counts.different})
        print(f"{fault.name:50} {fault.case:16} {counts.different} of {counts.rows} rows differ")
    total = {kind: sum(row[kind] for row in cases) for kind in ("rows", "equal", "near_tied", "different")}
    ok = not total["different"] and total["near_tied"] < FEW * total["rows"] and all(f["different"] for f in faults)
    return {
        "environment": runtime.environment(),
        "steps": STEPS,
        "near_tie": NEAR_TIE,
        "ok": ok,
        "total": total,
        "cases": cases,
        "faults": faults,
    }


def main() -> int:
    """Print both tables, write the report; 1 when a bound is missed."""
    report = run()
    RESULTS.parent.mkdir(parents=True, exist_ok=True)
    RESULTS.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    print(f"{report['total']}; {RESULTS}")
    return 0 if report["ok"] else 1


if __name__ == "__main__":
    sys.exit(main())
