"""Which sample is read at which step: pure functions, nothing is stored and nothing is counted up.

The samples of a bucket form an endless stream. Position p of the stream lies in epoch p // n, and
an epoch is a permutation of the n samples of the bucket under a key made of (seed, bucket, epoch).
The permutation is a keyed bijection that is computed position by position (Black and Rogaway,
"Ciphers with arbitrary finite domains", 2002: a generalised Feistel network on the mixed radix a*b
>= n, walked until it lands below n), so a billion samples take no memory and any step can be asked
for at once.

With several buckets, steps come in periods of `PERIOD`. In each period every bucket has a fixed
number of steps, in proportion to its samples, shuffled under a key made of (seed, period). So the
number of earlier steps of a bucket is a sum over whole periods and one partial period, and each
bucket continues its own stream.
"""

import bisect
import functools
import itertools
import math
from collections.abc import Mapping, Sequence

import numpy as np

PERIOD = 4096
# With 8 rounds the orders of a handful of samples are not equally likely; with 16 they are.
_ROUNDS = 16
# Purposes, so that no two uses of a seed share a key.
_SAMPLES, _BUCKETS, _CAPTION_KIND, _CAPTION = range(4)
_MASK = (1 << 64) - 1


def batch_ids(
    counts: Sequence[int],
    seed: int,
    step: int,
    batch_size: int,
    earlier: Sequence[tuple[int, int]] = (),
) -> tuple[int, np.ndarray]:
    """The samples of one global batch.

    Args:
      counts: Samples per bucket; a bucket may have none.
      seed: Seed of the run.
      step: Step, from 0.
      batch_size: Samples in a global batch.
      earlier: ((until_step, batch_size), ...) in rising order, when the run had other batch sizes
        before: steps below `until_step` took batches of that size. The stream then goes on at the
        next sample.

    Returns:
      (bucket, ids): the index of the bucket and int64 (batch_size,) numbers of samples within it.

    Raises:
      ValueError: There are no samples, or step or batch_size are out of range.
    """
    if step < 0 or batch_size < 1:
        raise ValueError(
            f"step {step} with batch size {batch_size} has no samples, steps start at 0 and a "
            "batch has at least 1: give other values"
        )
    counts = tuple(int(n) for n in counts)
    bucket = bucket_of_step(counts, seed, step)
    first, since = 0, 0
    for until, size in earlier:
        until = min(until, step)
        first += size * _bucket_steps(counts, seed, bucket, since, until)
        since = until
    first += batch_size * _bucket_steps(counts, seed, bucket, since, step)
    positions = first + np.arange(batch_size, dtype=np.int64)
    epochs, positions = np.divmod(positions, counts[bucket])
    keys = _hash(_key(seed, _SAMPLES, bucket), epochs)
    return bucket, permute(positions, counts[bucket], keys)


