"""Batches in an endless order that can be entered anywhere, by any number of workers, and loaded in parts."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable
from typing import Any

import grain
import numpy as np
from absl import flags

from lavatar_jax.errors import UserError

Batch = dict[str, np.ndarray]
EPOCHS = 1_000_000  # endless; grain's own endless repetition overflows behind a batch
Order = Callable[[int, int], grain.MapDataset]


def rows_of_part(batch: int, part: int, parts: int) -> slice:
    """The rows of a batch in one of equal parts: contiguous, so that the parts in order are the batch.

    Raises UserError.
    """
    if batch < 1 or batch % parts:
        raise UserError(f"a batch of {batch} does not split over {parts} processes; choose a multiple")
    size = batch // parts
    return slice(part * size, (part + 1) * size)


def stacked(samples: grain.MapDataset, batch: int, part: int, parts: int) -> grain.MapDataset:
    """`batch` samples (dicts of arrays) after `batch` samples, of which only the rows of a part are made."""
    rows = range(batch)[rows_of_part(batch, part, parts)]

    def read(number: int) -> Batch:
        found = [samples[number * batch + row] for row in rows]
        return {name: np.stack([sample[name] for sample in found]) for name in found[0]}

    return grain.MapDataset.range(len(samples) // batch).map(read)


class Batches:
    """Batch number k is a pure function of k: neither workers nor interruptions change the order.

    Args:
        order: `(part, parts)` -> the part of every batch that a process loads; `loop.fit` says which by
            `take_part`. May be sent to worker processes.
        workers: processes that read. They import the main script again, so its code must be under
            `if __name__ == "__main__"`; `close` ends them.
        prefetch: batches to read ahead.
        counted: how many to a batch an iterator of grain counted, whose state an earlier checkpoint has.

    Raises UserError in a worker that runs an unguarded script.
    """

    def __init__(self, order: Order, *, workers: int = 0, prefetch: int = 4, counted: int = 1) -> None:
        if workers and getattr(multiprocessing.current_process(), "_inheriting", False):
            raise UserError(
                "data workers import the main script again and it starts workers itself; put its code under "
                'if __name__ == "__main__", or set workers to 0'
            )
        self._order, self._workers, self._prefetch, self._counted = order, workers, prefetch, counted
        self._part, self._taken = (0, 1), 0
        self._iterator: grain.DatasetIterator | None = None

    def __iter__(self) -> Batches:
        return self

    def __next__(self) -> Batch:
        if self._iterator is None:
            self._iterator = self._enter()
        batch = next(self._iterator)
        self._taken += 1
        return batch

    def take_part(self, part: int, parts: int) -> None:
        """Load only one of equal parts of every batch from now on. Raises UserError where they are not."""
        self.close()
        self._order(part, parts)
        self._part = part, parts

    def get_state(self) -> dict[str, Any]:
        """The place in the order (JSON)."""
        return {"batch": self._taken}

    def set_state(self, state: dict[str, Any]) -> None:
        self.close()
        self._taken = state["batch"] if "batch" in state else _place_of_grain(state) // self._counted

    def close(self) -> None:
        """End the workers; the next batch starts new ones."""
        if self._iterator is not None:
            self._iterator.close()
        self._iterator = None

    def _enter(self) -> grain.DatasetIterator:
        order = self._order(*self._part).slice(slice(self._taken, None))
        threads = grain.ReadOptions(num_threads=min(self._prefetch, 4), prefetch_buffer_size=self._prefetch)
        batches = order.to_iter_dataset(threads)
        if self._workers:
            if not flags.FLAGS.is_parsed():  # grain reads its flags, and this is no absl program
                flags.FLAGS.mark_as_parsed()
            processes = grain.multiprocessing.MultiprocessingOptions(
                num_workers=self._workers, per_worker_buffer_size=2
            )
            batches = batches.mp_prefetch(processes, worker_init_fn=_start_worker)
        return iter(batches)


def _place_of_grain(state: dict[str, Any]) -> int:
    """How much was taken, by the state of an iterator of grain: earlier checkpoints have one."""
    if "index" in state:  # mixed kinds
        return int(state["index"])
    if "iterators_in_use_states" in state:  # workers took turns
        return sum(int(worker["next_index"]) for worker in state["iterators_in_use_states"])
    return int(state["next_index"])


def _start_worker(index: int, count: int) -> None:
    """A worker leaves Ctrl-C and SIGTERM, which may be sent to all processes of a job, to its parent, which
    ends it when all is saved; and it never touches an accelerator."""
    os.environ["JAX_PLATFORMS"] = "cpu"
    threading.Thread(target=_end_without, args=(os.getppid(),), daemon=True).start()
    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_IGN)


def _end_without(parent: int) -> None:
    """End this process when its parent is gone, which may have been killed."""
    while os.getppid() == parent:
        time.sleep(5)
    os._exit(1)
