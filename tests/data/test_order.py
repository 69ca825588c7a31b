"""Which sample comes when: every epoch is complete, every step can be asked for alone."""

import itertools
import time

import numpy as np
import pytest

from mmdit_jax.data import order
from mmdit_jax.data.order import (
    batch_ids,
    batch_number,
    bucket_of_step,
    samples_before,
    skipped_before,
    substitute,
)

BUCKETS = (700, 0, 211, 89, 1)
SIZES = (8, 1, 12, 20, 4)  # of a batch of each bucket

# Integer arithmetic, so the same on every machine.
GOLDEN_SINGLE = (0, [765, 290, 99, 570, 999, 846, 453, 226])
GOLDEN_BUCKETS = (3, [63, 48, 75, 24, 9, 21, 51, 43])
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


@pytest.mark.parametrize(
    "skips",
    [
        (),
        ((0, 1),),
        ((3, 5), (9, 20)),
        ((9, 20), (3, 5)),
        ((3, 5), (5, 6), (8, 9)),
        ((3, 10), (5, 7)),
        ((3, 10), (5, 14), (14, 14), (13, 15)),
    ],
)
@pytest.mark.parametrize("origin", [0, 7])
def test_steps_take_every_batch_but_the_skipped_ones(skips, origin):
    left_out = {number for first, stop in skips for number in range(first, stop)}
    expected = [number for number in range(40) if number not in left_out]
    steps = range(origin, origin + len(expected))
    assert [batch_number(step, skips, origin) for step in steps] == expected
    for step, number in zip(steps, expected, strict=True):
        passed = [
            n for first, stop in skipped_before(step, skips, origin) for n in range(first, stop)
        ]
        assert passed == sorted(n for n in left_out if n < number)


def test_a_step_before_the_data_set_has_no_batch():
    assert batch_number(6, ((0, 4),), 7) == -1
    with pytest.raises(ValueError, match="steps start at 0"):
        batch_ids((9,), 0, batch_number(6, (), 7), 4)


@pytest.mark.parametrize("n", [1, 2, 7, 1000])
def test_substitutes_are_different_samples_that_follow_from_the_seed_and_the_sample(n):
    tried = [substitute(n, 3, 5, attempt) for attempt in range(min(n, 16))]
    assert len(set(tried)) == len(tried) and min(tried) >= 0 and max(tried) < n
    assert tried == [substitute(n, 3, 5, attempt) for attempt in range(min(n, 16))]
    if n == 1000:
        for other in ((4, 5), (3, 6)):
            assert tried != [substitute(n, *other, attempt) for attempt in range(16)]
    # Not a fixed neighbour: all samples stand in for others equally often.
    counts = np.bincount([substitute(7, 3, number, 0) for number in range(700)], minlength=7)
    assert counts.min() > 60


def _steps(counts, seed, steps, sizes):
    return [bucket_of_step(counts, seed, step, sizes) for step in range(steps)]


@pytest.mark.parametrize("sizes", [16, SIZES])
def test_every_bucket_is_within_one_batch_of_its_share_at_every_step(sizes):
    counts, sizes_ = np.array(BUCKETS), np.broadcast_to(sizes, 5)
    taken = np.zeros(5)
    for step, bucket in enumerate(_steps(BUCKETS, 6, 2000, sizes)):
        np.testing.assert_array_equal(samples_before(BUCKETS, 6, step, sizes), taken)
        taken[bucket] += sizes_[bucket]
        # An epoch is a time at which all would be on their share: there is one for this step.
        low = np.max((taken - sizes_)[counts > 0] / counts[counts > 0])
        high = np.min((taken + sizes_)[counts > 0] / counts[counts > 0])
        assert low <= high and taken[1] == 0
    assert taken[0] / 700 > 10 and taken[4] > 0


def test_all_buckets_end_an_epoch_together_and_no_sample_is_left_out():
    """In 10 epochs each sample comes 10 times, but for the last batch of its bucket."""
    steps = round(10 * sum(n / size for n, size in zip(BUCKETS, SIZES, strict=True)))
    seen = [np.zeros(n, int) for n in BUCKETS]
    for step in range(steps):
        bucket, ids = batch_ids(BUCKETS, 3, step, SIZES)
        assert len(ids) == SIZES[bucket]
        np.add.at(seen[bucket], ids, 1)
    for number, count in enumerate(seen):
        if len(count):
            assert abs(count.sum() - 10 * len(count)) <= 2 * SIZES[number]
            assert count.max() - count.min() <= max(1, SIZES[number] / len(count))


def test_a_bucket_smaller_than_its_batch_comes_more_rarely():
    counts = (10_000, 2)
    steps = 40 * 10_000 // 100
    rare = _steps(counts, 0, steps, (100, 16)).count(1)
    assert 4 <= rare <= 6  # 40 epochs x 2 samples / 16


def test_the_interleaving_is_shuffled_and_belongs_to_the_seed():
    counts = (600, 400)
    first, other = (_steps(counts, seed, 200, 10) for seed in (6, 7))
    assert first != other and first != sorted(first)
    lengths = [len(list(group)) for _, group in itertools.groupby(first)]
    assert len(set(lengths)) > 2  # no fixed rhythm
    assert first[:100] != first[100:]  # nor one that the next epoch repeats


def test_every_bucket_continues_its_own_stream():
    streams = {b: [] for b in range(len(BUCKETS))}
    for step in range(350):
        bucket, ids = batch_ids(BUCKETS, 3, step, 25)
        streams[bucket] += ids.tolist()
    for bucket, n in enumerate(BUCKETS):
        stream = streams[bucket]
        assert bool(stream) == (n > 1)  # a single sample comes every 25 epochs
        for start in range(0, len(stream) - n + 1, n or 1):
            assert sorted(stream[start : start + n]) == list(range(n))


def test_a_step_asked_for_alone_is_the_step_of_the_whole_schedule():
    """Found in a window of candidates, or by sorting all batches of all buckets."""
    rng = np.random.default_rng(0)
    for _ in range(20):
        counts = tuple(int(n) for n in rng.integers(0, 3000, 12)) + (1,)
        sizes = rng.integers(1, 64, 13)
        placed = []
        for bucket, n in enumerate(counts):
            batch = np.arange(-(-4 * n // sizes[bucket]) + 2) if n else np.zeros(0, int)
            key = order._key(5, order._BUCKETS, bucket, 0)
            times = (batch + order._unit(order._hash(key, batch))) / (n / sizes[bucket] or 1)
            placed += [(time, bucket) for time in times]
        whole = [bucket for time, bucket in sorted(placed) if time < 4]
        for step in rng.integers(0, len(whole), 40):
            assert bucket_of_step(counts, 5, step, sizes) == whole[step]
            before = np.bincount(whole[:step], minlength=13) * sizes
            np.testing.assert_array_equal(samples_before(counts, 5, step, sizes), before)


def test_a_late_step_is_as_quick_as_the_first():
    start = time.perf_counter()
    for step in (0, 10**6, 10**9 + 7):
        batch_ids((10**9, 10**8, 5, *range(10**6, 10**6 + 40)), 0, step, 4096)
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
