"""Which sample is read at which step: pure functions, nothing is stored and nothing is counted up.

The samples of a bucket form an endless stream. Position p of the stream lies in epoch p // n, and
an epoch is a permutation of the n samples of the bucket under a key made of (seed, bucket, epoch).
The permutation is a keyed bijection that is computed position by position (Black and Rogaway,
"Ciphers with arbitrary finite domains", 2002: a generalised Feistel network on the mixed radix a*b
>= n, walked until it lands below n), so a billion samples take no memory and any step can be asked
for at once.

With several buckets, the stream of each is cut into batches, and batch k of a bucket of n samples
and batch size B is put at the time (k + u) B / n, counted in epochs, where u in [0, 1) is a hash of
(seed, bucket, k). Steps follow in the order of these times. So at any step every bucket is less
than one batch ahead of its share or behind it, all buckets end an epoch together within one batch,
no sample is left out (the last few of an epoch share a batch with the first of the next), and a
bucket smaller than its batch comes that much more rarely instead of too often. Only the few batches
whose times may be near are looked at, so any step can be asked for here as well.
"""

import bisect
import itertools
import math
from collections.abc import Mapping, Sequence

import numpy as np

# With 8 rounds the orders of a handful of samples are not equally likely; with 16 they are.
_ROUNDS = 16
# Purposes, so that no two uses of a seed share a key.
_SAMPLES, _BUCKETS, _CAPTION_KIND, _CAPTION, _SUBSTITUTE = range(5)
_MASK = (1 << 64) - 1


def batch_number(step: int, skips: Sequence[tuple[int, int]] = (), origin: int = 0) -> int:
    """The batch of the stream that a step takes: what all other functions here call its step.

    Args:
      step: Step of the run.
      skips: ((a, b), ...): the batches with the numbers a to b - 1 are left out.
      origin: Step that takes the first batch, when the run had another data set before.

    Returns:
      The number, from 0; negative for a step before `origin`.
    """
    left_out = sum(stop - first for first, stop in skipped_before(step, skips, origin))
    return step - origin + left_out


def skipped_before(
    step: int, skips: Sequence[tuple[int, int]], origin: int = 0
) -> list[tuple[int, int]]:
    """The batches that are left out before the one of `step`: rising ranges without overlap.

    Args: as of `batch_number`; ranges of `skips` may overlap and come in any order.
    """
    number, end, passed = step - origin, 0, []
    for first, stop in sorted(skips):
        first = max(first, end)
        if first < stop and first <= number:
            passed.append((first, stop))
            number, end = number + stop - first, stop
    return passed


def substitute(n: int, seed: int, number: int, attempt: int) -> int:
    """The sample that stands in for a damaged one.

    Args:
      n: Samples of the bucket.
      seed: Seed of the run.
      number: Of the damaged sample within its split.
      attempt: Below n; a substitute may be damaged itself. Every attempt gives another one.

    Returns:
      Number within the bucket; one attempt of n may give the damaged sample.
    """
    return int(permute(np.array([attempt]), n, _key(seed, _SUBSTITUTE, number))[0])


def batch_ids(
    counts: Sequence[int],
    seed: int,
    step: int,
    batch_size: int | Sequence[int],
    earlier: Sequence[tuple[int, int | Sequence[int]]] = (),
) -> tuple[int, np.ndarray]:
    """The samples of one global batch.

    Args:
      counts: Samples per bucket; a bucket may have none.
      seed: Seed of the run.
      step: Step, from 0.
      batch_size: Samples in a global batch, one number or one per bucket.
      earlier: ((until_step, batch_size), ...) in rising order, when the run had other batch sizes
        before: steps below `until_step` took batches of that size. The stream then goes on at the
        next sample.

    Returns:
      (bucket, ids): the index of the bucket and int64 (batch size of the bucket,) numbers of
      samples within it.

    Raises:
      ValueError: There are no samples, or step or batch_size are out of range.
    """
    bucket, size, taken = _locate(counts, seed, step, batch_size, earlier)
    positions = taken[bucket] + np.arange(size, dtype=np.int64)
    epochs, positions = np.divmod(positions, int(counts[bucket]))
    keys = _hash(_key(seed, _SAMPLES, bucket), epochs)
    return bucket, permute(positions, int(counts[bucket]), keys)


