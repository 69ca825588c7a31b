"""Looks at every picture once before anything expensive starts, and divides train and validation.

The first pass over a folder reads and decodes every file. So the build knows before the encoders
run what is kept and why the rest is not, every shard is filled to the same count, and the
validation split has the size that was asked for. The split goes by the hash of the bytes: adding
pictures moves few others, and copies of one file never stand on both sides.
"""

import dataclasses
import json
from pathlib import Path
from typing import Any

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


@dataclasses.dataclass(frozen=True)
class Splits:
    """What is going to be encoded, in order, and what is not.

    Attributes:
      train, validation: the usable samples.
      dropped: what cannot be used.
      duplicates: files that equal an earlier one; they are kept.
    """

    train: list[Checked]
    validation: list[Checked]
    dropped: list[Dropped]
    duplicates: int = 0

    @property
    def items(self) -> list[Checked]:
        """Both splits."""
        return self.train + self.validation


def check(source: Source, pictures: Pictures, options: Options, notes: Path) -> Splits:
    """Divides the usable samples of a source into train and validation.

    Args:
      notes: JSON file that remembers the result, so that a resumed build need not look again.

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

    listing = fingerprint(source)
    verdicts = _read_notes(notes, listing)
    if verdicts is None:
        verdicts = []
        with Progress("checking", len(source.samples)) as progress:
            for result in pictures.checked(source.samples):
                rejected = isinstance(result, Rejected)
                verdicts.append([result.reason, result.detail] if rejected else [result])
                progress.advance()
    kept = []
    for sample, verdict in zip(source.samples, verdicts, strict=True):
        if len(verdict) == 1:
            kept.append(Checked(sample, verdict[0]))
        else:
            dropped.append(Dropped(sample.name, *verdict))
    if kept:
        # Nothing is noted of a source without a usable picture: it has to change.
        write_json(notes, {"listing": listing, "verdicts": verdicts})
    return _divide(kept, dropped, options)


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
            f"the source holds other files or captions than when {notes.parent.parent} was begun; "
            "restore it, or start again with --overwrite"
        )
    return content["verdicts"]
