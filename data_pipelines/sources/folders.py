"""The source `folder:DIR`: images, searched for recursively, with captions beside them.

Captions stand in `captions.jsonl` (or `metadata.jsonl`), in any folder of the tree, one JSON object
a line, paths relative to that folder; several lines for one picture add up:

    {"file": "cats/0001.jpg", "caption": "a cat on a mat", "synthetic_caption": "A grey cat ..."}

(entries.py lists the keys) or, for a picture that no such line names, in a `.txt` of
the same name beside it (the whole file is one caption). Samples come in sorted order, so that two
builds see the same list.
"""

import os
import posixpath
import stat
from collections import Counter
from collections.abc import Iterator
from typing import Any

from data_pipelines.samples import Caption, Dropped, Options, Rejected, Sample
from data_pipelines.sources import entries

IMAGE_EXTENSIONS = frozenset(
    ".avif .bmp .gif .heic .heif .jfif .jp2 .jpe .jpeg .jpg .png .ppm .tif .tiff .webp".split()
)
CAPTION_FILES = ("captions.jsonl", "metadata.jsonl")
MAX_FILE_BYTES = 1 << 30


class Folder:
    """The images of a folder and of the folders in it, with their captions."""

    def __init__(self, directory: str, options: Options):
        if "://" in directory:
            raise ValueError(
                f"--source=folder:{directory} is remote; remote pictures are read by jsonl:, "
                "webdataset: and parquet:"
            )
        if not os.path.isdir(directory):
            raise ValueError(
                f"--source=folder:{directory} is not a folder; give the one that holds the images"
            )
        self._root = os.path.abspath(directory)
        self.dropped: list[Dropped] = []
        self.ignored: Counter[str] = Counter()
        files = set(self._files(options.exclude))
        if not any(_is_image(name) for name in files):
            raise ValueError(
                f"--source=folder:{directory} holds no image; "
                f"put files ending in {', '.join(sorted(IMAGE_EXTENSIONS))} there"
            )
        self._fields: dict[str, dict[str, Any]] = {}
        captions = self._captions(files, options)
        used = set(captions)
        self.samples = []
        for name in sorted(used | {name for name in files if _is_image(name)}):
            try:
                self.samples.append(self._sample(name, captions, files, used))
            except Rejected as error:
                self.dropped.append(Dropped(name, error.reason, error.detail))
        for name in files - used:
            if not _is_image(name) and posixpath.basename(name) not in CAPTION_FILES:
                self.ignored[posixpath.splitext(name)[1].lower() or "no extension"] += 1

    def _files(self, exclude: str) -> Iterator[str]:
        """Paths of the files, relative, with "/"; hidden ones are counted as ignored."""

        def unreadable(error: OSError) -> None:
            name = os.path.relpath(error.filename, self._root)
            self.dropped.append(Dropped(name, "unreadable", error.strerror or str(error)))

        seen = {os.path.realpath(exclude)} if exclude else set()
        walk = os.walk(self._root, followlinks=True, onerror=unreadable)
        for directory, folders, names in walk:
            real = os.path.realpath(directory)
            if real in seen:  # the output folder, or a link back to where we have been
                folders.clear()
                continue
            seen.add(real)
            folders[:] = sorted(name for name in folders if not name.startswith("."))
            for name in names:
                if name.startswith("."):
                    self.ignored["hidden"] += 1
                else:
                    path = os.path.relpath(os.path.join(directory, name), self._root)
                    yield path.replace(os.sep, "/")

    def _captions(self, files: set[str], options: Options) -> dict[str, list[Caption]]:
        """Picture -> the captions that caption files give it; fills `_fields` likewise."""
        found: dict[str, list[Caption]] = {}
        keys = entries.caption_keys(options)
        for file in sorted(files):
            if posixpath.basename(file) not in CAPTION_FILES:
                continue
            try:
                lines = _text(os.path.join(self._root, file)).split("\n")
            except Rejected as error:
                self.dropped.append(Dropped(file, error.reason, error.detail))
                continue
            for number, line in enumerate(lines, start=1):
                if not line.strip():
                    continue
                try:
                    entry = entries.parse(line)
                    name = inside(self._root, posixpath.dirname(file), entry, options)
                    found.setdefault(name, []).extend(entries.captions_in(entry, keys))
                    if fields := entries.fields_in(entry, options):
                        self._fields.setdefault(name, {}).update(fields)
                except Rejected as error:
                    where = f"{file} line {number}"
                    self.dropped.append(Dropped(where, error.reason, error.detail))
        return found

    def _sample(
        self, name: str, captions: dict[str, list[Caption]], files: set[str], used: set[str]
    ) -> Sample:
        size = file_size(os.path.join(self._root, name))
        beside = posixpath.splitext(name)[0] + ".txt"
        told = captions.get(name)
        if told is None and beside in files:
            used.add(beside)
            told = entries.captions_of(_text(os.path.join(self._root, beside)), "original")
        if not told:
            raise Rejected("no_caption", f"neither {CAPTION_FILES[0]} nor {beside} has one")
        fields = self._fields.get(name, {})
        return Sample(name, tuple(dict.fromkeys(told)), bytes=size, fields=fields)

    def read(self, sample: Sample) -> bytes:
        """The bytes of the file; raises `Rejected`."""
        return read_file(os.path.join(self._root, sample.name))


