"""The next batches are made while the step runs: host work and the copy to devices, in a thread."""

import queue
import threading
from collections.abc import Callable
from typing import Any

from jaxfw.core.errors import InputError


class Prefetch:
    """Gives what `place(batches(step))` gives, step by step, made up to `depth` steps ahead.

        with Prefetch(batches, place, first=1, steps=100) as ready:
            for step in range(1, 101):
                batch = ready(step)

    An error in the thread is raised, as it is, by the step that it belongs to. Leaving the context ends the thread.
    What is placed on devices takes their memory `depth` + 1 times.
    """

    def __init__(
        self,
        batches: Callable[[int], Any],
        place: Callable[[Any], Any] = lambda batch: batch,
        *,
        first: int = 1,
        steps: int,
        depth: int = 2,
    ):
        """Steps `first` to `steps` will be asked for, one after the other; `depth` batches wait at the most."""
        if depth < 1:
            raise InputError(f"depth={depth} must be at least 1: so many batches are made ahead.")
        self._make, self._steps = lambda step: place(batches(step)), range(first, steps + 1)
        self._next = first
        self._room, self._made = threading.Semaphore(depth), queue.SimpleQueue()
        self._is_over = threading.Event()
        self._thread = threading.Thread(target=self._run, name="prefetch", daemon=True)

    def __enter__(self) -> "Prefetch":
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._is_over.set()
        self._room.release()
        self._thread.join()

    def __call__(self, step: int) -> Any:
        if step != self._next or step not in self._steps:
            raise InputError(
                f"step={step} was asked for, but batches come in order, once each: {self._next} is the next of "
                f"{self._steps.start} to {self._steps.stop - 1}."
            )
        if not self._thread.ident or self._is_over.is_set():
            raise InputError(f"step={step} was asked for outside the context: use `with Prefetch(...) as ready`.")
        value, error = self._made.get()
        if error is not None:
            self._made.put((None, error))  # for whoever asks again
            raise error
        self._room.release()
        self._next += 1
        return value

    def _run(self) -> None:
        for step in self._steps:
            self._room.acquire()
            if self._is_over.is_set():
                return
            try:
                self._made.put((self._make(step), None))
            except BaseException as error:
                self._made.put((None, error))
                return
