"""What the stages of the pipeline hand to each other: samples, and why some are left out."""

import dataclasses
import hashlib
import json
from collections import Counter
from collections.abc import Mapping
from typing import Any, NamedTuple, Protocol

from data_pipelines.job import Job

REASONS = {
    "unreadable": "the file could not be read",
    "corrupt": "not an image, damaged or cut off",
    "too_large": "so many pixels or bytes that it may be a decompression bomb",
    "too_small": "the shorter side is below --min_size",
    "unsupported": "pixel values whose range is unknown",
    "non_finite": "NaN or infinity in the pixels, the latent or the text encoding",
    "no_caption": "no caption, or only empty ones",
    "bad_caption": "a caption file or line that cannot be used",
    "outside": "the path leads out of the source folder",
    "missing": "named in a caption file but not there",
    "corrupt_shard": "a tar or Parquet file that is damaged or cut off; what could be read is kept",
    "duplicate_key": "its key came before in the same tar file; the first one is kept",
    "no_score": "lacks a number that --score compares",
    "score": "excluded by --score",
    "aspect": "longer and narrower than --max_aspect",
    "filter": "excluded by the function of --filter",
    "duplicate": "the same file as an earlier one (--deduplicate)",
    "near_duplicate": "looks like an earlier picture (--deduplicate=near)",
}
"""Why a picture is dropped -> what that means, for the report."""


class Rejected(Exception):
    """A picture that is left out; the build goes on. `reason` is a key of `REASONS`."""

    def __init__(self, reason: str, detail: str = ""):
        super().__init__(reason, detail)
        self.reason, self.detail = reason, " ".join(detail.split())


class Caption(NamedTuple):
    """A caption and who wrote it: "original" or "synthetic"."""

    text: str
    kind: str


@dataclasses.dataclass(frozen=True)
class Sample:
    """One captioned picture that a source offers.

    Attributes:
      name: its path in the source, unique; what the report calls it.
      captions: at least one, none of them empty.
      bytes: size of the file, 0 if it is not a file.
      split: "train" or "validation" if the source decides, "" if the build may.
      objects: ground truth of the picture as JSON, or "".
      location: where the bytes are, for a source that keeps many pictures in one file.
      fields: what else the source says of it, as far as --score or --filter ask.
    """

    name: str
    captions: tuple[Caption, ...]
    bytes: int = 0
    split: str = ""
    objects: str = ""
    location: tuple[int, ...] = ()
    fields: Mapping[str, Any] = dataclasses.field(default_factory=dict)


class Dropped(NamedTuple):
    """A picture that was left out: a key of `REASONS`, and the particulars."""

    name: str
    reason: str
    detail: str


@dataclasses.dataclass(frozen=True)
class Options:
    """What the build's flags say to a source.

    Attributes:
      exclude: folder that is no part of the source.
      index: folder where a source of many shards may keep what it found in them; "" keeps nothing.
      fields: names of the further fields to keep of a sample; None keeps all.
      image_field, caption_fields, synthetic_fields: where the picture and its captions are, if not
        under the usual names (data_pipelines/sources/entries.py).
      tfds_split: split of a TFDS data set.
      job: the processes that share the listing of a source of many shards, by its notes.
    """

    resolution: int
    seed: int = 0
    count: int | None = None
    validation_count: int | None = None
    validation_fraction: float = 0.05
    exclude: str = ""
    index: str = ""
    fields: frozenset[str] | None = frozenset()
    image_field: str = ""
    caption_fields: tuple[str, ...] = ()
    synthetic_fields: tuple[str, ...] = ()
    tfds_split: str = "train"
    job: Job = Job()


class Source(Protocol):
    """Samples in a fixed order, what was left out while listing them, and the reading of one."""

    samples: list[Sample]
    dropped: list[Dropped]
    ignored: Counter[str]

    def read(self, sample: Sample) -> bytes:
        """The bytes of the image file; raises `Rejected`."""
        ...


def fingerprint(source: Source) -> str:
    """Hex hash of everything a source lists, to notice that it changed between two runs."""
    digest = hashlib.sha256()
    names = [field.name for field in dataclasses.fields(Sample)]
    for sample in source.samples:
        # Not dataclasses.astuple, whose deep copies take longer than the rest of a large listing.
        listed = [getattr(sample, name) for name in names]
        digest.update(json.dumps(listed).encode())
    return digest.hexdigest()


def validation_size(total: int, options: Options) -> int:
    """How many of `total` pictures validate: as asked, or the fraction within 1..5,000."""
    if options.validation_count is not None:
        return options.validation_count
    return min(max(round(total * options.validation_fraction), 1), 5000)
