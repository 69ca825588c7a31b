"""What a finished data set holds, in numbers and in pictures."""

import dataclasses
import json
import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from mmdit_jax.data.latents import to_x0
from mmdit_jax.data.manifest import Manifest, Shard
from mmdit_jax.data.records import ShardReader, decode_record
from mmdit_jax.encoders import autoencoder as vae
from mmdit_jax.encoders import pixels
from mmdit_jax.encoders.text import folders, load_tokenizer

OPEN_SHARDS = 64


@dataclasses.dataclass(frozen=True)
class Statistics:
    """A data set in numbers.

    Attributes:
      manifest: of the data set.
      report: the content of report.json, {} if there is none.
      bytes: of all shards.
      buckets: "HxW" -> split -> records.
      text_bytes: of the text of a record, mean.
      read: records that the following was computed from.
      captions: kind -> how many a record has on average.
      lengths: "words" and each text encoder -> that length of every caption that was read.
      limits: text encoder -> tokens that it takes.
      missing: text encoder -> why its tokens were not counted.
      channel_means, channel_deviations: (C,) of x0.
    """

    manifest: Manifest
    report: Mapping[str, Any]
    bytes: int
    buckets: Mapping[str, Mapping[str, int]]
    text_bytes: float
    read: int
    captions: Mapping[str, float]
    lengths: Mapping[str, np.ndarray]
    limits: Mapping[str, int]
    missing: Mapping[str, str]
    channel_means: np.ndarray
    channel_deviations: np.ndarray

    @property
    def records(self) -> int:
        """Of all splits."""
        return sum(shard.records for shard in _shards(self.manifest))


class Example(NamedTuple):
    """A picture as its latent holds it, uint8, and the captions with their kinds."""

    picture_HWC: np.ndarray
    captions: list[tuple[str, str]]
    original_size: tuple[int, int]


def gather(directory: Path, samples: int) -> Statistics:
    """Reads the manifest, the report of the build, and `samples` records.

    Raises:
      ValueError, FileNotFoundError: no finished data set, or a damaged one.
    """
    manifest = Manifest.load(directory)
    report = directory / "report.json"
    buckets: dict[str, Counter[str]] = {}
    for split, shards in manifest.splits.items():
        for shard in shards:
            bucket = manifest.buckets[shard.bucket]
            place = buckets.setdefault(str(bucket), Counter())
            place[split] += shard.records
    captions, kinds, read, text_bytes = [], Counter(), 0, 0
    count, sums, squares = 0, np.zeros(()), np.zeros(())
    for record in _records(directory, manifest, samples):
        read += 1
        text_bytes += sum(record[field].nbytes for field in record if field.startswith("text/"))
        captions += record["captions"]
        kinds.update(record["caption_kinds"])
        x0_NC = _x0(record, manifest).reshape(-1, manifest.autoencoder["channels"])
        count += len(x0_NC)
        sums = sums + x0_NC.sum(0)
        squares = squares + (x0_NC**2).sum(0)
    mean_C = sums / count
    lengths, missing = {"words": np.array([len(caption.split()) for caption in captions])}, {}
    for name, entry in manifest.text_encoders.items():
        try:
            lengths[name] = _tokens(directory, str(entry["path"]), captions)
        except (KeyError, ValueError, FileNotFoundError) as error:
            missing[name] = str(error)
    return Statistics(
        manifest,
        json.loads(report.read_text(encoding="utf-8")) if report.exists() else {},
        sum(shard.bytes for shard in _shards(manifest)),
        buckets,
        text_bytes / read,
        read,
        {kind: kinds[kind] / read for kind in sorted(kinds)},
        lengths,
        {name: entry["length"] for name, entry in manifest.text_encoders.items()},
        missing,
        mean_C,
        np.sqrt(np.maximum(squares / count - mean_C**2, 0)),
    )


def decode_examples(directory: Path, count: int, folder: str) -> tuple[list[Example], str]:
    """`count` pictures, evenly spaced, decoded from their latents; or none, and why not.

    Args:
      folder: of the VAE; "" is where the manifest says.

    Raises:
      ValueError, FileNotFoundError: the folder given is not the VAE of the data set.
    """
    manifest = Manifest.load(directory)
    about = manifest.autoencoder
    if not count:
        return [], ""
    if about["kind"] == pixels.KIND:
        if folder:
            raise ValueError(
                f"--autoencoder={folder} is given but the data set holds {about['id']}, which "
                "needs none; leave it out"
            )
        decode = pixels.decode
    else:
        where = folder or os.path.join(directory, str(about.get("path", "")))
        if not folder and not (about.get("path") and os.path.isdir(where)):
            return [], f"the VAE {about['id']} is not at {where}; give its folder by --autoencoder"
        network = vae.VAE(where)
        vae.require_recorded(network, about)
        decode = network.decode
    examples = []
    for record in _records(directory, manifest, count):
        picture_BHWC = decode(jnp.asarray(_x0(record, manifest), jnp.float32)[None], about)
        captions = list(zip(record["captions"], record["caption_kinds"], strict=True))
        height, width = (int(side) for side in record["original_size"])
        examples.append(Example(np.asarray(picture_BHWC)[0], captions, (height, width)))
    return examples, ""