def bucket_of_step(
    counts: Sequence[int],
    seed: int,
    step: int,
    batch_size: int | Sequence[int],
    earlier: Sequence[tuple[int, int | Sequence[int]]] = (),
) -> int:
    """The bucket that every sample of step `step` comes from; see `batch_ids`."""
    return _locate(counts, seed, step, batch_size, earlier)[0]


def samples_before(
    counts: Sequence[int],
    seed: int,
    step: int,
    batch_size: int | Sequence[int],
    earlier: Sequence[tuple[int, int | Sequence[int]]] = (),
) -> np.ndarray:
    """Samples that the steps below `step` took of each bucket, int64; see `batch_ids`."""
    return _locate(counts, seed, step, batch_size, earlier)[2]


def _locate(
    counts: Sequence[int],
    seed: int,
    step: int,
    batch_size: int | Sequence[int],
    earlier: Sequence[tuple[int, int | Sequence[int]]],
) -> tuple[int, int, np.ndarray]:
    """The bucket of a step, its batch size, and the samples taken of each bucket before."""
    counts_ = np.asarray(counts, np.int64)
    sizes = np.broadcast_to(np.asarray(batch_size, np.int64), counts_.shape)
    if step < 0 or sizes.min() < 1:
        raise ValueError(
            f"step {step} with batch size {batch_size} has no samples, steps start at 0 and a "
            "batch has at least 1: give other values"
        )
    if not counts_.any():
        raise ValueError("the split has 0 records, a batch needs some: rebuild the data set")
    taken, since = np.zeros_like(counts_), 0
    for until, other in earlier:
        until, other = min(until, step), np.asarray(other, np.int64)
        taken += other * _place(counts_, other, seed, since, until)[1]
        since = until
    bucket, batches = _place(counts_, sizes, seed, since, step)
    return bucket, int(sizes[bucket]), taken + sizes * batches


def _place(
    counts: np.ndarray, sizes: np.ndarray, seed: int, since: int, step: int
) -> tuple[int, np.ndarray]:
    """The bucket of a step, and how many of the steps since..step-1 belonged to each bucket."""
    number = step - since  # of the step in the merged row of batches
    filled = np.flatnonzero(counts)
    batches = np.zeros_like(counts)
    if len(filled) == 1:
        batches[filled] = number
        return int(filled[0]), batches
    pace = (counts / sizes)[filled]  # batches an epoch
    # Before any time T, a bucket has less than one batch more or less than T x pace. So the step
    # sought lies where the sum over buckets allows it; one batch more each side covers rounding.
    low, high = ((number + slack) / pace.sum() * pace for slack in (-len(filled), len(filled)))
    low = np.maximum(np.floor(low).astype(np.int64) - 1, 0)
    high = np.maximum(np.ceil(high).astype(np.int64), 0) + 2
    rows = np.repeat(np.arange(len(filled)), high - low)
    batch = np.concatenate([np.arange(*bounds) for bounds in zip(low, high, strict=True)])
    keys = np.array([_key(seed, _BUCKETS, int(bucket), since) for bucket in filled])
    # IEEE additions and divisions alone: the same on every machine, and never falling with k.
    times = (batch + _unit(_hash(keys[rows], batch))) / pace[rows]
    merged = rows[np.lexsort((rows, times))]
    number -= int(low.sum())
    batches[filled] = low + np.bincount(merged[:number], minlength=len(filled))
    return int(filled[merged[number]]), batches


def caption_draws(seed: int, step: int, rows: np.ndarray) -> np.ndarray:
    """What `choose_caption` decides by: float64 (len(rows), 2) in [0, 1).

    Args:
      seed: Seed of the run.
      step: Step.
      rows: int64 rows in the global batch, so that the choice does not depend on hosts.
    """
    draws = [_hash(_key(seed, use, step), rows) for use in (_CAPTION_KIND, _CAPTION)]
    return _unit(np.stack(draws, axis=-1))


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


def _unit(hashes: np.ndarray) -> np.ndarray:
    """uint64 as float64 in [0, 1)."""
    # 53 bits are what a float64 below 1 can hold.
    return hashes.astype(np.uint64) // np.uint64(1 << 11) / 2.0**53


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
