"""Checkpoints of a whole pytree by orbax: atomic, the newest few kept, restored in the structure of an example."""

from pathlib import Path
from typing import Any

import jax

from jaxfw.core.errors import InputError
from jaxfw.core.shapes import PyTree

KEEP = 2


class Checkpoints:
    """The folder `checkpoints/` of a workdir, one subfolder a step. With `folder` None nothing is kept."""

    def __init__(self, folder: Path | None):
        self._manager: Any = None
        if folder is None:
            return
        import orbax.checkpoint as ocp

        options = ocp.CheckpointManagerOptions(max_to_keep=KEEP)
        self._manager = ocp.CheckpointManager(folder.resolve(), options=options)

    @property
    def latest_step(self) -> int | None:
        """The step of the newest complete checkpoint."""
        return None if self._manager is None else self._manager.latest_step()

    def save(self, step: int, tree: PyTree) -> None:
        """Write in the background; a step that is there already is left alone."""
        if self._manager is not None and step != self.latest_step:
            import orbax.checkpoint as ocp

            self._manager.save(step, args=ocp.args.StandardSave(tree))

    def restore(self, like: PyTree) -> PyTree:
        """The newest checkpoint, with the tree, shapes, dtypes and shardings of `like` (arrays or their shapes).

        Raises:
            InputError: the checkpoint cannot be read, or is of another tree.
        """
        import orbax.checkpoint as ocp

        example = jax.tree.map(ocp.utils.to_shape_dtype_struct, like)
        step = self.latest_step
        try:
            return self._manager.restore(step, args=ocp.args.StandardRestore(example))
        except Exception as error:  # orbax and its stores raise many kinds for a damaged or another tree
            folder = self._manager.directory / str(step)
            raise InputError(
                f"{folder} cannot be restored ({str(error).splitlines()[0]}): remove that folder to go back to the "
                "checkpoint before it, or give another --workdir."
            ) from error

    def close(self) -> None:
        """Wait until everything is written."""
        if self._manager is not None:
            self._manager.wait_until_finished()
            self._manager.close()

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()
