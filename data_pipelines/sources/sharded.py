"""Sources that keep many pictures in one file: finding the files, and a note of what is in each.

Listing a large set means reading all of it once. What was found in a file is noted in the output
folder, so that a build that is run again lists the set in seconds; a file of another size or time
is read again.

This is the one place where remote files are opened, with the file systems of fsspec: `gs://` needs
gcsfs, `s3://` needs s3fs, `https://` needs aiohttp, `memory://` nothing.
"""

import glob
import hashlib
import json
import os
import posixpath
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import fsspec

from data_pipelines.progress import Progress
from data_pipelines.samples import Caption, Dropped, Options, Rejected, Sample
from data_pipelines.sources.folders import MAX_FILE_BYTES, file_size, read_file
from data_pipelines.write import write_json

THREADS = 16  # files that are listed at once: a remote one waits, a local one computes


class Index(NamedTuple):
    """What a file holds; the `location` of a sample is its place in this file."""

    samples: list[Sample]
    dropped: list[Dropped]
    ignored: Counter[str]


def is_remote(path: str) -> bool:
    """Whether a path is a URL (gs://, s3://, ...) rather than a local file."""
    return "://" in path


def _file_system(path: str) -> Any:
    """The file system of fsspec that serves a URL, of which there is one in a process.

    Raises:
      ValueError: none is known or installed for it, or it cannot be reached.
    """
    scheme = path.partition("://")[0]
    try:
        return fsspec.filesystem(scheme)
    except ImportError as error:
        raise ValueError(f"{path}: {error}; or copy the files to this machine") from error
    except ValueError as error:
        raise ValueError(
            f"{path}: fsspec knows no {scheme}://; use gs://, s3://, https:// or a local path"
        ) from error


def open_file(path: str) -> BinaryIO:
    """Opens a local or remote file for reading."""
    return _file_system(path).open(path, "rb") if is_remote(path) else open(path, "rb")


def _version(path: str) -> list[Any]:
    """Size of a file and what changes when it does, JSON-able."""
    if not is_remote(path):
        status = os.stat(path)
        return [int(status.st_size), float(status.st_mtime)]
    about = _file_system(path).info(path)  # with a time, an ETag or a generation
    told = repr(sorted((str(key), str(value)) for key, value in about.items()))
    return [about["size"], hashlib.sha256(told.encode()).hexdigest()]


def read_whole(path: str) -> bytes:
    """The bytes of a local or remote file of at most `MAX_FILE_BYTES`; raises `Rejected`."""
    if not is_remote(path):
        file_size(path)  # says what is missing
        return read_file(path)
    try:
        with open_file(path) as file:
            data = file.read(MAX_FILE_BYTES + 1)
    except OSError as error:
        missing = isinstance(error, FileNotFoundError)
        raise Rejected(
            "missing" if missing else "unreadable", error.strerror or str(error)
        ) from error
    if len(data) > MAX_FILE_BYTES:
        raise Rejected("too_large", f"more than {MAX_FILE_BYTES} bytes")
    return data


def read_part(path: str, offset: int, size: int) -> bytes:
    """`size` bytes of a local or remote file; raises `Rejected`."""
    try:
        with open_file(path) as file:
            file.seek(offset)
            data = file.read(size)
    except OSError as error:
        raise Rejected("unreadable", error.strerror or str(error)) from error
    if len(data) != size:
        raise Rejected("corrupt", f"cut off after {len(data)} of {size} bytes")
    return data


def find_files(pattern: str, source: str) -> list[str]:
    """The files that a glob pattern names, sorted; `**` is any number of folders.

    Raises:
      ValueError: there is none.
    """
    if is_remote(pattern):
        system = _file_system(pattern)
        found = [system.unstrip_protocol(path) for path in system.glob(pattern)]
    else:
        found = [path for path in glob.glob(pattern, recursive=True) if os.path.isfile(path)]
    if not found:
        raise ValueError(
            f"--source={source}:{pattern} matches no file; give a file or a quoted pattern such as "
            "'DIR/*' (* ? [] **, no braces)"
        )
    return sorted(found)


def short_names(paths: Sequence[str]) -> list[str]:
    """The paths without the folders that they share: unique, and the same wherever the set is."""
    shared = os.path.commonprefix(list(paths))
    return [path[shared.rfind("/") + 1 :] for path in paths]


def list_shards(
    paths: Sequence[str], read_index: Callable[[str, str], Index], options: Options
) -> Index:
    """What all files hold, in their order; a sample's location begins with the file's number.

    Args:
      paths: of the files.
      read_index: path and name of a file -> its contents; the names of samples begin with it. May
        raise `Rejected` for a file of which nothing can be read.
      options: `index` is the folder of the notes; each process of `job` lists its part of the files
        and takes the rest from the notes of the others.
    """
    folder = Path(options.index) if options.index else None
    if folder:
        folder.mkdir(parents=True, exist_ok=True)

    def listed(number: int, path: str, name: str) -> dict[str, Any]:
        note = folder / f"{number:06d}.json" if folder else None
        try:
            shard = [path, *_version(path)]
            if note and note.exists():
                content = json.loads(note.read_text(encoding="utf-8"))
                if content["shard"] == shard:
                    return content
            index = read_index(path, name)
            rows = [[s.name, s.captions, s.bytes, s.location, s.fields] for s in index.samples]
            content = {"shard": shard, "samples": rows, "dropped": index.dropped}
            content["ignored"] = dict(index.ignored)
        except Rejected as error:
            content = _nothing(name, error.reason, error.detail)
        except OSError as error:
            content = _nothing(name, "unreadable", error.strerror or str(error))
        if note:
            write_json(note, content, indent=None)
        return content

    found, job = Index([], [], Counter()), options.job
    names = short_names(paths)
    if folder and job.processes > 1:
        notes = [folder / f"{number:06d}.json" for number in range(len(paths))]
        mine = [number for number in range(len(paths)) if job.mine(number)]
        with ThreadPoolExecutor(THREADS) as pool:
            list(pool.map(lambda number: listed(number, paths[number], names[number]), mine))
        others = (number for number in range(len(paths)) if not job.mine(number))
        job.wait("listing", others, lambda number: notes[number].exists())
    with (
        ThreadPoolExecutor(THREADS) as pool,
        Progress("listing", len(paths), unit="files") as progress,
    ):
        contents = pool.map(listed, range(len(paths)), paths, names)
        for number, content in enumerate(contents):
            for name, captions, size, location, fields in content["samples"]:
                told = tuple(Caption(*caption) for caption in captions)
                place = (number, *location)
                found.samples.append(Sample(name, told, size, location=place, fields=fields))
            found.dropped.extend(Dropped(*case) for case in content["dropped"])
            found.ignored.update(content["ignored"])
            progress.advance()
    return found


def _nothing(name: str, reason: str, detail: str) -> dict[str, Any]:
    # Noted, so that no other process waits for it, but not trusted: the file is read again.
    return {"shard": None, "samples": [], "dropped": [[name, reason, detail]], "ignored": {}}


def sample_name(shard: str, key: str) -> str:
    """What a sample of a shard is called in the report."""
    return posixpath.join(shard, key)
