"""The source `folder:DIR`: images, searched for recursively, with captions beside them.

Captions stand in `captions.jsonl` (or `metadata.jsonl`), in any folder of the tree, one JSON object
a line, paths relative to that folder; several lines for one picture add up:

    {"file": "cats/0001.jpg", "caption": "a cat on a mat", "synthetic_caption": "A grey cat ..."}

    file | file_name | image                             the picture
    caption | text | captions                            written by people: a string or a list
    synthetic | synthetic_caption | synthetic_captions   written by a captioning model: likewise

or, for a picture that no such line names, in a `.txt` of the same name beside it (the whole file is
one caption). Samples come in sorted order, so that two builds see the same list.
"""

import json
import os
import posixpath
import stat
from collections import Counter
from collections.abc import Iterator

from data_pipelines.samples import Caption, Dropped, Options, Rejected, Sample

IMAGE_EXTENSIONS = frozenset(
    ".avif .bmp .gif .heic .heif .jfif .jp2 .jpe .jpeg .jpg .png .ppm .tif .tiff .webp".split()
)
CAPTION_FILES = ("captions.jsonl", "metadata.jsonl")
FILE_KEYS = ("file", "file_name", "image")
CAPTION_KEYS = {
    "caption": "original",
    "text": "original",
    "captions": "original",
    "synthetic": "synthetic",
    "synthetic_caption": "synthetic",
    "synthetic_captions": "synthetic",
}
MAX_FILE_BYTES = 1 << 30


class Folder:
    """The images of a folder and of the folders in it, with their captions."""

    def __init__(self, directory: str, options: Options):
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
        captions = self._captions(files)
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

    def _captions(self, files: set[str]) -> dict[str, list[Caption]]:
        """Picture -> the captions that caption files give it."""
        found: dict[str, list[Caption]] = {}
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
                    entry = _entry(line)
                    name = self._inside(posixpath.dirname(file), entry)
                    found.setdefault(name, []).extend(_entry_captions(entry))
                except Rejected as error:
                    where = f"{file} line {number}"
                    self.dropped.append(Dropped(where, error.reason, error.detail))
        return found

    def _inside(self, folder: str, entry: dict) -> str:
        """The picture that a line names, relative to the root.

        The path is judged as written: a link inside the folder may lead where it likes (download
        caches are made of links), a path that climbs out of the folder may not.
        """
        file = next((entry[key] for key in FILE_KEYS if key in entry), None)
        if not isinstance(file, str) or not file or "\0" in file:
            raise Rejected("bad_caption", f"needs one of {', '.join(FILE_KEYS)}, a path")
        if posixpath.isabs(file):
            name = posixpath.relpath(file, self._root)
        else:
            name = posixpath.normpath(posixpath.join(folder, file))
        if name == ".." or name.startswith("../"):
            raise Rejected("outside", file)
        return name

    def _sample(
        self, name: str, captions: dict[str, list[Caption]], files: set[str], used: set[str]
    ) -> Sample:
        path = os.path.join(self._root, name)
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
        beside = posixpath.splitext(name)[0] + ".txt"
        told = captions.get(name)
        if told is None and beside in files:
            used.add(beside)
            told = _captions_of(_text(os.path.join(self._root, beside)), "original")
        if not told:
            raise Rejected("no_caption", f"neither {CAPTION_FILES[0]} nor {beside} has one")
        return Sample(name, tuple(dict.fromkeys(told)), bytes=status.st_size)

    def read(self, sample: Sample) -> bytes:
        """The bytes of the file; raises `Rejected`."""
        try:
            with open(os.path.join(self._root, sample.name), "rb") as file:
                return file.read()
        except OSError as error:
            raise Rejected("unreadable", str(error.strerror)) from error


def _is_image(name: str) -> bool:
    return posixpath.splitext(name)[1].lower() in IMAGE_EXTENSIONS


def _text(path: str) -> str:
    """A UTF-8 text file, with or without a byte order mark."""
    try:
        with open(path, encoding="utf-8-sig") as file:
            return file.read()
    except OSError as error:
        raise Rejected("unreadable", str(error.strerror)) from error
    except UnicodeDecodeError as error:
        raise Rejected("bad_caption", f"{os.path.basename(path)} is not UTF-8 text") from error


def _entry(line: str) -> dict:
    try:
        entry = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise Rejected("bad_caption", f"not JSON: {error}") from error
    if not isinstance(entry, dict):
        raise Rejected("bad_caption", f"a JSON {type(entry).__name__}, each line is an object")
    return entry


def _entry_captions(entry: dict) -> list[Caption]:
    captions = []
    for key, kind in CAPTION_KEYS.items():
        value = entry.get(key)
        if value is None:
            continue
        for text in value if isinstance(value, list) else [value]:
            if not isinstance(text, str):
                raise Rejected("bad_caption", f"{key} holds a {type(text).__name__}")
            captions += _captions_of(text, kind)
    return captions


def _captions_of(text: str, kind: str) -> list[Caption]:
    text = text.strip()
    try:
        text.encode("utf-8")  # JSON can spell half a surrogate pair, which no record can hold
    except UnicodeEncodeError as error:
        raise Rejected("bad_caption", "half of a surrogate pair in the text") from error
    return [Caption(text, kind)] if text else []
