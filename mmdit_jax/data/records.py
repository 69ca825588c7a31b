"""The shard format: records are msgpack maps of named arrays, shards are ArrayRecord files.

A record describes itself: every array travels with its dtype and shape, so a shard can be read
without the code that wrote it, and reading one never runs code (no pickle). The fields of a sample
are

    latent                  (H, W, C), or (H, W, 2C) for moments
    text/<name>/sequence    (captions, T, width) float16; or int8, or the bits of fp8 as uint8
    text/<name>/scale       (captions, T) float32, of int8 and fp8 (mmdit_jax.encoders.storage)
    text/<name>/pooled      (captions, V) float32, for the encoders that have one
    captions                list of str
    caption_kinds           list of str, "original" or "synthetic", one per caption
    original_size           (2,) int32, height and width in pixels
    crop                    (4,) int32, top, left, height, width in the original
    key                     str, the content hash
    objects                 str, JSON; only the built-in shapes write it

Trimmed text (the manifest says so) holds the valid tokens only, those of all captions one after
another: then sequence is (tokens, width), scale (tokens,), and there is

    text/<name>/length      (captions,) int32, valid tokens of each caption
"""

import contextlib
import functools
import math
import os
import reprlib
import threading
import time
from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import msgpack
import numpy as np
from array_record.python.array_record_module import ArrayRecordReader, ArrayRecordWriter

from mmdit_jax.data.manifest import Shard, file_head, file_sha256
from mmdit_jax.data.record_process import RecordProcess

# What an array may hold. Object and void arrays are absent on purpose: they would need pickle.
DTYPES = {
    name: np.dtype(name).newbyteorder("<")
    for name in (
        "float16 float32 float64 int8 int16 int32 int64 uint8 uint16 uint32 uint64 bool".split()
    )
}

# One record per group makes random access one read; compression saves under 8% on float16 and costs
# half of the reading speed (measured in reliability.md, section 4b).
WRITER_OPTIONS = "group_size:1,uncompressed"
# Random access: no read-ahead and no threads inside the reader read records twice as fast as the
# defaults; a footer of 64 KiB instead of 1 MiB opens a shard three times as fast.
READER_OPTIONS = "readahead_buffer_size:0,max_parallelism:0,footer_prefetch_bytes:65536"
READER_BUFFER = 32768
# Waited before further attempts to read a record, because a network file system fails now and then.
# No longer for a shard that failed them all: its records are damaged, or it is gone.
RETRY_SECONDS = (0.1, 0.5)

# More has no record of ours; less than this no file can make expensive.
MAX_ITEMS = 1 << 16  # fields of a record, captions of a picture
MAX_NAME = 200  # characters of the name of a field
MAX_AXES = 8
MAX_SIDE = (1 << 31) - 1


def encode_record(record: Mapping[str, Any]) -> bytes:
    """Serialises one sample.

    Args:
      record: Field name -> numpy array, str, int, float, or list of str.

    Raises:
      ValueError: A value has another type, an array has a dtype outside `DTYPES` or holds a NaN or
        an infinity; names the field.
    """
    packed = {}
    for field, value in record.items():
        if isinstance(value, np.ndarray):
            name, dtype = _known(value.dtype)
            if dtype is None:
                raise ValueError(
                    f"field {field!r} has dtype {value.dtype}, a record holds {', '.join(DTYPES)}: "
                    "convert it before writing"
                )
            if dtype.kind == "f" and not np.isfinite(value).all():
                raise ValueError(
                    f"field {field!r} has {np.sum(~np.isfinite(value))} values that are not "
                    "finite, training would fail on them: leave the sample out"
                )
            packed[field] = {
                "dtype": name,
                "shape": list(value.shape),
                "data": np.ascontiguousarray(value, dtype).data,
            }
        elif isinstance(value, str | int | float):
            packed[field] = value
        elif isinstance(value, list) and all(isinstance(item, str) for item in value):
            packed[field] = value
        else:
            raise ValueError(
                f"field {field!r} is a {type(value).__name__}, a record holds numpy arrays, str, "
                "int, float and lists of str: convert it before writing"
            )
    return msgpack.packb(packed, use_bin_type=True)


@functools.cache
def _known(dtype: np.dtype) -> tuple[str, np.dtype | None]:
    """The name of a dtype and what a record holds of it; numpy makes the name anew each time."""
    return dtype.name, DTYPES.get(dtype.name)


