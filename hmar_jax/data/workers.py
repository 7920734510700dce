"""Worker processes that read batches, for machines with more cores than one process can use."""

import multiprocessing
import os
import re
import signal
import sys
import threading
from multiprocessing import resource_tracker

import grain
from absl import flags

from hmar_jax.errors import InputError
from hmar_jax.interruption import SIGNALS


def _follow_the_parent(*_) -> None:
    """Leaves signals to the parent, and ends when it does, also by SIGKILL.

    A terminal sends Ctrl-C and SIGHUP to all of its processes; the parent still needs these. A
    worker that outlived it would hold memory, and the pipe that its output goes to.
    """
    threading.Thread(target=_end_with, args=[multiprocessing.parent_process()], daemon=True).start()
    for number in SIGNALS:
        if number != signal.SIGTERM:  # by which the parent ends them
            signal.signal(number, signal.SIG_IGN)


def _end_with(parent) -> None:
    parent.join()
    os._exit(1)


def _start_quiet_tracker() -> None:
    """Starts the process that removes the shared memory of batches which are not taken any more.

    Grain leaves those that were read ahead to it, and it warns of them at the end of every run.
    """
    before = list(sys.warnoptions)
    sys.warnoptions.append("ignore:resource_tracker:UserWarning")  # it gets them as arguments
    try:
        resource_tracker.ensure_running()
    finally:
        sys.warnoptions[:] = before


class MultiprocessDataset(grain.IterDataset):
    """Grain's worker processes, with the iterator state of a loader without them.

    Grain's own state of worker processes depends on how many there are. With this one, a run can
    resume with another number of workers, or with none.
    """

    def __init__(self, dataset: grain.MapDataset, read_options: grain.ReadOptions, workers: int):
        super().__init__()
        self._dataset, self._read_options, self._workers = dataset, read_options, workers

    def __iter__(self) -> grain.DatasetIterator:
        return _Iterator(self)

    def start(self, index: int) -> grain.DatasetIterator:
        """Starts the processes; returns an iterator over the batches from an index on."""
        if not flags.FLAGS.is_parsed():
            # Grain's workers read absl flags. A program that parses none gets their defaults.
            flags.FLAGS.mark_as_parsed()
        _start_quiet_tracker()
        remaining = self._dataset[index:].to_iter_dataset(self._read_options)
        options = grain.MultiprocessingOptions(
            num_workers=min(self._workers, len(self._dataset) - index), per_worker_buffer_size=1
        )
        return iter(remaining.mp_prefetch(options, worker_init_fn=_follow_the_parent))

    def check_index(self, index: int) -> None:
        if not 0 <= index <= len(self._dataset):
            raise IndexError(f"index {index} is beyond the {len(self._dataset)} batches")


class _Iterator(grain.DatasetIterator):
    def __init__(self, dataset: MultiprocessDataset):
        super().__init__()
        self._dataset, self._index = dataset, 0
        self._inner = None  # made at the first batch, since it starts the processes

    def __next__(self):
        if self._inner is None:
            self._inner = self._dataset.start(self._index)
        try:
            batch = next(self._inner)
        except RuntimeError as error:
            ended = re.search(r"terminated unexpectedly with exit code (-?\d+)", str(error))
            if ended is None:
                raise
            how = f"exit status {ended[1]}"
            if ended[1].startswith("-"):
                how = f"{signal.Signals(-int(ended[1])).name}, which a lack of memory causes too"
            raise InputError(
                f"a worker process that reads the data was ended by {how}; rerun the command, "
                "perhaps with fewer data.workers"
            ) from error
        self._index += 1
        return batch

    def get_state(self) -> dict:
        return {"next_index": self._index}

    def set_state(self, state: dict) -> None:
        self._dataset.check_index(int(state["next_index"]))
        self.close()
        self._index = int(state["next_index"])

    def close(self) -> None:
        if self._inner is not None:
            self._inner.close()
            self._inner = None
