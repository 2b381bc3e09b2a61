"""The loss on held-out rows, with what their documents weigh: as numbers of each row, for intervals."""

import json
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from experiments.train.first_state import model_params
from experiments.train.settings import TrainingConfig
from jaxfw.core.distributed import current
from jaxfw.core.shapes import Float
from jaxfw.core.workdir import write_json
from jaxfw.train import NextTokenLoss, TrainState
from jaxfw.train.feed import own_rows, place

BEFORE = "validation_before.json"


class Scored(NamedTuple):
    """Of each held-out row: summed negative log-likelihood in nats, and what its tokens weigh together."""

    nll: Float[np.ndarray, "N"]
    weights: Float[np.ndarray, "N"]

    @property
    def mean(self) -> float:
        """Nats a token."""
        return float(self.nll.sum() / max(self.weights.sum(), 1.0))


class Evaluation:
    """Held-out batches on the devices, and one compiled program that scores a state on them."""

    def __init__(self, c: TrainingConfig, mesh: Mesh, loss: NextTokenLoss, held_out: Sequence[dict[str, np.ndarray]]):
        total = len(held_out[0]["tokens"])
        rows = own_rows(mesh, total)
        parts = [{name: x[rows.start : rows.stop] for name, x in batch.items()} for batch in held_out]
        self._batches = [place(mesh, part, rows=rows, total=total) for part in parts]

        @partial(jax.jit, out_shardings=NamedSharding(mesh, PartitionSpec()))
        def score(state: TrainState, batch: Any) -> Any:
            return loss.rows(model_params(c, state), batch, state=state.state)

        self._score = score

    def __call__(self, state: TrainState) -> Scored:
        """The held-out rows under a state's parameters, averaged ones where the optimiser averages."""
        scored = [jax.device_get(self._score(state, batch)) for batch in self._batches]
        return Scored(*(np.concatenate([pair[i] for pair in scored]).astype(np.float64) for i in (0, 1)))

    def before(self, state: TrainState, workdir: Path | None) -> Scored | None:
        """The rows as they were before the first step; a run that goes on finds them in its workdir."""
        path = workdir and workdir / BEFORE
        if path and path.is_file():
            return Scored(*(np.array(values) for values in json.loads(path.read_text(encoding="utf-8")).values()))
        if int(state.step) > 0:
            return None  # it goes on from another run
        scored = self(state)
        if path and current().is_main:
            write_json(path, {name: values.tolist() for name, values in scored._asdict().items()})
        return scored