def decode_record(data: bytes, where: str = "record") -> dict[str, Any]:
    """Reads back what `encode_record` wrote.

    Args:
      data: The bytes of one record.
      where: File and index of the record, for the error message.

    Returns:
      Field name -> value; arrays are read-only views of the unpacked bytes.

    Raises:
      ValueError: The bytes are not such a record; names `where` and the field.
    """
    try:
        packed = msgpack.unpackb(
            data,
            raw=False,
            strict_map_key=True,
            max_array_len=MAX_ITEMS,
            max_map_len=MAX_ITEMS,
            object_pairs_hook=_once,
        )
    except (ValueError, TypeError, msgpack.exceptions.UnpackException) as error:
        raise ValueError(
            f"{where} is not a msgpack record ({error or type(error).__name__}): rebuild the shard"
        ) from error
    if not isinstance(packed, dict):
        raise ValueError(
            f"{where} is a msgpack {type(packed).__name__}, a record is a map: rebuild the shard"
        )
    for field in packed:
        if not isinstance(field, str) or len(field) > MAX_NAME:
            raise ValueError(
                f"{where} has a field {_shown(field)}, a name is text of at most {MAX_NAME} "
                "characters: rebuild the shard"
            )
    return {field: _decode_field(value, field, where) for field, value in packed.items()}


def _once(pairs: Iterable[tuple[Any, Any]]) -> dict[Any, Any]:
    """A map, if no key comes twice: which of the two values would be meant?"""
    pairs = list(pairs)
    packed = dict(pairs)
    if len(packed) != len(pairs):
        raise ValueError("a name comes twice")
    return packed


def _shown(value: Any) -> str:
    """What a message says of a value from a file, however large and nested it is."""
    return reprlib.repr(value)


def _decode_field(value: Any, field: str, where: str) -> Any:
    if isinstance(value, dict):
        if value.keys() != {"dtype", "shape", "data"}:
            raise ValueError(
                f"{where}, field {field!r} has the keys {_shown(list(value))}, "
                "an array has data, dtype and shape: rebuild the shard"
            )
        dtype = DTYPES.get(value["dtype"]) if isinstance(value["dtype"], str) else None
        if dtype is None:
            raise ValueError(
                f"{where}, field {field!r} has dtype {_shown(value['dtype'])}, "
                f"a record holds {', '.join(DTYPES)}: rebuild the shard"
            )
        shape, content = value["shape"], value["data"]
        # Bounded before they are multiplied: the product of a million sizes takes minutes.
        if not (
            isinstance(shape, list)
            and len(shape) <= MAX_AXES
            and all(type(side) is int and 0 <= side <= MAX_SIDE for side in shape)
        ):
            raise ValueError(
                f"{where}, field {field!r} has shape {_shown(shape)}, a shape is a list of at most "
                f"{MAX_AXES} sizes: rebuild the shard"
            )
        needed = math.prod(shape) * dtype.itemsize
        if not isinstance(content, bytes) or len(content) != needed:
            held = f"{len(content)} bytes" if isinstance(content, bytes) else type(content).__name__
            raise ValueError(
                f"{where}, field {field!r} holds {held}, {value['dtype']}{shape} takes "
                f"{needed} bytes: rebuild the shard"
            )
        if dtype.kind == "b" and content.translate(None, b"\0\1"):
            raise ValueError(
                f"{where}, field {field!r} holds bytes that are neither false nor true: "
                "rebuild the shard"
            )
        try:
            return np.frombuffer(content, dtype).reshape(shape)
        except ValueError as error:  # no bytes, and sizes beyond what numpy can count
            raise ValueError(
                f"{where}, field {field!r} has shape {_shown(shape)} ({error}): rebuild the shard"
            ) from error
    if isinstance(value, str | int | float):
        return value
    if isinstance(value, list) and all(isinstance(item, str) for item in value):
        return value
    raise ValueError(
        f"{where}, field {field!r} is a {type(value).__name__}, a record holds arrays, str, int, "
        "float and lists of str: rebuild the shard"
    )


