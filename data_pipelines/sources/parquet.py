"""The source `parquet:GLOB`: tables with a column of pictures and others of captions.

The picture's column is --image_field, or the first of `image jpg jpeg png webp image_bytes bytes`:
bytes, or a struct with `bytes` as Hugging Face writes it. entries.py lists the
columns of captions and scores.

A row is read with its row group, of which a few stay in memory; so row groups have to be small (100
to 1,000 pictures, as is usual for pictures). Needs pyarrow: pip install 'mmdit-jax[parquet]'.
"""

import threading
from collections import Counter, OrderedDict
from collections.abc import Callable, Mapping
from typing import Any

from data_pipelines.samples import Dropped, Options, Rejected, Sample
from data_pipelines.sources import entries
from data_pipelines.sources.sharded import Index, find_files, list_shards, open_file, sample_name

IMAGE_COLUMNS = ("image", "jpg", "jpeg", "png", "webp", "image_bytes", "bytes")
MAX_GROUP_BYTES = 1 << 30
CACHE_BYTES = 256 << 20
"""Row groups in memory, all together; the last two stay in any case."""


class Parquet:
    """The rows of a set of Parquet files."""

    def __init__(self, pattern: str, options: Options):
        try:
            import pyarrow.parquet
        except ImportError as error:
            raise ValueError(
                f"--source=parquet:{pattern} needs pyarrow, which is not installed; "
                "pip install 'mmdit-jax[parquet]'"
            ) from error
        self._parquet = pyarrow.parquet
        self._options = options
        self._paths = find_files(pattern, "parquet")
        self._groups: OrderedDict[tuple[int, int], _Group] = OrderedDict()
        self._lock = threading.Lock()
        self.samples, self.dropped, self.ignored = list_shards(
            self._paths, self._read_index, options
        )

    def _read_index(self, path: str, shard: str) -> Index:
        index = Index([], [], Counter())
        keys = entries.caption_keys(self._options)
        with open_file(path) as file:
            table = self._open(file)
            names = table.schema_arrow.names
            image = self._image_column(names, path)
            others = [n for n in names if n in keys or n != image and self._wanted(n)]
            for group in range(table.num_row_groups):
                size = _column_bytes(table, group, image)
                if size > MAX_GROUP_BYTES:
                    raise ValueError(
                        f"{path} has row groups of {size} bytes and one is read at once; write it "
                        f"again with row groups of at most {MAX_GROUP_BYTES} bytes (100 rows, say)"
                    )
                where = f"{shard} row group {group}"
                if not others:  # a damaged file may count any number of rows
                    index.dropped.append(Dropped(where, "no_caption", f"none of {', '.join(keys)}"))
                    continue
                try:
                    size = sum(_column_bytes(table, group, name) for name in others)
                    if size > MAX_GROUP_BYTES:
                        raise ValueError(f"captions and scores of {size} bytes")
                    rows = table.read_row_group(group, columns=others).to_pylist()
                except Exception as error:  # damaged pages raise what their codec raises
                    index.dropped.append(Dropped(where, "corrupt_shard", str(error)))
                    continue
                for row, entry in enumerate(rows):
                    name = sample_name(shard, f"{group}-{row:06d}")
                    try:
                        told = tuple(dict.fromkeys(entries.captions_in(entry, keys)))
                        if not told:
                            raise Rejected("no_caption", f"nothing in {', '.join(others)}")
                    except Rejected as error:
                        index.dropped.append(Dropped(name, error.reason, error.detail))
                        continue
                    fields = entries.fields_in(entry, self._options)
                    sample = Sample(name, told, location=(group, row), fields=fields)
                    index.samples.append(sample)
        return index

    def _wanted(self, column: str) -> bool:
        return self._options.fields is None or column in self._options.fields

    def _open(self, file: Any) -> Any:
        try:
            return self._parquet.ParquetFile(file)
        except Exception as error:  # a damaged footer raises whatever its bytes say
            raise Rejected("corrupt_shard", f"{type(error).__name__}: {error}") from error

    def _image_column(self, names: list[str], path: str) -> str:
        wanted = (self._options.image_field,) if self._options.image_field else IMAGE_COLUMNS
        found = next((name for name in wanted if name in names), None)
        if found is None:
            raise ValueError(
                f"{path} has the columns {', '.join(names)}, a picture is in "
                f"{' or '.join(wanted)}; name its column with --image_field"
            )
        return found

    def read(self, sample: Sample) -> bytes:
        """The bytes of the picture; raises `Rejected`."""
        shard, group, row = sample.location
        column = self._group(shard, group).value(self._load)
        if row >= len(column):
            raise Rejected("missing", f"row {row} of {len(column)}")
        value = column[row].as_py()
        if isinstance(value, Mapping):
            value = value.get("bytes")
        if not isinstance(value, bytes):
            raise Rejected("missing", f"a {type(value).__name__} instead of the bytes of a picture")
        return value

    def _group(self, shard: int, group: int) -> "_Group":
        with self._lock:
            found = self._groups.setdefault((shard, group), _Group(shard, group))
            self._groups.move_to_end((shard, group))
            while (
                len(self._groups) > 2 and sum(g.size for g in self._groups.values()) > CACHE_BYTES
            ):
                self._groups.popitem(last=False)
        return found

    def _load(self, shard: int, group: int) -> tuple[Any, int]:
        """The column of pictures of a row group, and its bytes."""
        path = self._paths[shard]
        try:
            with open_file(path) as file:
                table = self._open(file)
                image = self._image_column(table.schema_arrow.names, path)
                column = table.read_row_group(group, columns=[image]).column(0)
                return column, column.nbytes
        except Rejected:
            raise
        except Exception as error:  # as above
            raise Rejected("corrupt", f"row group {group}: {error}") from error


def _column_bytes(table: Any, group: int, image: str) -> int:
    """Bytes, unpacked, of a column of a row group; a struct has several leaves."""
    metadata = table.metadata.row_group(group)
    columns = (metadata.column(number) for number in range(metadata.num_columns))
    return sum(
        c.total_uncompressed_size for c in columns if c.path_in_schema.split(".")[0] == image
    )


class _Group:
    """The pictures of one row group, loaded by the first thread that asks."""

    def __init__(self, shard: int, group: int):
        self._place, self._lock, self._column = (shard, group), threading.Lock(), None
        self.size = 0

    def value(self, load: Callable[[int, int], tuple[Any, int]]) -> Any:
        with self._lock:
            if self._column is None:
                self._column, self.size = load(*self._place)
            return self._column
