"""Train a decoder: from scratch or from a model directory, whole or by adapters, on text or conversations, on any mesh.

The same path for all of them. What comes out is a Hugging Face directory (`model`) or PEFT's files (`adapter`), and a
page with the losses before and after. Run by configs/pretrain.py and configs/finetune.py.
"""

import time
from pathlib import Path
from typing import Any

import jax

from experiments.train.evaluation import Evaluation
from experiments.train.export import save_trained
from experiments.train.first_state import mesh_of, model_config, start
from experiments.train.page import describe_run, summarise
from experiments.train.reading import read
from experiments.train.settings import settings
from jaxfw.core.checkpoint import Checkpoints
from jaxfw.core.distributed import current
from jaxfw.core.log import Metrics
from jaxfw.core.preemption import Preemption
from jaxfw.data import Prefetch
from jaxfw.train import make_step, train
from jaxfw.train.feed import own_rows, place

MANY_PROCESSES = True


def describe(config: Any) -> dict[str, Any]:
    """What the run will take, without running it: parameters, bytes and operations."""
    c = settings(config)
    return describe_run(c, model_config(c))


def run(config: Any, workdir: Path | None = None) -> dict[str, Any]:
    """Train; `metrics`, `checks` and the contents of the page. Without a workdir nothing is kept."""
    c = settings(config)
    mesh, model = mesh_of(c), model_config(c)
    data = read(c, model, workdir)
    key = jax.random.key(c.seed)
    rows = own_rows(mesh, c.train.batch)

    def batch(step: int) -> Any:
        return data.batches(step, rows)

    def on_devices(batch: Any) -> Any:
        return place(mesh, batch, rows=rows, total=c.train.batch)

    with jax.set_mesh(mesh), Checkpoints(workdir and workdir / "checkpoints", keep=c.train.keep) as checkpoints:
        begun = start(c, mesh, model, checkpoints, steps=data.steps, data=data.batches.describe())
        evaluation = Evaluation(c, mesh, begun.loss, data.held_out)
        done = int(begun.state.step)
        before = evaluation.before(begun.state, workdir)
        say(f"{data.said}, {done} of {data.steps} steps are done")
        since = time.perf_counter()
        with (
            Metrics(workdir, resume_at=done) as metrics,
            Preemption() as preemption,
            Prefetch(batch, on_devices, first=done + 1, steps=data.steps) as batches,
        ):
            if before is not None and not metrics.history:
                metrics.write(0, {"validation/loss": before.mean})
            state = train(
                begun.state,
                make_step(begun.loss_fn, begun.optimizer),
                batches,
                jax.random.fold_in(key, 1),
                steps=data.steps,
                metrics=metrics,
                checkpoints=checkpoints,
                evaluate=lambda state: {"validation/loss": evaluation(state).mean},
                notes={"data": data.batches.describe()},
                stops_at=preemption.stops_at,
                work=data.work(c, model, mesh),
                log_every=c.train.log_every,
                evaluate_every=c.train.evaluate_every,
                save_every=c.train.save_every,
            )
        seconds = time.perf_counter() - since
        after = evaluation(state)
        saved = None if workdir is None else save_trained(c, begun, state, data.tokenizer, workdir)
    return summarise(c, model, data, metrics.history, before, after, seconds=seconds, saved=saved)


def say(text: str) -> None:
    """Print, in the first process only."""
    if current().is_main:
        print(text, flush=True)
