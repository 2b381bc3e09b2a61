"""Where a run begins: its own newest checkpoint, else that of another run, else weights, else nothing.

The first two are here; weights (`init`) and fresh ones are made by whoever knows the model. A checkpoint says what data
it was trained on, and goes on with no other.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jaxfw.core.checkpoint import Checkpoints
from jaxfw.core.config import changed_fields
from jaxfw.core.errors import InputError
from jaxfw.core.shapes import PyTree
from jaxfw.train.step import FROZEN, TrainState, trained_part, with_frozen

DATA = "data"


def resume(
    checkpoints: Checkpoints, like: TrainState, *, data: Mapping[str, Any], other: str = ""
) -> TrainState | None:
    """The state to go on from; None where there is no checkpoint, and the caller begins.

    Args:
        checkpoints: of this run.
        like: the state that is wanted: trees, shapes, dtypes, shardings (arrays or shapes); what it holds frozen stays.
        data: what describes the batches, compared with what the checkpoint was trained on.
        other: a workdir of another run, its `checkpoints` folder or one in it; for a run that has no checkpoint yet.

    Raises:
        InputError: `other` holds no checkpoint; other data, by field; a checkpoint that is damaged or of another tree.
    """
    if (step := checkpoints.latest_step) is not None:
        state = _restore(checkpoints, like, data, step)
        print(f"resumed from checkpoints/{step}", flush=True)
        return state
    if not other:
        return None
    folder, wanted = _folder(other)
    with Checkpoints(folder, read_only=True) as theirs:
        step = theirs.latest_step if wanted is None else wanted
        if step is None:
            raise InputError(f"config.resume={other!r} holds no complete checkpoint: give a workdir that has one.")
        state = _restore(theirs, like, data, step)
    print(f"resumed from {folder}/{step}", flush=True)
    return state


def _restore(checkpoints: Checkpoints, like: TrainState, data: Mapping[str, Any], step: int) -> TrainState:
    held: PyTree = checkpoints.notes(step=step).get(DATA) or {}
    changes = changed_fields(held, data)
    if changes:
        raise InputError(
            f"the checkpoint of step {step} was trained on other data ({'; '.join(changes[:4])}): in another order or "
            "size of batches nothing says which examples come next. Give the same, or begin anew from its weights by "
            "config.init."
        )
    return with_frozen(checkpoints.restore(trained_part(like), step=step), like.state.get(FROZEN))


def _folder(other: str) -> tuple[Path, int | None]:
    """The folder of checkpoints, and the step if one is named."""
    path = Path(other)
    if not path.is_dir():
        raise InputError(f"config.resume={other!r} is not a directory: give the workdir of a run.")
    if re.fullmatch(r"\d+", path.name) and not (path / "checkpoints").is_dir():
        return path.parent, int(path.name)
    folder = path / "checkpoints"
    if folder.is_dir():
        return folder, None
    if any(re.fullmatch(r"\d+", inner.name) for inner in path.iterdir()):
        return path, None
    raise InputError(f"config.resume={other!r} has no checkpoints folder: give the workdir of a run.")
