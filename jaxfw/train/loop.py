"""The training loop: what happens between a fresh state and a trained one, in the order in which it happens.

Batches come from a function of the step and randomness from a key folded with it, so a run that goes on from a
checkpoint does the same work as one that was never interrupted.
"""

import dataclasses
import math
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from tqdm import tqdm

from jaxfw.core.checkpoint import Checkpoints
from jaxfw.core.distributed import current
from jaxfw.core.errors import Preempted, RunError
from jaxfw.core.log import Metrics
from jaxfw.core.shapes import PRNGKeyArray, PyTree
from jaxfw.train.step import BAD_LEAF, TrainState, bad_leaf_name, trained_part

Measured = Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Work:
    """What one step does, for the rates in the log: tokens, model FLOPs, and the devices' peak in FLOP/s, if known."""

    tokens: int = 0
    flops: int = 0
    peak: float | None = None

    def rates(self, steps_per_second: float) -> dict[str, float]:
        """`perf/*`: steps, tokens and model FLOPs a second, and their share of the peak (MFU)."""
        flops = steps_per_second * self.flops
        found = {"steps_per_s": steps_per_second}
        found |= {"tokens_per_s": steps_per_second * self.tokens} if self.tokens else {}
        found |= {"flops_per_s": flops} if flops else {}
        found |= {"mfu": flops / self.peak} if flops and self.peak else {}
        return {f"perf/{name}": value for name, value in found.items()}


def train(
    train_state: TrainState,
    step: Callable[[TrainState, PyTree, PRNGKeyArray], tuple[TrainState, Measured]],
    batches: Callable[[int], PyTree],
    key: PRNGKeyArray,
    *,
    steps: int,
    metrics: Metrics,
    checkpoints: Checkpoints,
    evaluate: Callable[[TrainState], Mapping[str, float]] | None = None,
    notes: Mapping[str, Any] | None = None,
    stops_at: Callable[[int], bool] | None = None,
    work: Work | None = None,
    log_every: int = 10,
    evaluate_every: int = 100,
    save_every: int = 100,
) -> TrainState:
    """Run updates until `steps` of them are done; the last one is always evaluated and saved.

    Args:
        train_state: where to start; its `step` says how many updates are done. Donated.
        step: from `make_step`.
        batches: step number -> batch.
        key: the randomness of the whole run.
        steps: updates in all.
        metrics: receives `train/*` every `log_every` steps and with every checkpoint, and what `evaluate` returns every
            `evaluate_every`.
        checkpoints: receive the state every `save_every` steps, without what is frozen (see `trained_part`).
        evaluate: state -> named numbers.
        notes: what is written beside each checkpoint: what the run reads, say.
        stops_at: asked behind every step whether to save and leave (`jaxfw.core.preemption`).
        work: what a step does; adds rates to the log.
        log_every: steps between two rows of metrics.
        evaluate_every: steps between two evaluations.
        save_every: steps between two checkpoints.

    Raises:
        RunError: the loss or its gradient is not finite; what was saved before is good. A checkpoint cannot be written.
        Preempted: `stops_at` said so; a checkpoint of that step is on disk.
    """
    work = work or Work()
    done = int(train_state.step)
    bar = tqdm(total=steps, initial=done, desc="train", unit="step", dynamic_ncols=True,
               disable=None if current().is_main else True)  # fmt: skip
    since, logged, unread = time.perf_counter(), done, {}
    for number in range(done + 1, steps + 1):
        train_state, unread[number] = step(train_state, batches(number), key)
        is_last = number == steps
        is_saved = is_last or number % save_every == 0
        is_stopped = stops_at is not None and stops_at(number) and not is_last
        row: dict[str, float] = {}
        if is_saved or is_stopped or number % log_every == 0:
            measured = _finite(jax.device_get(unread), train_state, checkpoints)
            unread = {}
            bar.set_postfix(loss=f"{measured['train/loss']:.3f}", refresh=False)
            bar.update(number - bar.n)
        if is_saved or number % log_every == 0:
            row = measured | work.rates((number - logged) / (time.perf_counter() - since))
        if evaluate is not None and (is_last or number % evaluate_every == 0):
            row |= evaluate(train_state)
        if row:
            metrics.write(number, row)
            since, logged = time.perf_counter(), number
            if bar.disable and current().is_main and (is_last or number % evaluate_every == 0):
                print(f"step {number}/{steps}  {_written(row)}", flush=True)
        if is_saved or is_stopped:
            checkpoints.save(number, trained_part(train_state), notes=notes)
        if is_stopped:
            bar.close()
            checkpoints.wait()
            kept = f"step {number} is saved, and " if checkpoints.latest_step == number else ""
            raise Preempted(f"told to stop behind step {number} of {steps}: {kept}the same command goes on from there.")
    bar.close()
    return train_state


def _finite(unread: Mapping[int, Measured], train_state: TrainState, checkpoints: Checkpoints) -> dict[str, float]:
    """The numbers of the last of these steps, if those of all are finite."""
    measured: dict[str, float] = {}
    for number, values in unread.items():
        measured = {name: float(value) for name, value in values.items()}
        bad = int(measured.pop(BAD_LEAF, -1))
        if math.isfinite(measured["train/loss"]) and math.isfinite(measured["train/grad_norm"]):
            continue
        name = bad_leaf_name(train_state.params, bad)
        first = f", first in that of {name}" if name else ""
        good = checkpoints.latest_step
        kept = f"The newest checkpoint is of step {good}." if good is not None else "There is no checkpoint yet."
        raise RunError(
            f"train/loss={measured['train/loss']}, train/grad_norm={measured['train/grad_norm']} in step {number} (of "
            f"steps {min(unread)} to {max(unread)}, looked at together){first}: lower optimizer.learning_rate, raise "
            f"optimizer.warmup, or look at the data of that step. {kept}"
        )
    return measured


def _written(row: Mapping[str, float]) -> str:
    return "  ".join(f"{name} {np.format_float_positional(value, 4, fractional=False)}" for name, value in row.items())
