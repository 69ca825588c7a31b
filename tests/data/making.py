"""Small data sets whose samples say their number."""

import dataclasses
import itertools
from pathlib import Path

import numpy as np

from mmdit_jax.data.loader import Loader
from mmdit_jax.data.manifest import Bucket, Manifest, file_head
from mmdit_jax.data.records import ShardWriter
from mmdit_jax.encoders.storage import store

# Name -> width of the sequence and of the pooled vector.
TEXT = {"clip_l": (6, 3), "clip_g": (10, 5), "t5": (8, 0)}
TOKENS = 4


def record_of(number, height, width, channels, captions, text, tokens):
    """A sample whose latent says its number, and whose text says its number and caption."""
    rng = np.random.default_rng(number)
    latent = rng.standard_normal((height, width, channels)).astype(np.float16)
    latent[0, 0, 0] = number
    record = {
        "latent": latent,
        "captions": [f"{number} {c}" for c in range(captions)],
        "caption_kinds": [("original", "synthetic")[min(c, 1)] for c in range(captions)],
        "original_size": np.array([height, width], np.int32),
        "crop": np.array([0, 0, height, width], np.int32),
        "key": str(number),
    }
    for name, (sequence, pooled) in text.items():
        states = rng.standard_normal((captions, tokens, sequence)).astype(np.float16)
        states[:, 0, 0], states[:, 0, 1] = number, np.arange(captions)
        record[f"text/{name}/sequence"] = states
        if pooled:
            record[f"text/{name}/pooled"] = states[:, 0, :pooled].astype(np.float32)
    return record


def stored(record, text, tokens, trimmed, precision):
    """The record with text of another storage; sample n has n % tokens + 1 valid tokens and on."""
    for name in text:
        prefix = f"text/{name}/"
        fields = store(record[prefix + "sequence"].astype(np.float32), precision)
        if trimmed:
            captions = len(record["captions"])
            lengths = (int(record["key"]) + np.arange(captions, dtype=np.int32)) % tokens + 1
            for kind, rows in fields.items():
                fields[kind] = np.concatenate([r[:n] for r, n in zip(rows, lengths, strict=True)])
            fields["length"] = lengths
        record |= {prefix + kind: values for kind, values in fields.items()}
    return record


def damage(directory, number, split="train"):
    """Flips one bit of the latent of a sample, where the check at the start does not look."""
    loader = Loader(directory, split=split, batch_size=1, seed=0)
    path = Path(loader.where(number).rpartition(" record ")[0])
    content, latent = bytearray(path.read_bytes()), loader.record(number)["latent"].tobytes()
    content[content.index(latent) + 7] ^= 4
    path.write_bytes(content)
    shards = tuple(
        dataclasses.replace(shard, head=file_head(path)) if shard.file == path.name else shard
        for shard in loader.manifest.splits[split]
    )
    splits = {**loader.manifest.splits, split: shards}
    dataclasses.replace(loader.manifest, splits=splits).save(directory)


def build(
    directory,
    shards,
    validation=(),
    *,
    sizes=((4, 4),),
    channels=2,
    captions=3,
    text=TEXT,
    tokens=TOKENS,
    text_storage="full",
    text_precision="float16",
):
    """Writes shards given as (bucket, records); samples are numbered through the splits."""
    splits, number = {"train": [], "validation": []}, itertools.count()
    for split, layout in (("train", shards), ("validation", validation)):
        for index, (bucket, records) in enumerate(layout):
            file = f"{split}-{index:05d}.arrayrecord"
            with ShardWriter(directory, file, bucket=bucket) as writer:
                for n in itertools.islice(number, records):
                    record = record_of(n, *sizes[bucket], channels, captions, text, tokens)
                    if (text_storage, text_precision) != ("full", "float16"):
                        trimmed = text_storage == "trimmed"
                        record = stored(record, text, tokens, trimmed, text_precision)
                    writer.write(record)
            splits[split].append(writer.shard)
    Manifest(
        splits=splits,
        buckets=tuple(Bucket(8 * height, 8 * width) for height, width in sizes),
        autoencoder={"factor": 8, "channels": channels, "kind": "mean"},
        text_encoders={name: {"length": tokens} for name in text},
        resolution=32,
        source="test",
        text_storage=text_storage,
        text_precision=text_precision,
    ).save(directory)