class ShardWriter:
    """Writes one shard; the file appears under its name only when it is complete.

    >>> with ShardWriter(directory, "train-00000.arrayrecord", bucket=0) as writer:
    ...     writer.write(record)
    >>> manifest_entry = writer.shard
    """

    def __init__(
        self, directory: str | os.PathLike, file: str, *, bucket: int = 0, process: bool = False
    ):
        """Args: directory of the data set, name of the shard in it, index of its bucket; whether a
        process of its own writes it: other threads go on meanwhile, and it outlives a power failure
        once it is closed (mmdit_jax.data.record_process)."""
        self._path = Path(directory) / file
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._partial = self._path.with_name(self._path.name + ".partial")
        self._writer = (RecordProcess if process else ArrayRecordWriter)(
            str(self._partial), WRITER_OPTIONS
        )
        self._file, self._bucket, self._records = file, bucket, 0
        self.shard: Shard | None = None

    def write(self, record: Mapping[str, Any] | bytes) -> None:
        """Appends one sample: its fields, or the bytes that `encode_record` made of them."""
        self._writer.write(record if isinstance(record, bytes) else encode_record(record))
        self._records += 1

    def close(self) -> Shard:
        """Finishes the file, hashes it, gives it its name; returns its entry in the manifest."""
        sha256 = self._writer.close() or file_sha256(self._partial)
        size, head = self._partial.stat().st_size, file_head(self._partial)
        os.replace(self._partial, self._path)
        self.shard = Shard(self._file, self._bucket, self._records, size, sha256, head)
        return self.shard

    def __enter__(self) -> "ShardWriter":
        return self

    def __exit__(self, kind, value, traceback) -> None:
        try:
            if kind is None:
                self.close()
            else:
                # After a full disk, closing fails as well; the first error is the one to report.
                with contextlib.suppress(RuntimeError):
                    self._writer.close()
        finally:
            self._partial.unlink(missing_ok=True)  # a finished one has another name


class ShardReader:
    """Random access to the records of many shards, from many threads.

    Shards are opened when first needed. At most `open_shards` stay open (each one is a file
    descriptor and an index in memory); the one unused for longest is dropped.
    """

    def __init__(self, directory: str | os.PathLike, shards: Sequence[Shard], open_shards: int):
        """Args: directory of the data set, its shards, how many of them may be open."""
        self._paths = [os.path.join(directory, shard.file) for shard in shards]
        self._shards, self._limit = shards, open_shards
        self._readers: OrderedDict[int, ArrayRecordReader] = OrderedDict()
        self._failed: set[int] = set()
        self._lock = threading.Lock()

    def where(self, shard: int, index: int) -> str:
        """Names a record in an error message."""
        return f"{self._paths[shard]} record {index}"

    def read(self, shard: int, index: int) -> bytes:
        """The bytes of record `index` of shard number `shard`.

        Raises:
          ValueError: The shard cannot be opened or has lost records, or the record fails its
            checksum.
        """
        waits = [0.0, *([] if shard in self._failed else RETRY_SECONDS)]
        reader_of = self._reader
        while True:
            try:
                return reader_of(shard).read([index])[0]
            except (ValueError, RuntimeError, IndexError, OSError) as error:
                if not waits:
                    self._failed.add(shard)
                    raise ValueError(
                        f"{self.where(shard, index)} is damaged ({error}): "
                        "copy the shard again or rebuild it"
                    ) from error
            # Further attempts open the file again, and share the reader with no other thread: that
            # one may have failed in it.
            with self._lock:
                self._readers.pop(shard, None)
            reader_of = self._open
            time.sleep(waits.pop(0))

    def _reader(self, shard: int) -> ArrayRecordReader:
        with self._lock:
            if shard in self._readers:
                self._readers.move_to_end(shard)
                return self._readers[shard]
        # Opened without the lock, so that a slow file system opens many at a time. When two threads
        # open the same shard, the later one is kept.
        reader = self._open(shard)
        with self._lock:
            self._readers[shard] = reader
            self._readers.move_to_end(shard)
            while len(self._readers) > self._limit:
                # Not closed: another thread may be reading from it. It closes with its last
                # reference.
                self._readers.popitem(last=False)
        return reader

    def _open(self, shard: int) -> ArrayRecordReader:
        path, expected = self._paths[shard], self._shards[shard].records
        reader = ArrayRecordReader(path, READER_OPTIONS, file_reader_buffer_size=READER_BUFFER)
        # A missing or truncated file does not raise: it opens as a shard with 0 records.
        if reader.num_records() != expected:
            raise ValueError(
                f"{path} has {reader.num_records()} readable records, the manifest counts "
                f"{expected}: copy the shard again or rebuild it"
            )
        return reader
