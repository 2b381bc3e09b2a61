"""Checkpoints of a whole pytree by orbax: written in the background, atomic, the newest few kept, restored on any mesh.

A checkpoint also holds notes: plain JSON values that say what it belongs to, such as the data that a run reads.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax

from jaxfw.core.distributed import current
from jaxfw.core.errors import InputError, RunError
from jaxfw.core.shapes import PyTree

KEEP = 2
STATE, NOTES = "state", "notes"


class Checkpoints:
    """The folder `checkpoints/` of a workdir, one subfolder a step. With `folder` None nothing is kept.

    Of several processes, all make the same calls, on a folder that all of them see.
    """

    def __init__(self, folder: Path | None, *, keep: int = KEEP, read_only: bool = False):
        self._manager: Any = None
        if folder is None:
            return
        import orbax.checkpoint as ocp

        # An interrupted save leaves a folder under another name. Of the run that holds the workdir, nobody else saves.
        options = ocp.CheckpointManagerOptions(
            max_to_keep=None if read_only else keep, cleanup_tmp_directories=not read_only, read_only=read_only,
            create=not read_only,
        )  # fmt: skip
        self._manager = ocp.CheckpointManager(folder.resolve(), options=options, item_names=(STATE, NOTES))

    @property
    def latest_step(self) -> int | None:
        """The step of the newest complete checkpoint."""
        return None if self._manager is None else self._manager.latest_step()

    def save(self, step: int, tree: PyTree, *, notes: Mapping[str, Any] | None = None) -> None:
        """Write in the background, behind the save before it; a step that is there already is left alone.

        Raises:
            RunError: the save before this one failed.
        """
        if self._manager is None or step == self.latest_step:
            return
        import orbax.checkpoint as ocp

        items = {STATE: ocp.args.StandardSave(tree), NOTES: ocp.args.JsonSave(dict(notes or {}))}
        with self._writing():
            self._manager.save(step, args=ocp.args.Composite(**items))

    def restore(self, like: PyTree, *, step: int | None = None) -> PyTree:
        """A checkpoint, the newest by default, with the tree, shapes, dtypes and shardings of `like` (or its shapes).

        Raises:
            InputError: the checkpoint cannot be read, or is of another tree.
        """
        import orbax.checkpoint as ocp

        return self._read(step, STATE, ocp.args.StandardRestore(jax.tree.map(ocp.utils.to_shape_dtype_struct, like)))

    def notes(self, *, step: int | None = None) -> dict[str, Any]:
        """What was noted beside a checkpoint, the newest by default."""
        import orbax.checkpoint as ocp

        return self._read(step, NOTES, ocp.args.JsonRestore())

    def _read(self, step: int | None, item: str, how: Any) -> Any:
        import orbax.checkpoint as ocp

        step = self.latest_step if step is None else step
        try:
            return self._manager.restore(step, args=ocp.args.Composite(**{item: how}))[item]
        except Exception as error:  # orbax and its stores raise many kinds for a damaged or another tree
            folder = self._manager.directory / str(step)
            raise InputError(
                f"{folder} cannot be restored ({_first_line(error)}): remove that folder to go back to the "
                "checkpoint before it, or give another --workdir."
            ) from error

    @contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # whatever the file system said in the background, of whatever kind
            raise RunError(
                f"a checkpoint cannot be written below {self._manager.directory} ({_first_line(error)}): the newest "
                f"complete one is of step {self.latest_step}. Make room there; the same command goes on from it."
            ) from error

    def wait(self) -> None:
        """Until everything is written.

        Raises:
            RunError: something could not be.
        """
        if self._manager is not None:
            with self._writing():
                self._manager.wait_until_finished()
                self._manager.check_for_errors()

    def close(self) -> None:
        """Wait, and let go of the folder; raises as `wait`."""
        if self._manager is not None:
            try:
                self.wait()
            finally:
                manager, self._manager = self._manager, None
                manager.close()

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, kind: object, *error: object) -> None:
        if kind is not None and current().count > 1:
            return  # a save in the background would wait for processes that may be gone
        try:
            self.close()
        except RunError:
            if kind is None:  # else what was raised first says more
                raise


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