def describe(statistics: Statistics) -> str:
    """The statistics for a person, a line each."""
    manifest, report = statistics.manifest, statistics.report
    records = statistics.records
    lines = [
        f"source    {manifest.source} at {manifest.resolution} px",
        f"latents   {manifest.autoencoder['id']} ({manifest.autoencoder['kind']})",
        f"bytes     {statistics.bytes:,} in {len(_shards(manifest))} shards, "
        f"{statistics.bytes / records:,.0f} per sample",
    ]
    for split, shards in manifest.splits.items():
        lines.append(f"kept      {sum(shard.records for shard in shards):,} {split}")
    if not report:
        lines.append("dropped   unknown, there is no report.json")
    for reason, entry in report.get("dropped", {}).items():
        lines.append(f"dropped   {entry['count']:,} {reason}: {entry['meaning']}")
    for size, splits in statistics.buckets.items():
        held = ", ".join(f"{count:,} {split}" for split, count in splits.items())
        lines.append(f"size      {size}: {held}")
    lines.append(f"the rest is of {statistics.read:,} records, evenly spaced")
    lines.append(
        f"text      {manifest.text_storage}, {manifest.text_precision}, "
        f"{statistics.text_bytes:,.0f} bytes per sample"
    )
    for kind, mean in statistics.captions.items():
        lines.append(f"captions  {mean:.2f} {kind} per picture")
    for name, values in statistics.lengths.items():
        line = f"length    {summarize(values)} {'words' if name == 'words' else f'{name} tokens'}"
        if limit := statistics.limits.get(name):
            line += f", {np.mean(values > limit):.1%} cut at {limit}"
        lines.append(line)
    for name, why in statistics.missing.items():
        lines.append(f"length    {name} tokens unknown: {why}")
    channels = zip(statistics.channel_means, statistics.channel_deviations, strict=True)
    for channel, (mean, deviation) in enumerate(channels):
        lines.append(f"latent    channel {channel:3d}: mean {mean:+.3f}, deviation {deviation:.3f}")
    return "\n".join(lines)


def summarize(values: np.ndarray) -> str:
    """Lengths as "median 9, 95% up to 14, at most 15"."""
    if not len(values):
        return "none"
    return (
        f"median {np.median(values):g}, "
        f"95% up to {np.percentile(values, 95, method='inverted_cdf'):g}, "
        f"at most {values.max()}"
    )


def _shards(manifest: Manifest) -> list[Shard]:
    return [shard for shards in manifest.splits.values() for shard in shards]


def _records(directory: Path, manifest: Manifest, count: int) -> Iterator[dict[str, Any]]:
    """`count` records, or all, evenly spaced over every split."""
    shards = _shards(manifest)
    reader = ShardReader(directory, shards, OPEN_SHARDS)
    ends = np.cumsum([shard.records for shard in shards])
    for number in np.unique(np.linspace(0, ends[-1] - 1, min(count, ends[-1])).astype(np.int64)):
        shard = int(np.searchsorted(ends, number, side="right"))
        index = int(number - ends[shard] + shards[shard].records)
        yield decode_record(reader.read(shard, index), reader.where(shard, index))


def _x0(record: Mapping[str, Any], manifest: Manifest) -> np.ndarray:
    """The normalised latent (H, W, C), float64; of moments the mean."""
    x0_BHWC = to_x0(jnp.asarray(record["latent"])[None], manifest.autoencoder)
    return np.asarray(x0_BHWC[0], np.float64)


def _tokens(directory: Path, path: str, captions: Sequence[str]) -> np.ndarray:
    """How many tokens an encoder makes of each caption, before it cuts."""
    parts = ",".join(os.path.join(directory, part) for part in path.split(","))
    tokenizer = load_tokenizer(folders(parts)[1])
    return np.array([len(ids) for ids in tokenizer(list(captions))["input_ids"]])
