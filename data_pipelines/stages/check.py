"""Looks at every picture once before anything expensive starts, and divides train and validation.

The first pass over a folder reads and decodes every file. So the build knows before the encoders
run what is kept and why the rest is not, every shard is filled to the same count, and the
validation split has the size that was asked for. The split goes by the hash of the bytes: adding
pictures moves few others, and copies of one file never stand on both sides.
"""

import dataclasses
import itertools
import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from data_pipelines.job import Job, complete
from data_pipelines.progress import Progress
from data_pipelines.samples import (
    Dropped,
    Options,
    Rejected,
    Source,
    fingerprint,
    validation_size,
)
from data_pipelines.stages.deduplicate import Kept
from data_pipelines.stages.pictures import Checked, Pictures
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


class Check:
    """The stage that looks at every picture, a block at a time (data_pipelines.job.Stage).

    Drawn pictures whose source did the split have no block: there is nothing to find out.
    """

    label = "checking"

    def __init__(self, source: Source, pictures: Pictures, notes: Path):
        """`notes`: folder of JSON files that remember the verdicts, one per block."""
        self.source, self.notes, self._pictures = source, notes, pictures
        self._verdicts: dict[int, list[Any]] = {}
        self.drawn = bool(source.samples) and all(sample.split for sample in source.samples)
        self.listing = "" if self.drawn else fingerprint(source)
        total = 0 if self.drawn else len(source.samples)
        self.sizes = [min(BLOCK, total - start) for start in range(0, total, BLOCK)]

    def done(self, number: int) -> bool:
        """Whether the verdicts of a block are there; raises ValueError if of another source."""
        path = self._path(number)
        if number not in self._verdicts and path.exists():
            content = json.loads(path.read_text(encoding="utf-8"))
            if content["listing"] != self.listing:
                raise ValueError(
                    "the source holds other files or captions than when "
                    f"{self.notes.parent.parent} was begun; "
                    "restore it, or start again with --overwrite"
                )
            self._verdicts[number] = content["verdicts"]
        return number in self._verdicts

    def make(self, numbers: Sequence[int], progress: Progress) -> None:
        """Looks at some blocks."""
        for number in numbers:
            self._verdicts[number] = self._look(number, progress)

    def _look(self, number: int, progress: Progress) -> list[Any]:
        """Notes and returns, for every sample of a block, [hash of its file, bucket], or [reason
        of its drop, particulars]."""
        verdicts = []
        samples = self.source.samples[number * BLOCK : (number + 1) * BLOCK]
        for result in self._pictures.checked(samples):
            rejected = isinstance(result, Rejected)
            verdicts.append(
                [result.reason, result.detail] if rejected else [result.sha256, result.bucket]
            )
            progress.advance()
        self.notes.mkdir(parents=True, exist_ok=True)
        note = {"listing": self.listing, "verdicts": verdicts}
        write_json(self._path(number), note, indent=None)
        return verdicts

    def result(self) -> tuple[list[Checked], list[Dropped]]:
        """The usable samples and the others, when every block is done."""
        kept, dropped = [], []
        verdicts = itertools.chain.from_iterable(map(self._verdicts.pop, range(len(self.sizes))))
        for sample, verdict in zip(self.source.samples, verdicts, strict=True):
            if isinstance(verdict[1], int):
                kept.append(Checked(sample, *verdict))
            else:
                dropped.append(Dropped(sample.name, *verdict))
        return kept, dropped

    def _path(self, number: int) -> Path:
        return self.notes / f"{number:06d}.json"


def check(
    stage: Check, options: Options, deduplicate: Callable[[list[Checked]], Kept], job: Job
) -> Splits:
    """Divides the usable samples of a source into train and validation.

    Args:
      deduplicate: picks the samples to keep of the usable ones.
      job: the processes that share the work and its notes.

    Raises:
      ValueError: the source is not the one that the notes were taken of.
      PeerLost: another process did not do its part.
    """
    source = stage.source
    if stage.drawn:
        splits: dict[str, list[Checked]] = {"train": [], "validation": []}
        for sample in source.samples:
            splits[sample.split].append(Checked(sample))
        return Splits(splits["train"], splits["validation"], list(source.dropped))

    complete(stage, job)
    kept, rejected = stage.result()
    if not kept and job.processes == 1:
        # Nothing is noted of a source without a usable picture: it has to change.
        shutil.rmtree(stage.notes, ignore_errors=True)
    kept, copies = deduplicate(kept)
    return _divide(kept, source.dropped + rejected + copies, options)


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
