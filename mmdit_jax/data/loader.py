"""From shards to global batches: grain threads read ahead, every host reads only its own rows.

A batch is `{"latent": (B, H, W, C), "text": {name: {"sequence": (B, T, width), "pooled": (B,
V)}}}`, with one caption per sample, in the dtypes of the shards; text of 8 bits also has its
"scale" (B, T), and trimmed text the "length" (B,) up to which its sequence is filled. Scaling,
padding and joining of text happen on the device. All samples of a batch are of one bucket, so B, H
and W may differ between batches.
"""

import copy
import itertools
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grain
import jax
import numpy as np

from mmdit_jax.data import order
from mmdit_jax.data.manifest import Bucket, Manifest, fits
from mmdit_jax.data.records import ShardReader, decode_record

# A run ends by its step count; grain wants a length.
_STEPS = 1 << 62
_OF_TOKENS = ("/sequence", "/scale")


class Loader:
    """Batches of one split as a pure function of (seed, step, manifest, batch sizes).

    Attributes:
      manifest: The data set's Manifest.
      batch_sizes: Global batch size of each bucket.
      counts: Records per bucket in this split.
      records: Records in this split.
    """

    def __init__(
        self,
        directory: str | os.PathLike,
        *,
        split: str = "train",
        batch_size: int | Callable[[Bucket], int],
        seed: int,
        process_index: int | None = None,
        process_count: int | None = None,
        threads: int = 4,
        prefetch: int = 4,
        open_shards: int = 512,
        expected: Mapping[str, Any] | None = None,
        earlier: Sequence[tuple[int, int | Sequence[int]]] = (),
    ):
        """Opens the manifest; shards are opened when they are first read.

        Args:
          directory: The data set's directory.
          split: "train" or "validation".
          batch_size: Global batch size, the same for every bucket, or a function of the bucket that
            is asked about those with samples in this split.
          seed: Seed of the run.
          process_index: This host among `process_count`; jax.process_index() when None.
          process_count: Hosts that share each batch; jax.process_count() when None.
          threads: Batches that are read at the same time.
          prefetch: Batches that are read ahead (each one is in host memory).
          open_shards: Shards that may be open at the same time.
          expected: What the config expects of the manifest, for `fits`; then only the text encoders
            named in it are read.
          earlier: ((until_step, batch_size), ...) when the run had other batch sizes, see
            `order.batch_ids`.

        Raises:
          FileNotFoundError: No data set there.
          ValueError: The data set is damaged, does not fit, has no such split, or the batch size
            cannot be divided by the hosts.
        """
        self.manifest = Manifest.load(directory)
        if expected is not None:
            fits(self.manifest, expected)
        self._shards = shards = self.manifest.splits.get(split, ())
        if not sum(shard.records for shard in shards):
            raise ValueError(
                f"split {split!r} has 0 records in {directory}, its splits are "
                f"{', '.join(self.manifest.splits)}: choose one of them or rebuild the data set"
            )
        self._hosts = jax.process_count() if process_count is None else process_count
        self._host = jax.process_index() if process_index is None else process_index
        self._seed, self._earlier = seed, tuple(earlier)
        self._threads, self._prefetch = threads, prefetch
        self._encoders = tuple((expected or {}).get("text_encoders", self.manifest.text_encoders))
        self._trimmed = self.manifest.text_storage == "trimmed"
        self._parts = [
            "sequence",
            *(["length"] if self._trimmed else []),
            *(["scale"] if self.manifest.text_precision != "float16" else []),
        ]

        # Samples of a split are numbered through its shards in the manifest's order. The samples of
        # a bucket are numbered through its own shards; `_split_ids` leads from the latter to the
        # former.
        records = np.array([shard.records for shard in shards], np.int64)
        buckets = np.array([shard.bucket for shard in shards], np.int64)
        self._shard_ends = np.cumsum(records)
        self._bucket_shards = [
            np.flatnonzero(buckets == b) for b in range(len(self.manifest.buckets))
        ]
        self._bucket_ends = [np.cumsum(records[numbers]) for numbers in self._bucket_shards]
        self.counts = tuple(int(ends[-1]) if len(ends) else 0 for ends in self._bucket_ends)
        self.records = sum(self.counts)
        self._reader = ShardReader(directory, shards, open_shards)

        ask = batch_size if callable(batch_size) else lambda _: batch_size
        pairs = zip(self.counts, self.manifest.buckets, strict=True)
        self.batch_sizes = tuple(ask(bucket) if n else self._hosts for n, bucket in pairs)
        for size in self.batch_sizes:
            if size % self._hosts:
                raise ValueError(
                    f"batch size {size} is not a multiple of {self._hosts} hosts, each reads an "
                    "equal part: change batch_size"
                )

    def sample_ids(self, step: int) -> np.ndarray:
        """int64 (B,) numbers within the split of the samples in the global batch of `step`."""
        bucket, ids = order.batch_ids(
            self.counts, self._seed, step, self.batch_sizes, self._earlier
        )
        return self._split_ids(bucket, ids)

    def bucket_of_step(self, step: int) -> int:
        """Index of the bucket that all samples of the batch of `step` come from."""
        return order.bucket_of_step(self.counts, self._seed, step, self.batch_sizes, self._earlier)

    def samples_before(self, step: int) -> np.ndarray:
        """int64 samples of each bucket in the batches below `step`."""
        return order.samples_before(self.counts, self._seed, step, self.batch_sizes, self._earlier)

    def batch_number(self, step):
        return step

    def following(self, *, earlier, skips, origin):
        other = copy.copy(self)
        other._earlier = tuple(earlier)
        return other

    def filled_buckets(self) -> list[int]:
        """Indices of the buckets that have samples in this split."""
        return [bucket for bucket, count in enumerate(self.counts) if count]

    def abstract_batch(self, bucket: int) -> dict[str, Any]:
        """Shapes and dtypes of a global batch of a bucket, taken from its first sample."""
        example = self.examples(self._split_ids(bucket, np.zeros(1, np.int64)))
        size = self.batch_sizes[bucket]
        return jax.tree.map(lambda x: jax.ShapeDtypeStruct((size, *x.shape[1:]), x.dtype), example)

    def bucket_ids(self, bucket: int) -> np.ndarray:
        """int64 numbers within the split of all samples of a bucket, in stored order."""
        return self._split_ids(bucket, np.arange(self.counts[bucket], dtype=np.int64))

    def batches(
        self, start_step: int = 0, sharding: jax.sharding.Sharding | None = None
    ) -> Iterator[dict[str, Any]]:
        """The batches of start_step, start_step + 1, ... without end.

        Args:
          start_step: First step.
          sharding: How the leading axis of a global array lies on the devices.

        Returns:
          With a sharding, batches of global jax.Arrays, one batch ahead on the devices; a host
          reads the rows that its devices hold. Without one, batches of numpy arrays, the rows
          h * B / H to (h + 1) * B / H of host h of H. Reading starts with this call.
        """
        if sharding is None:
            parts = [size // self._hosts for size in self.batch_sizes]
            rows = [np.arange(part) + self._host * part for part in parts]
        else:
            rows = [_rows_of(sharding, size) for size in self.batch_sizes]
        dataset = grain.MapDataset.source(_HostBatches(self, rows))[start_step:]
        options = grain.ReadOptions(num_threads=self._threads, prefetch_buffer_size=self._prefetch)
        iterator = iter(dataset.to_iter_dataset(options))
        iterator.start_prefetch()
        if sharding is None:
            return iterator
        return _on_device(iterator, self, rows, sharding, start_step)

    def host_batch(self, step: int, rows: np.ndarray) -> dict[str, Any]:
        """Rows `rows` (int64, of the global batch) of the batch of `step`, as numpy arrays."""
        draws = order.caption_draws(self._seed, step, rows)
        mix = self.manifest.caption_mix
        return self._assemble(
            self.sample_ids(step)[rows],
            lambda place, kinds: order.choose_caption(kinds, mix, draws[place]),
        )

    def examples(self, ids: Sequence[int] | np.ndarray, caption: int = 0) -> dict[str, Any]:
        """A batch of chosen samples of one bucket, for validation.

        Args:
          ids: Numbers within the split.
          caption: Caption of each sample; the last one when a sample has fewer.

        Returns:
          A batch of numpy arrays.
        """
        ids = np.asarray(ids, np.int64)
        buckets = {self._shards[self._place(number)[0]].bucket for number in ids}
        if len(buckets) != 1:
            raise ValueError(
                f"{len(ids)} samples are in the buckets {sorted(buckets)}, a batch has samples of "
                "one: take ids of one bucket"
            )
        return self._assemble(ids, lambda _, kinds: min(caption, len(kinds) - 1))

    def record(self, number: int) -> dict[str, Any]:
        """Every field of sample `number` of the split."""
        shard, index = self._place(number)
        return decode_record(self._reader.read(shard, index), self._reader.where(shard, index))

    def where(self, number: int) -> str:
        """File and index of sample `number` of the split, for a message."""
        return self._reader.where(*self._place(number))

    def _place(self, number: int) -> tuple[int, int]:
        if not 0 <= number < self.records:
            raise ValueError(
                f"sample {number} does not exist, the split has 0 to {self.records - 1}: "
                "choose another"
            )
        shard = int(np.searchsorted(self._shard_ends, number, side="right"))
        return shard, int(number - (self._shard_ends[shard - 1] if shard else 0))

    def _split_ids(self, bucket: int, ids: np.ndarray) -> np.ndarray:
        ends, shards = self._bucket_ends[bucket], self._bucket_shards[bucket]
        place = np.searchsorted(ends, ids, side="right")
        # Counted from the end of its shard, a sample is equally far in both numberings.
        return self._shard_ends[shards[place]] - (ends[place] - ids)

    def _assemble(self, ids: np.ndarray, choose: Callable[[int, list[str]], int]) -> dict[str, Any]:
        """Reads samples one by one and copies the chosen caption of each into new arrays.

        One by one, because a record of 1 MB is then still in the processor's cache when it is
        copied. New arrays, because JAX may alias the memory that it is given (it does on CPU).
        """
        stacked: dict[str, np.ndarray] = {}
        for place, number in enumerate(ids):
            record = self.record(number)
            fields = self._fields(record, number, lambda kinds, place=place: choose(place, kinds))
            if not stacked:
                self._check_size(number, fields["latent"])
                # Zeros for the tokens that trimmed text leaves out; elsewhere all is written.
                allocate = np.zeros if self._trimmed else np.empty
                stacked = {
                    field: allocate((len(ids), *self._room(field, value)), value.dtype)
                    for field, value in fields.items()
                }
            for field, target in stacked.items():
                value = fields.get(field)
                shape = None if value is None else self._room(field, value)
                if value is None or shape != target.shape[1:] or value.dtype != target.dtype:
                    held = "absent" if value is None else f"{value.dtype}{list(value.shape)}"
                    raise ValueError(
                        f"{self.where(number)}, field {field!r} is {held}, the others of its "
                        f"batch are {target.dtype}{list(target.shape[1:])}: rebuild the data set"
                    )
                target[place, *map(slice, value.shape)] = value
        text: dict[str, dict[str, np.ndarray]] = {}
        for field, value in stacked.items():
            if field != "latent":
                _, name, part = field.split("/")
                text.setdefault(name, {})[part] = value
        return {"latent": stacked["latent"], "text": text}

    def _room(self, field: str, value: np.ndarray) -> tuple[int, ...]:
        """Shape that one sample takes in a batch: every caption has the tokens of the longest."""
        if not self._trimmed or not field.endswith(_OF_TOKENS):
            return value.shape
        return self.manifest.text_encoders[field.split("/")[1]]["length"], *value.shape[1:]

    def _check_size(self, number: int, latent: np.ndarray) -> None:
        """Refuses a latent that is not of the size of its bucket."""
        bucket = self.manifest.buckets[self._shards[self._place(number)[0]].bucket]
        factor = self.manifest.autoencoder.get("factor")
        if factor and latent.shape[:2] != (bucket.height // factor, bucket.width // factor):
            raise ValueError(
                f"{self.where(number)} has a latent of {latent.shape[0]} x {latent.shape[1]}, its "
                f"bucket of {bucket.height} x {bucket.width} px has latents of "
                f"{bucket.height // factor} x {bucket.width // factor}: rebuild the data set"
            )

    def _fields(
        self, record: dict[str, Any], number: int, choose: Callable[[list[str]], int]
    ) -> dict[str, np.ndarray]:
        """The arrays of one sample that go into a batch, text with one caption only."""
        needed = [f"text/{name}/{part}" for name in self._encoders for part in self._parts]
        for field in ("latent", *needed, *(("caption_kinds",) if needed else ())):
            if field not in record:
                raise ValueError(
                    f"{self.where(number)} has no field {field!r}, it has {', '.join(record)}: "
                    "rebuild the data set"
                )
        fields = {"latent": record["latent"]}
        if not self._encoders:
            return fields
        kinds = record["caption_kinds"]
        parts = [(name, part) for name in self._encoders for part in (*self._parts, "pooled")]
        texts = [field for field in (f"text/{n}/{p}" for n, p in parts) if field in record]
        ragged = [field for field in texts if self._trimmed and field.endswith(_OF_TOKENS)]
        for field in texts:
            if field not in ragged and not 0 < len(kinds) == len(record[field]):
                raise ValueError(
                    f"{self.where(number)}, field {field!r} has {len(record[field])} captions, "
                    f"caption_kinds has {len(kinds)}, both are equal and at least 1: "
                    "rebuild the data set"
                )
        chosen = choose(kinds)
        for field in texts:
            fields[field] = record[field][
                self._tokens(record, field, number, chosen) if field in ragged else chosen
            ]
        return fields

    def _tokens(self, record: dict[str, Any], field: str, number: int, caption: int) -> slice:
        """Where in a field of trimmed text the tokens of a caption are."""
        name = field.split("/")[1]
        lengths, most = record[f"text/{name}/length"], self.manifest.text_encoders[name]["length"]
        if lengths.sum() != len(record[field]) or lengths.min() < 0 or lengths.max() > most:
            raise ValueError(
                f"{self.where(number)}, field {field!r} has {len(record[field])} tokens, its "
                f"captions have {lengths.tolist()} of at most {most}: rebuild the data set"
            )
        start = int(lengths[:caption].sum())
        return slice(start, start + int(lengths[caption]))


class _HostBatches:
    """A grain source whose item number `step` is this host's part of the batch of `step`.

    `rows`: of the global batch, for each bucket.
    """

    def __init__(self, loader: Loader, rows: Sequence[np.ndarray]):
        self._loader, self._rows = loader, rows

    def __len__(self) -> int:
        return _STEPS

    def __getitem__(self, step: int) -> dict[str, Any]:
        step = int(step)
        return self._loader.host_batch(step, self._rows[self._loader.bucket_of_step(step)])


def _rows_of(sharding: jax.sharding.Sharding, batch_size: int) -> np.ndarray:
    """The rows of a global batch that this host's devices hold, in rising order."""
    slices = sharding.addressable_devices_indices_map((batch_size,)).values()
    return np.unique(np.concatenate([np.arange(batch_size)[index] for index in slices]))


def _on_device(
    batches: grain.DatasetIterator,
    loader: Loader,
    rows: Sequence[np.ndarray],
    sharding: jax.sharding.Sharding,
    start_step: int,
) -> Iterator[dict[str, Any]]:
    """Global arrays of host batches from `start_step` on, one batch ahead.

    `rows`: of the global batch that a host batch holds, for each bucket.
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

    def following() -> dict[str, Any]:
        bucket = loader.bucket_of_step(next(steps))
        size, held = loader.batch_sizes[bucket], rows[bucket]
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
