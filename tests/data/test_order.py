"""Which sample comes when: every epoch is complete, every step can be asked for alone."""

import itertools
import time

import numpy as np
import pytest

from mmdit_jax.data import order
from mmdit_jax.data.order import PERIOD, batch_ids, bucket_of_step, period_slots

BUCKETS = (700, 0, 211, 89, 1)

# Integer arithmetic, so the same on every machine.
GOLDEN_SINGLE = (0, [765, 290, 99, 570, 999, 846, 453, 226])
GOLDEN_BUCKETS = (2, [41, 82, 32, 142, 132, 153, 33, 105])
GOLDEN_DRAWS = [
    [0.7916364990726035, 0.802336516951329],
    [0.8871524679308731, 0.9477604540009283],
    [0.1189178015858019, 0.5252567861489075],
]


def _stream(counts, seed, steps, batch_size):
    return np.concatenate([batch_ids(counts, seed, s, batch_size)[1] for s in range(steps)])


@pytest.mark.parametrize("n", [1, 2, 3, 4, 5, 16, 17, 99, 1000, 4097, 65536])
def test_a_permutation_hits_every_number_once(n):
    image = order.permute(np.arange(n), n, np.uint64(12345))
    np.testing.assert_array_equal(np.sort(image), np.arange(n))


@pytest.mark.parametrize("n", [2**31 + 11, 10**12, 2**52 + 1])
def test_a_permutation_of_a_huge_set_is_computed_where_asked(n):
    image = order.permute(np.arange(n - 1000, n), n, np.uint64(5))
    assert image.min() >= 0 and image.max() < n and len(set(image.tolist())) == 1000
    assert image.max() - image.min() > n // 2


def test_a_permutation_is_unbiased():
    # 6 numbers at 6 places under 12,000 keys: each pair 2,000 times, standard deviation 41.
    keys = order._hash(np.uint64(3), np.arange(12_000))
    images = order.permute(np.tile(np.arange(6), 12_000), 6, np.repeat(keys, 6)).reshape(-1, 6)
    table = np.stack([np.bincount(column, minlength=6) for column in images.T])
    assert np.abs(table - 2000).max() < 5 * 41
    orders = np.unique(images, axis=0, return_counts=True)[1]
    assert len(orders) == 720  # every order occurs; 16.7 times each on average
    assert orders.max() < 16.7 + 6 * 4.1


def test_neighbours_do_not_stay_neighbours():
    image = order.permute(np.arange(100_000), 100_000, np.uint64(9)).astype(np.float64)
    assert abs(np.corrcoef(image[:-1], image[1:])[0, 1]) < 0.015
    assert abs(np.corrcoef(image, np.arange(100_000))[0, 1]) < 0.015