def file_size(path: str) -> int:
    """Bytes of a regular file; raises `Rejected` for what cannot be an image file."""
    try:
        status = os.stat(path)
    except FileNotFoundError as error:
        raise Rejected("missing", error.strerror) from error
    except OSError as error:
        raise Rejected("unreadable", str(error.strerror)) from error
    if not stat.S_ISREG(status.st_mode):
        raise Rejected("unreadable", "not a regular file")
    if status.st_size > MAX_FILE_BYTES:
        raise Rejected("too_large", f"{status.st_size} bytes")
    return status.st_size


def read_file(path: str) -> bytes:
    """The bytes of a regular file of at most `MAX_FILE_BYTES`; raises `Rejected`."""
    try:
        with open(path, "rb", opener=_at_once) as file:
            status = os.fstat(file.fileno())
            if not stat.S_ISREG(status.st_mode):
                raise Rejected("unreadable", "not a regular file")
            if status.st_size > MAX_FILE_BYTES:
                raise Rejected("too_large", f"more than {MAX_FILE_BYTES} bytes")
            # Not MAX_FILE_BYTES: memory for as much as is asked for is mapped, and cut again.
            return file.read(status.st_size)
    except OSError as error:
        raise Rejected("unreadable", str(error.strerror)) from error


def _at_once(path: str, flags: int) -> int:
    """Opens a file, and a pipe without waiting for somebody to write into it."""
    return os.open(path, flags | os.O_NONBLOCK)


def inside(root: str, folder: str, entry: dict[str, Any], options: Options) -> str:
    """The picture that an entry names, relative to `root`; raises `Rejected`.

    The path is judged as written: a link inside the folder may lead where it likes (download
    caches are made of links), a path that climbs out of the folder may not.

    Args:
      folder: the folder, relative to the root, that a relative path starts from.
    """
    keys = (options.image_field,) if options.image_field else entries.FILE_KEYS
    file = next((entry[key] for key in keys if key in entry), None)
    if not isinstance(file, str) or not file or "\0" in file:
        raise Rejected("bad_caption", f"needs one of {', '.join(keys)}, a path")
    if posixpath.isabs(file):
        name = posixpath.relpath(file, root)
    else:
        name = posixpath.normpath(posixpath.join(folder, file))
    if name == ".." or name.startswith("../"):
        raise Rejected("outside", file)
    try:
        os.fsencode(name)
    except UnicodeEncodeError as error:
        raise Rejected("bad_caption", "half of a surrogate pair in the path") from error
    return name


def _is_image(name: str) -> bool:
    return posixpath.splitext(name)[1].lower() in IMAGE_EXTENSIONS


def _text(path: str) -> str:
    return entries.text_of(read_file(path), os.path.basename(path))