def bucket_of_step(counts: Sequence[int], seed: int, step: int) -> int:
    """The bucket that every sample of step `step` comes from."""
    filled = [bucket for bucket, n in enumerate(counts) if n]
    if not filled:
        raise ValueError("the split has 0 records, a batch needs some: rebuild the data set")
    if len(filled) == 1:
        return filled[0]
    return int(_period(tuple(counts), seed, step // PERIOD)[step % PERIOD])


def period_slots(counts: Sequence[int]) -> np.ndarray:
    """Steps of each bucket in a period, int64.

    By largest remainder, with at least one for a bucket that has samples.
    """
    counts_ = np.asarray(counts, np.int64)
    if np.sum(counts_ > 0) > PERIOD:
        raise ValueError(
            f"{np.sum(counts_ > 0)} buckets have samples, at most {PERIOD} can: use fewer buckets"
        )
    quota = PERIOD * (counts_ / counts_.sum())
    slots = np.maximum(np.floor(quota).astype(np.int64), counts_ > 0)
    while slots.sum() < PERIOD:
        slots[np.argmax(quota - slots)] += 1
    while slots.sum() > PERIOD:
        slots[np.argmin(np.where(slots > 1, quota - slots, np.inf))] -= 1
    return slots


def _bucket_steps(counts: tuple[int, ...], seed: int, bucket: int, start: int, stop: int) -> int:
    """How many of the steps start..stop-1 belong to `bucket`."""
    if sum(n > 0 for n in counts) == 1:
        return stop - start

    def before(step: int) -> int:
        period, offset = divmod(step, PERIOD)
        part = _period(counts, seed, period)[:offset]
        return period * int(period_slots(counts)[bucket]) + int(np.sum(part == bucket))

    return before(stop) - before(start)


@functools.lru_cache(maxsize=16)
def _period(counts: tuple[int, ...], seed: int, period: int) -> np.ndarray:
    """The bucket of each step of a period, (PERIOD,)."""
    slots = np.repeat(np.arange(len(counts)), period_slots(counts))
    key = _hash(_key(seed, _BUCKETS), np.int64(period))
    return slots[permute(np.arange(PERIOD, dtype=np.int64), PERIOD, key)]


def caption_draws(seed: int, step: int, rows: np.ndarray) -> np.ndarray:
    """What `choose_caption` decides by: float64 (len(rows), 2) in [0, 1).

    Args:
      seed: Seed of the run.
      step: Step.
      rows: int64 rows in the global batch, so that the choice does not depend on hosts.
    """
    draws = [_hash(_key(seed, use, step), rows) for use in (_CAPTION_KIND, _CAPTION)]
    # 53 bits are what a float64 below 1 can hold.
    return np.stack(draws, axis=-1).astype(np.uint64) // np.uint64(1 << 11) / 2.0**53


def choose_caption(kinds: Sequence[str], mix: Mapping[str, float], draw: np.ndarray) -> int:
    """The caption that a sample is trained with.

    Args:
      kinds: Kind of each caption of the sample.
      mix: Kind -> weight. Weights are renormalised over the kinds that the sample has; when these
        have no weight at all, its kinds are equally likely.
      draw: Two numbers in [0, 1): one decides the kind, one the caption of this kind.

    Returns:
      Index into `kinds`: a kind by weight, then any caption of this kind with equal probability.
    """
    present = sorted(set(kinds))
    weights = [mix.get(kind, 0.0) for kind in present]
    if not sum(weights):
        weights = [1.0] * len(present)
    bounds = list(itertools.accumulate(weights))
    kind = present[bisect.bisect_right(bounds[:-1], draw[0] * bounds[-1])]
    choices = [index for index, other in enumerate(kinds) if other == kind]
    return choices[int(draw[1] * len(choices))]


def permute(index: np.ndarray, n: int, key: np.ndarray) -> np.ndarray:
    """A keyed bijection of 0..n-1.

    Args:
      index: int64 array of numbers in [0, n).
      n: Size of the domain.
      key: uint64, one for all of `index` or one for each.

    Returns:
      int64 array of the shape of `index`.
    """
    a = np.uint64(math.isqrt(n - 1) + 1)  # the root of n, rounded up
    b = np.uint64(-(-n // int(a)))
    key = np.broadcast_to(key, index.shape)
    out = index.astype(np.uint64)
    walking = np.ones(out.shape, bool)
    while walking.any():
        left, right, keys = out[walking] // b, out[walking] % b, key[walking]
        for number in range(0, _ROUNDS, 2):
            left = (left + _hash(keys + np.uint64(number), right) % a) % a
            right = (right + _hash(keys + np.uint64(number + 1), left) % b) % b
        out[walking] = left * b + right
        # The domain a*b is a little larger than n: walk on along the cycle until the image is below
        # n.
        walking = out >= n
    return out.astype(np.int64)


def _key(*numbers: int) -> np.uint64:
    """One 64-bit key from a few integers."""
    key = np.uint64(0)
    for number in numbers:
        key = _hash(key, np.uint64(number & _MASK))
    return key


def _hash(key: np.ndarray, value: np.ndarray) -> np.ndarray:
    """splitmix64's finaliser (Steele, Lea, Flood 2014) of the value under the key, uint64."""
    with np.errstate(over="ignore"):
        x = np.asarray(value).astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15) + key
        for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
            x = (x ^ (x >> np.uint64(shift))) * np.uint64(factor)
        return x ^ (x >> np.uint64(31))
