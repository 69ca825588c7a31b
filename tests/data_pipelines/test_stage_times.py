"""What overlaps with what, and how its times are counted."""

import contextlib
import threading
import time

import jax
import numpy as np
import pytest

from data_pipelines import stage_times
from data_pipelines.samples import Sample
from data_pipelines.stage_times import LATENTS, READ, RESIZE, TEXT, StageTimes
from data_pipelines.stages.encode import AHEAD, encode_shards, run_ahead
from data_pipelines.stages.images import Box
from data_pipelines.stages.pictures import Checked, Picture
from mmdit_jax.encoders.dispatched import Dispatched


def wait_until(true):
    end = time.monotonic() + 30
    while not true():
        assert time.monotonic() < end
        time.sleep(0.001)


def test_an_iterator_runs_so_many_items_ahead_and_no_more():
    made = []
    with run_ahead((made.append(number) or number for number in range(10)), 3) as ready:
        for number in range(10):
            wait_until(lambda number=number: len(made) >= min(number + 3, 10))
            time.sleep(0.005)
            assert len(made) == min(number + 3, 10)
            assert next(ready) == number
        assert next(ready, None) is None


class Plain:
    """Stands for the pictures, the autoencoder and the captions of a build."""

    def __init__(self):
        self.given = []

    def prepared(self, items):
        for item in items:
            pixels_HWC = np.full((2, 2, 3), int(item.sample.name), np.uint8)
            yield Picture(pixels_HWC, (2, 2), Box(0, 0, 2, 2), "")

    def dispatch(self, given, times=None):
        if isinstance(given, list):
            return []
        self.given.append(given[:, 0, 0, 0].tolist())
        return Dispatched(given, lambda: given)

    def fields(self, captions):
        return {}


def test_the_next_shard_is_dispatched_before_the_records_of_this_one_are_made():
    plain = Plain()
    items = [Checked(Sample(str(number), ())) for number in range(7)]
    shards = [items[:3], items[3:]]
    encoded = encode_shards(
        shards, plain, plain, lambda part: plain, StageTimes(), identity="", batch_size=2
    )
    with contextlib.closing(encoded):
        first = next(encoded)
        record = next(first).record
        wait_until(lambda: len(plain.given) == 1 + AHEAD)
        assert plain.given == [[0, 1], [2], [3, 4]]  # a batch is of one shard
        found = [record, *(each.record for shard in (first, next(encoded)) for each in shard)]
    assert [record["latent"][0, 0, 0] for record in found] == list(range(7))


def test_an_error_is_raised_in_its_place_and_leaving_closes_the_iterator():
    ended = []

    def items():
        try:
            yield 1
            raise ValueError("the second")
        finally:
            ended.append(threading.current_thread().name.split("_")[0])

    with run_ahead(items(), 3) as ready, pytest.raises(ValueError, match="the second"):
        assert next(ready) == 1
        next(ready)
    with pytest.raises(KeyboardInterrupt), run_ahead(items(), 1) as ready:
        next(ready)
        raise KeyboardInterrupt
    assert ended == ["ahead", "ahead"]


class Result:
    """Stands for an array on a device, ready at some second."""

    def __init__(self, second):
        self.second = second


@pytest.fixture
def clock(monkeypatch):
    """Seconds that pass only while something is waited for, or when told to."""
    now = [0.0]

    def ready(arrays):
        now[0] = max(now[0], arrays.second)

    monkeypatch.setattr(stage_times.time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(stage_times.jax, "block_until_ready", ready)
    monkeypatch.setattr(stage_times.jax, "Array", Result)
    return now


def test_devices_count_from_dispatch_or_from_the_result_before(clock):
    times = StageTimes(picture_threads=2)
    clock[0] = 5.0  # before the encoding

    def dispatched(stage, taking, until):
        def dispatch():
            clock[0] += taking
            return Dispatched(Result(until), dict)

        times.dispatched(stage, 4, dispatch)
        times._watcher.submit(int).result()  # all before it are ready now

    with times:
        dispatched(LATENTS, 2.0, 8.0)  # from 5 to 8: the dispatch is a part of the work
        clock[0] = 10.0
        dispatched(LATENTS, 1.0, 12.0)  # from 10
        times._device_done = 14.0
        dispatched(TEXT, 0.0, 14.5)  # not begun before 14
        for stage, seconds in ((READ, 1.5), (RESIZE, 0.5)):
            with times.spent(stage, 3):
                clock[0] += seconds
        clock[0] = 25.0
    assert times.device_share == pytest.approx((3 + 2 + 0.5) / 20)
    rows = [line.split() for line in times.table().splitlines()]
    assert rows[1:3] == [
        ["read,", "decode", "3", "1.5", "38.0", "2"],  # of 2 threads x 20 s, 2 s were work
        ["crop,", "resize", "3", "0.5", "38.0", "6"],
    ]
    assert rows[3] == ["text", "encode", "4", "0.5", "14.5", "8"]
    assert rows[4] == ["latent", "encode", "8", "5.0", "14.5", "2"]
    assert times.table().endswith("20.0 s in all; the devices worked 28% of the time")


def test_what_the_host_computes_is_no_work_of_the_devices():
    times = StageTimes()
    with times:
        times.dispatched(LATENTS, 1, lambda: Dispatched(np.zeros(3), dict))
    assert times.device_share == 0 and "devices" not in times.table()
    with times:  # the clock starts anew
        times.dispatched(LATENTS, 1, lambda: Dispatched(jax.numpy.zeros(3), dict))
    assert "latent encode             1 " in times.table()
