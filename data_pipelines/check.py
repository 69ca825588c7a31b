"""Looks at every picture once before anything expensive starts, and divides train and validation.

The first pass over a folder reads and decodes every file. So the build knows before the encoders
run what is kept and why the rest is not, every shard is filled to the same count, and the
validation split has the size that was asked for. The split goes by the hash of the bytes: adding
pictures moves few others, and copies of one file never stand on both sides.
"""

import dataclasses
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from data_pipelines.deduplicate import Kept
from data_pipelines.pictures import Checked, Pictures
from data_pipelines.progress import Progress
from data_pipelines.samples import (
    Dropped,
    Options,
    Rejected,
    Source,
    fingerprint,
    validation_size,
)
from data_pipelines.write import write_json

BLOCK = 2048  # verdicts in one note: what a killed build has to look at again


@dataclasses.dataclass(frozen=True)
class Splits:
    """What is going to be encoded, in order, and what is not.

    Attributes:
      train, validation: the usable samples.
      dropped: what cannot be used.
      duplicates: files among them that equal an earlier one.
    """

    train: list[Checked]
    validation: list[Checked]
    dropped: list[Dropped]
    duplicates: int = 0

    @property
    def items(self) -> list[Checked]:
        """Both splits."""
        return self.train + self.validation


def check(
    source: Source,
    pictures: Pictures,
    options: Options,
    notes: Path,
    deduplicate: Callable[[list[Checked]], Kept] = lambda items: Kept(items, []),
) -> Splits:
    """Divides the usable samples of a source into train and validation.

    Args:
      notes: folder of JSON files that remember the verdicts, block by block, so that a resumed
        build looks at the rest only.
      deduplicate: picks the samples to keep of the usable ones.

    Raises:
      ValueError: the source is not the one that `notes` were taken of.
    """
    dropped = list(source.dropped)
    if source.samples and all(sample.split for sample in source.samples):
        # Drawn pictures: there is nothing to find out about them, and the source did the split.
        splits: dict[str, list[Checked]] = {"train": [], "validation": []}
        for sample in source.samples:
            splits[sample.split].append(Checked(sample))
        return Splits(splits["train"], splits["validation"], dropped)

    kept = []
    for sample, verdict in zip(source.samples, _verdicts(source, pictures, notes), strict=True):
        if isinstance(verdict[1], int):
            kept.append(Checked(sample, *verdict))
        else:
            dropped.append(Dropped(sample.name, *verdict))
    if not kept:
        # Nothing is noted of a source without a usable picture: it has to change.
        shutil.rmtree(notes, ignore_errors=True)
    kept, copies = deduplicate(kept)
    return _divide(kept, dropped + copies, options)


def _verdicts(source: Source, pictures: Pictures, notes: Path) -> Iterator[list[Any]]:
    """For every sample [hash of its file, bucket], or [reason of its drop, particulars]."""
    listing = fingerprint(source)
    with Progress("checking", len(source.samples)) as progress:
        for start in range(0, len(source.samples), BLOCK):
            block = source.samples[start : start + BLOCK]
            path = notes / f"{start // BLOCK:06d}.json"
            verdicts = _read_notes(path, listing)
            if verdicts is None:
                verdicts = []
                for result in pictures.checked(block):
                    rejected = isinstance(result, Rejected)
                    verdicts.append(
                        [result.reason, result.detail]
                        if rejected
                        else [result.sha256, result.bucket]
                    )
                    progress.advance()
                notes.mkdir(parents=True, exist_ok=True)
                write_json(path, {"listing": listing, "verdicts": verdicts}, indent=None)
            else:
                progress.skip(len(block))
            yield from verdicts


def _divide(kept: list[Checked], dropped: list[Dropped], options: Options) -> Splits:
    hashes = sorted(item.sha256 for item in kept)
    count = min(validation_size(len(kept), options), len(kept))
    # Copies share a hash, so they are all at or below the last hash taken, or none is.
    last = hashes[count - 1] if count else ""
    return Splits(
        [item for item in kept if item.sha256 > last],
        [item for item in kept if item.sha256 <= last],
        dropped,
        len(hashes) - len(set(hashes)),
    )


def _read_notes(notes: Path, listing: str) -> list[Any] | None:
    if not notes.exists():
        return None
    content = json.loads(notes.read_text(encoding="utf-8"))
    if content["listing"] != listing:
        raise ValueError(
            "the source holds other files or captions than when "
            f"{notes.parent.parent.parent} was begun; "
            "restore it, or start again with --overwrite"
        )
    return content["verdicts"]
