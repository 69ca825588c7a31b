"""From pictures and captions to records.

Everything here is a pure function of the plan (which samples, in which order), never of what ran
before: a build that was killed and resumed writes the bytes that an uninterrupted one writes.
"""

import contextlib
import hashlib
import itertools
import json
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple, TypeVar

import jax
import numpy as np

from data_pipelines.samples import Dropped, Rejected, Sample
from data_pipelines.stage_times import LATENTS, WRITE, StageTimes
from data_pipelines.stages.captions import CaptionTable
from data_pipelines.stages.latents import Autoencoder
from data_pipelines.stages.pictures import Checked, Picture, Pictures
from mmdit_jax.encoders.dispatched import Dispatched

Item = TypeVar("Item")

CODE_VERSION = 2
"""Raise it with every change that alters what is written for the same input."""

AHEAD = 2
"""Batches dispatched before those whose records are being made; bounds the memory."""


def encoding_identity(
    autoencoder: Mapping[str, Any],
    text_encoders: Mapping[str, Mapping[str, Any]],
    text_dtype: str,
    text_storage: str = "full",
    text_precision: str = "float16",
) -> str:
    """What the networks contribute to a content key; arguments as the manifest describes them."""
    texts = {name: [entry["hash"], entry["length"]] for name, entry in text_encoders.items()}
    # Pixels are not computed in any dtype.
    latents = [autoencoder[name] for name in ("hash", "dtype") if name in autoencoder]
    stored = [text_storage, text_precision]
    # Keys stay what they were before there was a choice.
    chosen = [] if stored == ["full", "float16"] else stored
    return json.dumps([*latents, texts, text_dtype, CODE_VERSION, *chosen])


def content_key(picture: Picture, sample: Sample, identity: str) -> str:
    """Hash of all that decides a record's arrays: change one of them and the key is another.

    Args:
      identity: of the networks, see `encoding_identity`.
    """
    content = [
        picture.sha256,
        picture.original_size,
        picture.crop,
        picture.pixels_HWC.shape,
        sample.captions,
        identity,
    ]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def make_record(
    sample: Sample,
    picture: Picture,
    latent_HWC: np.ndarray,
    captions: CaptionTable,
    identity: str,
) -> dict[str, Any]:
    """One sample in the shard format (mmdit_jax.data.records).

    Raises:
      Rejected: "non_finite".
    """
    if latent_HWC.dtype.kind == "f" and not np.isfinite(latent_HWC).all():
        raise Rejected("non_finite", "NaN or infinity in the latent")
    record: dict[str, Any] = {
        "latent": latent_HWC,
        **captions.fields([caption.text for caption in sample.captions]),
        "captions": [caption.text for caption in sample.captions],
        "caption_kinds": [caption.kind for caption in sample.captions],
        "original_size": np.array(picture.original_size, np.int32),
        "crop": np.array(picture.crop, np.int32),
        "key": content_key(picture, sample, identity),
    }
    if sample.objects:
        record["objects"] = sample.objects
    return record


class Encoded(NamedTuple):
    """One sample after the networks: its record, or why there is none."""

    record: dict[str, Any] | None
    dropped: Dropped | None = None
    enlarged: bool = False


class _Batch(NamedTuple):
    """Samples whose pictures and captions the networks were given."""

    items: Sequence[Checked]
    pictures: Sequence[Picture | Rejected]
    latents: Dispatched[np.ndarray] | None  # of the pictures that are not rejected, if any
    captions: CaptionTable
    arrays: Any  # all that the devices make of it


def encode_shards(
    shards: Sequence[Sequence[Checked]],
    pictures: Pictures,
    autoencoder: Autoencoder,
    captions_of: Callable[[Sequence[Checked]], CaptionTable],
    times: StageTimes,
    *,
    identity: str,
    batch_size: int,
) -> Generator[Iterator[Encoded]]:
    """Encodes the samples of some shards in batches of `batch_size` pictures of one shard.

    Pictures are prepared and batches dispatched in a thread, AHEAD batches before those whose
    records are asked for and past the ends of shards: the devices have work while records are made
    and written. Close the generator to stop the thread.

    Yields:
      For each shard, in order, one result per sample, in order; to be used up before the next.
    """
    batches = _dispatch(shards, pictures, autoencoder, captions_of, batch_size, times)
    with run_ahead(batches, AHEAD) as ready:
        for items in shards:
            yield _encoded(itertools.islice(ready, -(-len(items) // batch_size)), identity, times)


def _dispatch(
    shards: Sequence[Sequence[Checked]],
    pictures: Pictures,
    autoencoder: Autoencoder,
    captions_of: Callable[[Sequence[Checked]], CaptionTable],
    batch_size: int,
    times: StageTimes,
) -> Generator[_Batch]:
    prepared = pictures.prepared(itertools.chain.from_iterable(shards))
    for items in shards:
        captions = captions_of(items)
        for start in range(0, len(items), batch_size):
            batch = items[start : start + batch_size]
            made = list(itertools.islice(prepared, len(batch)))
            usable = [each.pixels_HWC for each in made if isinstance(each, Picture)]
            latents, texts = None, []
            if usable:
                stacked_BHWC = np.stack(usable)
                latents = times.dispatched(
                    LATENTS,
                    len(usable),
                    lambda stacked_BHWC=stacked_BHWC: autoencoder.dispatch(stacked_BHWC),
                )
                wanted = zip(batch, made, strict=True)
                texts = captions.dispatch(
                    [
                        caption.text
                        for item, picture in wanted
                        if isinstance(picture, Picture)
                        for caption in item.sample.captions
                    ],
                    times,
                )
            arrays = [each.arrays for each in [latents, *texts] if each is not None]
            yield _Batch(batch, made, latents, captions, arrays)


def _encoded(batches: Iterable[_Batch], identity: str, times: StageTimes) -> Iterator[Encoded]:
    for batch in batches:
        jax.block_until_ready(batch.arrays)  # so that what follows is work and no waiting
        with times.spent(WRITE, 0):
            latents = iter(() if batch.latents is None else batch.latents.fetch())
        for item, picture in zip(batch.items, batch.pictures, strict=True):
            try:
                if isinstance(picture, Rejected):
                    raise picture
                latent_HWC = next(latents)
                with times.spent(WRITE, 0):
                    record = make_record(item.sample, picture, latent_HWC, batch.captions, identity)
            except Rejected as rejected:
                case = Dropped(item.sample.name, rejected.reason, rejected.detail)
                yield Encoded(None, case)
            else:
                height, width = picture.pixels_HWC.shape[:2]
                smaller = picture.crop.height < height or picture.crop.width < width
                yield Encoded(record, enlarged=smaller)


@contextlib.contextmanager
def run_ahead(iterator: Generator[Item], depth: int) -> Iterator[Iterator[Item]]:
    """The items of an iterator that runs in a thread of its own, `depth` items ahead.

    Its exceptions are raised in the place of the item; leaving the context closes it.
    """
    end = object()
    with ThreadPoolExecutor(1, thread_name_prefix="ahead") as thread:
        waiting = deque(thread.submit(next, iterator, end) for _ in range(depth))

        def items() -> Iterator[Any]:
            while (item := waiting.popleft().result()) is not end:
                waiting.append(thread.submit(next, iterator, end))
                yield item

        try:
            yield items()
        finally:
            for future in waiting:
                future.cancel()
            thread.submit(iterator.close)
