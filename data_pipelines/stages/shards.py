"""The stage that encodes the pictures and writes the shards."""

import contextlib
import dataclasses
import functools
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np
from absl import logging

from data_pipelines.job import Job
from data_pipelines.progress import Progress
from data_pipelines.settings import Settings
from data_pipelines.stage_times import CLOSE, WRITE, StageTimes
from data_pipelines.stages.captions import CaptionTable, caption_bytes
from data_pipelines.stages.check import Splits
from data_pipelines.stages.encode import Encoded, encode_shards, encoding_identity
from data_pipelines.stages.latents import Autoencoder
from data_pipelines.stages.pictures import Checked, Pictures
from data_pipelines.write import SUFFIX, Finished, Output
from mmdit_jax.data.records import ShardWriter
from mmdit_jax.encoders import text

SHARD_BYTES = 512 << 20
SHARD_RECORDS = 4096
TABLE_BYTES = 1 << 30
"""The outputs of all different captions are kept in memory if they fit in here."""


@dataclasses.dataclass(frozen=True)
class Networks:
    """The frozen networks, and how the manifest describes them."""

    autoencoder: Autoencoder
    encoders: Mapping[str, text.TextEncoder]
    latents: Mapping[str, Any]
    texts: Mapping[str, Mapping[str, Any]]


class Shards:
    """The stage that encodes and writes, a shard at a time (data_pipelines.job.Stage)."""

    label = "encoding"

    def __init__(
        self,
        settings: Settings,
        output: Output,
        splits: Splits,
        pictures: Pictures,
        networks: Networks,
        times: StageTimes,
    ):
        """`times`: counts what is spent on it."""
        encoders, told = networks.encoders, captions_of(splits.items)
        text_bytes = caption_bytes(encoders, settings.text_precision)
        per_shard = settings.records_per_shard or _records_per_shard(
            settings.resolution, networks.latents, text_bytes * len(told) / len(splits.items)
        )
        self._make_table = functools.partial(
            CaptionTable, encoders, block=settings.batch_size, **settings.text_table()
        )
        self._table = None
        if len(set(told)) * text_bytes <= TABLE_BYTES:
            self._table = self._make_table(told)
        self._identity = encoding_identity(
            networks.latents,
            networks.texts,
            settings.text_dtype,
            settings.text_storage,
            settings.text_precision,
        )
        self._batch_size, self._output, self._pictures = settings.batch_size, output, pictures
        self._networks, self._times, self._sizes = networks, times, settings.sizes()
        self._parts = [
            (split, f"{split}-{number:05d}{SUFFIX}", part)
            for split, items in (("train", splits.train), ("validation", splits.validation))
            for number, part in enumerate(_parts(items, per_shard))
        ]
        self.sizes = [len(part) for _, _, part in self._parts]
        self._finished: dict[int, Finished] = {}

    def done(self, number: int) -> bool:
        """Whether a shard and the note on it are there."""
        note = self._output.read_shard_note(self._parts[number][1])
        if note is not None:
            self._finished[number] = note
        return note is not None

    def compile(self, job: Job) -> None:
        """Compiles the networks for the shards of this process that are missing.

        Before the pictures and not with the first of them: while a network is traced, Python's lock
        is taken, and no thread gets far with decoding.
        """
        missing = [
            part
            for number, (_, _, part) in enumerate(self._parts)
            if job.mine(number) and not self.done(number)
        ]
        if not missing:
            return
        start = time.perf_counter()
        self._captions(missing[0]).compile()
        for bucket in sorted({part[0].bucket for part in missing}):
            size = self._sizes[bucket]
            picture_BHWC = np.zeros((1, size.height, size.width, 3), np.uint8)
            self._networks.autoencoder.dispatch(picture_BHWC).fetch()
        logging.info("compiled the networks in %.1f s", time.perf_counter() - start)

    def make(self, numbers: Sequence[int], progress: Progress) -> None:
        """Writes some shards."""
        encoded = encode_shards(
            [self._parts[number][2] for number in numbers],
            self._pictures,
            self._networks.autoencoder,
            self._captions,
            self._times,
            identity=self._identity,
            batch_size=self._batch_size,
        )
        closing: dict[int, Future[Finished]] = {}
        with (
            self._times,
            ThreadPoolExecutor(1, thread_name_prefix="close") as closer,
            contextlib.closing(encoded),
        ):
            for number in numbers:
                _, file, part = self._parts[number]
                written = _write_shard(
                    self._output, file, part[0].bucket, next(encoded), progress, self._times
                )
                for earlier in closing.values():
                    earlier.result()  # one at most is being closed; its error ends the build here
                closing[number] = closer.submit(
                    _close_shard, self._output, file, written, self._times
                )
        for number, shard in closing.items():
            self._finished[number] = shard.result()

    def _captions(self, part: Sequence[Checked]) -> CaptionTable:
        return self._table or self._make_table(captions_of(part))

    def finished(self) -> dict[str, list[Finished]]:
        """What is known of every shard, by split, when all are done."""
        found: dict[str, list[Finished]] = {"train": [], "validation": []}
        for number, (split, _, _) in enumerate(self._parts):
            found[split].append(self._finished[number])
        return found


class _Written(NamedTuple):
    """A shard with all its records, still to be closed, and what its note will say."""

    writer: ShardWriter
    dropped: list[list[str]]
    enlarged: int


def _write_shard(
    output: Output,
    file: str,
    bucket: int,
    encoded: Iterable[Encoded],
    progress: Progress,
    times: StageTimes,
) -> _Written:
    """Writes the records that there are."""
    dropped, enlarged = [], 0
    with contextlib.ExitStack() as stack:
        writer = stack.enter_context(ShardWriter(output.path, file, bucket=bucket, process=True))
        for result in encoded:
            if result.dropped:
                dropped.append(list(result.dropped))
            else:
                with times.spent(WRITE):
                    writer.write(result.record)
                enlarged += result.enlarged
            progress.advance()
        stack.pop_all()
    return _Written(writer, dropped, enlarged)


def _close_shard(output: Output, file: str, written: _Written, times: StageTimes) -> Finished:
    """Gives the shard its name, and then writes the note that it is finished.

    In a thread of its own: reading 512 MB again for their checksum takes as long as many batches.
    """
    with times.spent(CLOSE), written.writer:
        pass
    shard = written.writer.shard
    if shard is None or not shard.records:
        (output.path / file).unlink()
        shard = None
    finished = Finished(shard, written.dropped, written.enlarged)
    output.write_shard_note(file, finished)
    return finished


def captions_of(items: Sequence[Checked]) -> list[str]:
    """All captions of some samples, in order."""
    return [caption.text for item in items for caption in item.sample.captions]


def _parts(items: Sequence[Checked], per_shard: int) -> Iterator[list[Checked]]:
    """The items of each shard: bucket by bucket, in order within a bucket."""
    buckets: dict[int, list[Checked]] = {}
    for item in items:
        buckets.setdefault(item.bucket, []).append(item)
    for _, same in sorted(buckets.items()):
        yield from (same[start : start + per_shard] for start in range(0, len(same), per_shard))


def _records_per_shard(resolution: int, latents: Mapping[str, Any], text_bytes: float) -> int:
    """As many records as make a shard of about 512 MB, 4096 at most."""
    values = latents["channels"] * (resolution // latents["factor"]) ** 2
    size = {"pixels": 1, "mean": 4, "moments": 8}[latents["kind"]]  # bytes per latent value
    return int(max(1, min(SHARD_RECORDS, SHARD_BYTES // (values * size + text_bytes))))
