"""The source `webdataset:GLOB`: tar files in which the members of one sample share a key.

    000123.jpg | .jpeg | .png | .webp     the picture
    000123.txt                            one caption
    000123.json                           captions and scores (entries.py)

The key is the path of a member up to the first dot of its file name, as in WebDataset. Other
members (.cls, .npy, .pyd, ...) are counted and never read. One pass over a tar notes where each
picture begins; nothing is unpacked, and later one picture is one read. So the tars are plain: a
compressed one cannot be read from its middle.

A tar that is damaged or cut off gives what stands before the damage, and the report names it.
"""

import os
import posixpath
import tarfile
from collections import Counter
from typing import Any, BinaryIO

from data_pipelines.samples import Caption, Dropped, Options, Rejected, Sample
from data_pipelines.sources import entries
from data_pipelines.sources.folders import MAX_FILE_BYTES
from data_pipelines.sources.sharded import (
    Index,
    find_files,
    list_shards,
    open_file,
    read_part,
    sample_name,
)

IMAGES = ("jpg", "jpeg", "png", "webp")
TEXTS = ("txt", "json")
MAX_TEXT_BYTES = 1 << 20


class Tars:
    """The samples of a set of tar files."""

    def __init__(self, pattern: str, options: Options):
        self._paths = find_files(pattern, "webdataset")
        self.samples, self.dropped, self.ignored = list_shards(
            self._paths, lambda path, name: read_index(path, name, options), options
        )

    def read(self, sample: Sample) -> bytes:
        """The bytes of the picture; raises `Rejected`."""
        shard, offset, size = sample.location
        return read_part(self._paths[shard], offset, size)


def read_index(path: str, shard: str, options: Options) -> Index:
    """Reads the headers and the captions of a tar file.

    Args:
      path: of the file.
      shard: what the report calls it.
      options: names of the captions, and the fields to keep.
    """
    index = Index([], [], Counter())
    members: dict[str, dict[str, Any]] = {}
    with open_file(path) as file:
        length = file.seek(0, os.SEEK_END)
        file.seek(0)
        try:
            _scan(file, length, shard, members, index)
        except Rejected as error:
            index.dropped.append(Dropped(shard, error.reason, error.detail))
    keys = entries.caption_keys(options)
    for key, parts in members.items():
        name = sample_name(shard, key)
        try:
            index.samples.append(_sample(name, parts, length, keys, options))
        except Rejected as error:
            index.dropped.append(Dropped(name, error.reason, error.detail))
    return index


def _scan(
    file: BinaryIO, length: int, shard: str, members: dict[str, dict[str, Any]], index: Index
) -> None:
    """Collects the parts of every key; raises `Rejected` where the tar file is damaged."""
    archive = None
    try:
        archive = tarfile.open(fileobj=file, mode="r:")
        for member in archive:
            # A negative size would lead around for ever, or read all that follows.
            if member.size < 0 or archive.offset <= member.offset:
                raise ValueError(f"{member.size} bytes in a member")
            folder, base = posixpath.split(member.name)
            stem, _, kind = base.partition(".")
            kind = kind.lower()
            if member.isdir():
                continue
            if kind not in IMAGES + TEXTS or not stem or not member.isreg() or member.issparse():
                index.ignored[f".{kind}" if stem and kind else "other"] += 1
                continue
            if member.name.startswith("/") or ".." in folder.split("/"):
                index.dropped.append(Dropped(f"{shard}/{member.name}", "outside", ""))
                continue
            key = posixpath.join(folder, stem)
            parts = members.setdefault(key, {})
            slot = "image" if kind in IMAGES else kind
            if slot in parts:
                case = Dropped(sample_name(shard, member.name), "duplicate_key", f"of {key}")
                index.dropped.append(case)
            elif slot == "image":
                parts[slot] = (member.offset_data, member.size)
            elif member.size > MAX_TEXT_BYTES:
                parts[slot] = Rejected("bad_caption", f"{member.name} has {member.size} bytes")
            else:
                file.seek(member.offset_data)
                parts[slot] = file.read(member.size)
    except Exception as error:
        # Damaged headers make tarfile raise almost anything (TarError, ValueError, struct.error,
        # ...); one bad file must not end a build, and the report names it.
        where = f" after {archive.offset} bytes" if archive else ""
        raise Rejected("corrupt_shard", f"{type(error).__name__}: {error}{where}") from error
    _check_end(file, archive.offset, length)


def _check_end(file: BinaryIO, offset: int, length: int) -> None:
    """Raises `Rejected` unless the archive ends here: tarfile takes a damaged header for an end."""
    file.seek(offset)
    block = file.read(tarfile.BLOCKSIZE)
    if not block:
        raise Rejected("corrupt_shard", f"no end-of-archive mark, cut off at {length} bytes?")
    while block:
        if block.strip(b"\0"):
            lost = length - offset
            raise Rejected(
                "corrupt_shard", f"no valid header at byte {offset}: {lost} bytes were not read"
            )
        offset += len(block)
        block = file.read(1 << 20)


def _sample(
    name: str, parts: dict[str, Any], length: int, keys: dict[str, str], options: Options
) -> Sample:
    if "image" not in parts:
        raise Rejected("missing", f"captions but no .{', .'.join(IMAGES)}")
    offset, size = parts["image"]
    if offset + size > length:
        raise Rejected("corrupt", f"cut off after {length - offset} of {size} bytes")
    if size > MAX_FILE_BYTES:
        raise Rejected("too_large", f"{size} bytes")
    captions: list[Caption] = []
    fields: dict[str, Any] = {}
    for kind in TEXTS:
        content = parts.get(kind)
        if isinstance(content, Rejected):
            raise content
        if content is None:
            continue
        text = entries.text_of(content, f".{kind}")
        if kind == "txt":
            captions += entries.captions_of(text, "original")
        else:
            entry = entries.parse(text)
            captions += entries.captions_in(entry, keys)
            fields = entries.fields_in(entry, options)
    if not captions:
        raise Rejected("no_caption", f"neither .txt nor {', '.join(keys)} in .json")
    return Sample(
        name, tuple(dict.fromkeys(captions)), size, location=(offset, size), fields=fields
    )
