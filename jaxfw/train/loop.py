"""The training loop: what happens between a fresh state and a trained one, in the order in which it happens.

Batches come from a function of the step and randomness from a key folded with it, so a run that goes on from a
checkpoint does the same work as one that was never interrupted.
"""

import math
import time
from collections.abc import Callable, Mapping

import jax
import numpy as np
from tqdm import tqdm

from jaxfw.core.checkpoint import Checkpoints
from jaxfw.core.errors import RunError
from jaxfw.core.log import Metrics
from jaxfw.core.shapes import PRNGKeyArray, PyTree
from jaxfw.train.step import TrainState


def train(
    train_state: TrainState,
    step: Callable[[TrainState, PyTree, PRNGKeyArray], tuple[TrainState, dict]],
    batches: Callable[[int], PyTree],
    key: PRNGKeyArray,
    *,
    steps: int,
    metrics: Metrics,
    checkpoints: Checkpoints,
    evaluate: Callable[[PyTree], Mapping[str, float]] | None = None,
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
        checkpoints: receive the state every `save_every` steps.
        evaluate: parameters -> named numbers.
        log_every: steps between two rows of metrics.
        evaluate_every: steps between two evaluations.
        save_every: steps between two checkpoints.

    Raises:
        RunError: the loss or the norm of its gradient is not finite; what was saved before is good.
    """
    done = int(train_state.step)
    bar = tqdm(total=steps, initial=done, desc="train", unit="step", disable=None, dynamic_ncols=True)
    since, logged = time.perf_counter(), done
    for number in range(done + 1, steps + 1):
        train_state, measured = step(train_state, batches(number), key)
        is_last = number == steps
        is_saved = is_last or number % save_every == 0
        row: dict[str, float] = {}
        if is_saved or number % log_every == 0:
            row = {name: float(value) for name, value in jax.device_get(measured).items()}
            _check_finite(row, logged, number, checkpoints)
            row["perf/steps_per_s"] = (number - logged) / (time.perf_counter() - since)
            bar.set_postfix(loss=f"{row['train/loss']:.3f}", refresh=False)
            bar.update(number - bar.n)
        if evaluate is not None and (is_last or number % evaluate_every == 0):
            row |= evaluate(train_state.params)
        if row:
            metrics.write(number, row)
            since, logged = time.perf_counter(), number
            if bar.disable and (is_last or number % evaluate_every == 0):
                print(f"step {number}/{steps}  {_written(row)}", flush=True)
        if is_saved:
            checkpoints.save(number, train_state)
    bar.close()
    return train_state


def _check_finite(row: Mapping[str, float], logged: int, number: int, checkpoints: Checkpoints) -> None:
    if math.isfinite(row["train/loss"]) and math.isfinite(row["train/grad_norm"]):
        return
    good = checkpoints.latest_step
    kept = f"The newest checkpoint is of step {good}." if good is not None else "There is no checkpoint yet."
    raise RunError(
        f"train/loss={row['train/loss']}, train/grad_norm={row['train/grad_norm']} between steps {logged + 1} and "
        f"{number}: lower optimizer.learning_rate, raise optimizer.warmup, or look at the data of these steps. {kept}"
    )


def _written(row: Mapping[str, float]) -> str:
    return "  ".join(f"{name} {np.format_float_positional(value, 4, fractional=False)}" for name, value in row.items())
