"""The stream of batches outlives those who read it."""

import itertools

import jax
import numpy as np
import pytest

from mmdit_jax.data.prefetch import REBUILDS, HostBatches, on_device


class Reading:
    """Reads a step as an array with its number; `fails`: step -> how often it dies first."""

    def __init__(self, fails, error=MemoryError):
        self.fails, self.error = dict(fails), error

    def __call__(self, step):
        if self.fails.get(step, 0) > 0:
            self.fails[step] -= 1
            raise self.error("no memory")
        return np.full(4, step)


def _steps(batches, count):
    return [int(batch[0]) for batch in itertools.islice(batches, count)]


@pytest.mark.parametrize("threads, prefetch", [(0, 0), (1, 1), (4, 8)])
def test_the_stream_goes_on_at_the_step_at_which_its_readers_died(threads, prefetch, caplog):
    reading = Reading({5: 1, 9: REBUILDS, 10: 2, 20: 1})
    batches = HostBatches(reading, 3, threads=threads, prefetch=prefetch)
    assert _steps(batches, 30) == list(range(3, 33))
    assert "reading ahead died at step 9 (MemoryError: no memory)" in caplog.text
    batches.close()


@pytest.mark.parametrize("threads, prefetch", [(0, 0), (4, 8)])
def test_readers_that_die_again_and_again_are_given_up(threads, prefetch):
    batches = HostBatches(Reading({5: REBUILDS + 1}), 3, threads=threads, prefetch=prefetch)
    assert _steps(batches, 2) == [3, 4]
    with pytest.raises(MemoryError, match="no memory"):
        next(batches)


def test_what_is_wrong_with_the_data_is_not_tried_again():
    reading = Reading({5: 1}, ValueError)
    batches = HostBatches(reading, 5, threads=2, prefetch=2)
    with pytest.raises(ValueError, match="no memory"):
        next(batches)
    batches.close()


def test_threads_that_are_gone_are_started_again():
    batches = HostBatches(Reading({}), 0, threads=2, prefetch=2)
    assert _steps(batches, 3) == [0, 1, 2]
    batches._readers._executor.shutdown()
    assert _steps(batches, 3) == [3, 4, 5]
    batches.close()


def test_batches_on_the_device_go_on_as_well():
    host = HostBatches(Reading({4: 2}), 2, threads=2, prefetch=2)
    sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    batches = on_device(host, lambda step: (4, np.arange(4)), sharding, 2)
    assert _steps(batches, 6) == list(range(2, 8))
    batches.close()