@pytest.mark.parametrize("batch_size", [1, 7, 16, 250])
def test_each_epoch_has_each_sample_once(batch_size):
    n = 103  # no multiple of the batch sizes, and less than the last
    stream = _stream((n,), 4, -(-5 * n // batch_size), batch_size)
    for epoch in range(5):
        np.testing.assert_array_equal(np.sort(stream[epoch * n : epoch * n + n]), np.arange(n))


def test_epochs_and_seeds_have_different_orders():
    orders = [_stream((50,), seed, 3, 50).reshape(3, 50) for seed in (0, 1, 2**40, -1)]
    assert len({tuple(row) for row in np.concatenate(orders)}) == 12


def test_the_order_never_changes_between_versions():
    """A run resumes only if these stay; a new order needs a new schema version."""
    bucket, ids = batch_ids((1000,), 17, 123, 8)
    assert (bucket, ids.tolist()) == GOLDEN_SINGLE
    bucket, ids = batch_ids(BUCKETS, 17, 5000, 8)
    assert (bucket, ids.tolist()) == GOLDEN_BUCKETS
    assert order.caption_draws(17, 5, np.arange(3)).tolist() == GOLDEN_DRAWS


def test_batch_sizes_cut_the_same_stream():
    streams = [_stream((77,), 8, 480 // size, size) for size in (1, 3, 16, 480)]
    for stream in streams[1:]:
        np.testing.assert_array_equal(stream, streams[0])


@pytest.mark.parametrize("counts", [(77,), BUCKETS])
def test_a_changed_batch_size_goes_on_at_the_next_sample(counts):
    earlier = ((10, 4), (25, 6))
    bucket_streams = {b: [] for b in range(len(counts))}
    for step in range(60):
        size = 4 if step < 10 else 6 if step < 25 else 16
        changes = [change for change in earlier if step >= change[0]]
        bucket, ids = batch_ids(counts, 8, step, size, changes)
        bucket_streams[bucket] += ids.tolist()
        # The same with the whole history, once the last change is past.
        if step >= 25:
            np.testing.assert_array_equal(batch_ids(counts, 8, step, 16, earlier)[1], ids)
    for bucket, n in enumerate(counts):
        stream = bucket_streams[bucket]
        for start in range(0, len(stream) - n + 1, n or 1):
            assert sorted(stream[start : start + n]) == list(range(n))


def test_buckets_come_in_proportion_to_their_samples():
    slots = period_slots(BUCKETS)
    assert slots.sum() == PERIOD
    assert slots[1] == 0 and slots[4] >= 1
    np.testing.assert_allclose(slots, PERIOD * np.array(BUCKETS) / sum(BUCKETS), atol=1)
    for period in (0, 3):
        steps = range(period * PERIOD, (period + 1) * PERIOD)
        seen = np.bincount([bucket_of_step(BUCKETS, 6, step) for step in steps], minlength=5)
        np.testing.assert_array_equal(seen, slots)


def test_a_rare_bucket_has_a_step_and_the_common_one_gives_it():
    assert period_slots((10**9, 1, 1, 0)).tolist() == [PERIOD - 2, 1, 1, 0]


def test_bucket_schedules_are_shuffled_and_differ_between_periods():
    first, second = (
        [bucket_of_step(BUCKETS, 6, period * PERIOD + s) for s in range(64)] for period in (0, 1)
    )
    assert first != second and len(set(first)) > 1 and first != sorted(first)


@pytest.fixture
def short_period(monkeypatch):
    monkeypatch.setattr(order, "PERIOD", 64)
    order._period.cache_clear()
    yield
    order._period.cache_clear()


def test_every_bucket_continues_its_own_stream(short_period):
    steps, batch = 5 * 64 + 30, 25
    streams = {b: [] for b in range(len(BUCKETS))}
    for step in range(steps):
        bucket, ids = batch_ids(BUCKETS, 3, step, batch)
        streams[bucket] += ids.tolist()
    for bucket, n in enumerate(BUCKETS):
        stream = streams[bucket]
        assert bool(stream) == bool(n)
        for start in range(0, len(stream) - n + 1, n or 1):
            assert sorted(stream[start : start + n]) == list(range(n))


def test_a_late_step_is_as_quick_as_the_first():
    start = time.perf_counter()
    batch_ids((10**9, 10**8, 5), 0, 10**9 + 7, 4096)
    assert time.perf_counter() - start < 1


@pytest.mark.parametrize("counts, step, batch", [((0, 0), 0, 4), ((9,), -1, 4), ((9,), 0, 0)])
def test_impossible_batches_are_refused(counts, step, batch):
    with pytest.raises(ValueError, match="records|no samples"):
        batch_ids(counts, 0, step, batch)


def _choices(kinds, mix, steps=400, rows=25):
    draws = np.concatenate([order.caption_draws(1, step, np.arange(rows)) for step in range(steps)])
    chosen = [order.choose_caption(kinds, mix, draw) for draw in draws]
    return np.bincount(chosen, minlength=len(kinds)) / len(chosen)


HALF = {"original": 0.5, "synthetic": 0.5}


@pytest.mark.parametrize(
    "kinds, mix, shares",
    [
        (["original", "synthetic"], HALF, [0.5, 0.5]),
        (["original", "synthetic", "synthetic"], HALF, [0.5, 0.25, 0.25]),
        (["synthetic", "original"], {"original": 1.0, "synthetic": 3.0}, [0.75, 0.25]),
        (["original", "synthetic"], {"synthetic": 1.0}, [0, 1]),
        (["original", "original"], HALF, [0.5, 0.5]),
        (["original"], {"original": 0.0, "synthetic": 1.0}, [1]),
        (["original", "alt"], {"synthetic": 1.0}, [0.5, 0.5]),
    ],
)
def test_captions_are_drawn_by_the_mix(kinds, mix, shares):
    # 10,000 draws: standard deviation at most 0.005.
    np.testing.assert_allclose(_choices(kinds, mix), shares, atol=0.02 * (max(shares) < 1))


def test_caption_draws_belong_to_seed_step_and_row():
    whole = order.caption_draws(1, 7, np.arange(16))
    np.testing.assert_array_equal(order.caption_draws(1, 7, np.array([12, 3])), whole[[12, 3]])
    others = [order.caption_draws(s, t, np.arange(16)) for s, t in ((2, 7), (1, 8))]
    for a, b in itertools.combinations([whole, *others], 2):
        assert not np.any(a == b)
    assert not np.any(whole[:, 0] == whole[:, 1])
    assert whole.min() >= 0 and whole.max() < 1
