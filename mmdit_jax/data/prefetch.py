"""Batches ahead of the step that needs them: read by grain's threads, one ahead on the devices."""

import itertools
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grain
import jax
import numpy as np
from absl import logging

REBUILDS = 3
"""So often in a row the readers may die without a batch in between."""

# A run ends by its step count; grain wants a length.
_STEPS = 1 << 62


class HostBatches(Iterator[Any]):
    """`read(start_step)`, `read(start_step + 1)`, ... without end, read ahead by threads.

    What a step reads is a function of the step alone. So when the readers die, new ones begin at
    the step that is due, and the stream is the same. A ValueError is a finding about the data,
    which would only come again: it is passed on.
    """

    def __init__(self, read: Callable[[int], Any], start_step: int, *, threads: int, prefetch: int):
        """Starts to read.

        Args:
          read: Step -> batch; called from several threads.
          start_step: First step.
          threads: Batches that are read at the same time, no more than `prefetch`.
          prefetch: Batches that are read ahead.
        """
        self._read, self._step, self._deaths = read, start_step, 0
        self._options = grain.ReadOptions(
            num_threads=min(threads, prefetch), prefetch_buffer_size=prefetch
        )
        self._readers: grain.DatasetIterator | None = self._start()

    def _start(self) -> grain.DatasetIterator:
        dataset = grain.MapDataset.source(_Source(self._read))[self._step :]
        readers = iter(dataset.to_iter_dataset(self._options))
        readers.start_prefetch()
        return readers

    def __next__(self) -> Any:
        while True:
            try:
                if self._readers is None:
                    self._readers = self._start()
                batch = next(self._readers)
            except ValueError:
                raise
            except Exception as error:
                self._deaths += 1
                if self._deaths > REBUILDS:
                    raise
                logging.warning(
                    "reading ahead died at step %d (%s: %s), attempt %d of %d to start it again",
                    self._step,
                    type(error).__name__,
                    error,
                    self._deaths,
                    REBUILDS,
                )
                self.close()
            else:
                self._step, self._deaths = self._step + 1, 0
                return batch

    def close(self) -> None:
        """Ends the readers."""
        if self._readers is not None:
            self._readers.close()
            self._readers = None


class _Source:
    """A grain source whose item number `step` is the batch of `step`."""

    def __init__(self, read: Callable[[int], Any]):
        self._read = read

    def __len__(self) -> int:
        return _STEPS

    def __getitem__(self, step: int) -> Any:
        return self._read(int(step))


def rows_of(sharding: jax.sharding.Sharding, batch_size: int) -> np.ndarray:
    """The rows of a global batch that this host's devices hold, in rising order."""
    slices = sharding.addressable_devices_indices_map((batch_size,)).values()
    return np.unique(np.concatenate([np.arange(batch_size)[index] for index in slices]))


def on_device(
    batches: HostBatches,
    part: Callable[[int], tuple[int, np.ndarray]],
    sharding: jax.sharding.Sharding,
    start_step: int,
) -> Iterator[Any]:
    """Global arrays of host batches from `start_step` on, one batch ahead.

    Args:
      batches: Of this host.
      part: Step -> size of the global batch, and the rows of it that a host batch holds.
      sharding: How the leading axis of a global array lies on the devices.
      start_step: Step of the first batch.
    """
    steps = itertools.count(start_step)

    def place(local: np.ndarray, batch_size: int, held: np.ndarray) -> jax.Array:
        def on_one_device(index: tuple[slice, ...]) -> np.ndarray:
            start, stop, _ = index[0].indices(batch_size)
            first = int(np.searchsorted(held, start))
            return local[(slice(first, first + stop - start), *index[1:])]

        return jax.make_array_from_callback((batch_size, *local.shape[1:]), sharding, on_one_device)

    # A thread of its own, so that a slow read never holds back the batch that is already here.
    pool = ThreadPoolExecutor(1, thread_name_prefix="batch_to_device")

    def following() -> Any:
        size, held = part(next(steps))
        return jax.tree.map(lambda local: place(local, size, held), next(batches))

    ahead = pool.submit(following)
    try:
        while True:
            batch = ahead.result()
            ahead = pool.submit(following)
            yield batch
    finally:
        pool.submit(batches.close)
        pool.shutdown(wait=False)
