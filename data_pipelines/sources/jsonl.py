"""The source `jsonl:FILE`: one JSON object a line, which names a picture and captions it.

    {"file": "0001.jpg", "caption": "a cat", "synthetic_caption": "A grey cat ...", "aesthetic": 6}

entries.py lists the keys. Paths are relative to the folder of FILE and stay inside
of it; several lines for one picture add up, and of a field that both have the later one counts.
Samples come in the order of the lines. FILE may be remote (gs://, s3://); the sizes of remote
pictures are not asked for, so a missing one shows when it is read.
"""

import os
import posixpath
from collections import Counter
from typing import Any

from data_pipelines.samples import Caption, Dropped, Options, Rejected, Sample
from data_pipelines.sources import entries
from data_pipelines.sources.folders import file_size, inside
from data_pipelines.sources.sharded import is_remote, open_file, read_whole


class Lines:
    """The pictures that the lines of a file name."""

    def __init__(self, path: str, options: Options):
        self._root = (
            posixpath.dirname(path) if is_remote(path) else os.path.dirname(os.path.abspath(path))
        )
        self.dropped: list[Dropped] = []
        self.ignored: Counter[str] = Counter()
        captions: dict[str, list[Caption]] = {}
        fields: dict[str, dict[str, Any]] = {}
        keys = entries.caption_keys(options)
        try:
            file = open_file(path)
        except OSError as error:
            raise ValueError(
                f"--source=jsonl:{path} cannot be read ({error.strerror or error}); "
                "give a file of one JSON object a line"
            ) from error
        with file:
            for number, line in enumerate(entries.lines(file), start=1):
                if not line.strip():
                    continue
                where = f"{posixpath.basename(path)} line {number}"
                try:
                    entry = entries.parse(entries.text_of(line, where))
                    name = inside(self._root, "", entry, options)
                    captions.setdefault(name, []).extend(entries.captions_in(entry, keys))
                    fields.setdefault(name, {}).update(entries.fields_in(entry, options))
                except Rejected as error:
                    self.dropped.append(Dropped(where, error.reason, error.detail))
        self.samples = []
        for name, told in captions.items():
            try:
                if not told:
                    raise Rejected("no_caption", f"no line of it has one of {', '.join(keys)}")
                size = 0 if is_remote(path) else file_size(os.path.join(self._root, name))
            except Rejected as error:
                self.dropped.append(Dropped(name, error.reason, error.detail))
            else:
                told = tuple(dict.fromkeys(told))
                self.samples.append(Sample(name, told, bytes=size, fields=fields[name]))

    def read(self, sample: Sample) -> bytes:
        """The bytes of the file; raises `Rejected`."""
        return read_whole(posixpath.join(self._root, sample.name))
