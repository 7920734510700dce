"""Batches read by several processes, for machines whose many cores one Python process cannot keep busy."""

import grain
from absl import flags


class ByProcesses(grain.IterDataset):
    """Grain's worker processes, with the state that a loader without them has.

    Grain's own state of worker processes fits their number alone; a run may go on with another, or without.
    """

    def __init__(self, dataset: grain.MapDataset, read_ahead: grain.ReadOptions, workers: int):
        super().__init__()
        self._dataset, self._read_ahead, self._workers = dataset, read_ahead, workers

    def __iter__(self) -> grain.DatasetIterator:
        return _Iterator(self)

    def start(self, index: int) -> grain.DatasetIterator:
        """The batches from that one on."""
        if (
            not flags.FLAGS.is_parsed()
        ):  # Grain's workers read some of its flags; in a program that parses none, their defaults
            flags.FLAGS.mark_as_parsed()
        rest = self._dataset[index:].to_iter_dataset(self._read_ahead)
        options = grain.MultiprocessingOptions(
            num_workers=min(self._workers, len(self._dataset) - index), per_worker_buffer_size=1
        )
        return iter(rest.mp_prefetch(options))

    def check(self, index: int) -> None:
        if not 0 <= index <= len(self._dataset):
            raise IndexError(f"index {index} is beyond the {len(self._dataset)} batches")


class _Iterator(grain.DatasetIterator):
    def __init__(self, dataset: ByProcesses):
        super().__init__()
        self._dataset, self._index, self._inner = (
            dataset,
            0,
            None,
        )  # the processes start at the first batch

    def __next__(self):
        if self._inner is None:
            self._inner = self._dataset.start(self._index)
        batch = next(self._inner)
        self._index += 1
        return batch

    def get_state(self) -> dict:
        return {"next_index": self._index}

    def set_state(self, state: dict) -> None:
        self._dataset.check(int(state["next_index"]))
        self.close()
        self._index = int(state["next_index"])

    def close(self) -> None:
        if self._inner is not None:
            self._inner.close()
            self._inner = None
