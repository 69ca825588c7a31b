"""Records come back as they were written, and damage is named."""

import concurrent.futures
import hashlib
import itertools
import pickle
import subprocess
import sys

import msgpack
import numpy as np
import pytest
from array_record.python.array_record_module import ArrayRecordReader

from mmdit_jax.data import records
from mmdit_jax.data.manifest import Shard
from mmdit_jax.data.record_process import RecordProcess
from mmdit_jax.data.records import (
    DTYPES,
    ShardReader,
    ShardWriter,
    decode_record,
    encode_record,
)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(2, 3, 4), (5,), (0, 3), ()])
def test_arrays_round_trip_exactly(dtype, shape):
    array = np.random.default_rng(0).integers(0, 2, shape).astype(dtype)
    back = decode_record(encode_record({"x": array}))["x"]
    assert back.dtype == np.dtype(dtype) and back.shape == shape
    np.testing.assert_array_equal(back, array)


def test_strided_and_big_endian_arrays_round_trip():
    array = np.arange(24, dtype=">f4").reshape(4, 6)[::2, ::-3]
    np.testing.assert_array_equal(decode_record(encode_record({"x": array}))["x"], array)


def test_other_values_round_trip():
    record = {"key": "é", "captions": ["a", ""], "none": [], "count": -3, "share": 0.5}
    assert decode_record(encode_record(record)) == record


def test_decoded_arrays_are_read_only_views():
    back = decode_record(encode_record({"x": np.ones((4, 4), np.float16)}))["x"]
    assert not back.flags.owndata and not back.flags.writeable


@pytest.mark.parametrize(
    "value, rule",
    [
        (np.array([object()]), "dtype object"),
        (np.array(["a"]), "dtype <U1"),
        (np.ones(2, np.complex64), "dtype complex64"),
        (np.array([1.0, np.nan, np.inf]), "2 values that are not finite"),
        ({"a": 1}, "is a dict"),
        (["a", 1], "is a list"),
        (b"raw", "is a bytes"),
    ],
)
def test_what_a_record_cannot_hold_is_refused_by_field(value, rule):
    with pytest.raises(ValueError, match=rule) as error:
        encode_record({"fine": "x", "latent": value})
    assert "field 'latent'" in str(error.value)


class _Trap:
    def __reduce__(self):
        return (pytest.fail, ("a pickle was executed",))


@pytest.mark.parametrize(
    "data",
    [
        pickle.dumps(_Trap()),
        b"",
        b"\xc1",
        encode_record({"x": np.ones(9)})[:-1],
        b"\x93\x01\x02\x03",
    ],
    ids=["pickle", "empty", "reserved byte", "truncated", "a list"],
)
def test_bytes_that_are_no_record_are_refused(data):
    with pytest.raises(ValueError, match="^shard-7 record 3 is "):
        decode_record(data, "shard-7 record 3")


def _array(**changes):
    return {"dtype": "float16", "shape": [2], "data": b"\0" * 4} | changes


@pytest.mark.parametrize(
    "value, rule",
    [
        (_array(dtype="object"), "dtype 'object'"),
        (_array(dtype="O"), "dtype 'O'"),
        (_array(dtype=["f2"]), "dtype"),
        (_array(shape=[3]), "holds 4 bytes, float16\\[3\\] takes 6"),
        (_array(shape=[-1]), "shape"),
        (_array(shape=2), "shape"),
        (_array(data="text"), "holds str"),
        ({"dtype": "float16"}, "has the keys"),
        (msgpack.ExtType(1, b"x"), "is a ExtType"),
        (msgpack.Timestamp(1), "is a Timestamp"),
        (None, "is a NoneType"),
    ],
)
def test_a_damaged_field_is_named(value, rule):
    data = msgpack.packb({"key": "k", "latent": value})
    with pytest.raises(ValueError, match=rule) as error:
        decode_record(data, "shard-7 record 3")
    assert "shard-7 record 3, field 'latent'" in str(error.value)


def _write(directory, file, values):
    with ShardWriter(directory, file, bucket=1) as writer:
        for value in values:
            writer.write({"x": np.full(1000, value, np.int32)})
    return writer.shard


def _value(reader, shard, index):
    return decode_record(reader.read(shard, index))["x"][0]


def test_a_shard_entry_describes_the_file(tmp_path):
    shard = _write(tmp_path / "new", "a.arrayrecord", range(7))
    content = (tmp_path / "new" / "a.arrayrecord").read_bytes()
    whole, head = (
        hashlib.sha256(part).hexdigest() for part in (content, content[:4096] + content[-65536:])
    )
    assert shard == Shard("a.arrayrecord", 1, 7, len(content), whole, head)
    options = ArrayRecordReader(str(tmp_path / "new" / "a.arrayrecord")).writer_options_string()
    assert "group_size:1," in options and "uncompressed" in options


def test_a_shard_appears_only_when_it_is_complete(tmp_path):
    with pytest.raises(KeyError), ShardWriter(tmp_path, "a") as writer:
        writer.write({"x": np.ones(3)})
        assert not (tmp_path / "a").exists()
        raise KeyError
    assert list(tmp_path.iterdir()) == []


def test_another_process_writes_the_same_bytes(tmp_path):
    records = [{"x": np.full(size, 7, np.uint8)} for size in (0, 3, 70_000, 40 << 20, 40 << 20, 9)]
    shards = []
    for process in (False, True):
        with ShardWriter(tmp_path / str(process), "a", process=process) as writer:
            for record in records:
                writer.write(record)
        shards.append(writer.shard)
    assert shards[0] == shards[1]
    content = [(tmp_path / str(process) / "a").read_bytes() for process in (False, True)]
    assert content[0] == content[1]
    assert hashlib.sha256(content[1]).hexdigest() == shards[1].sha256


def test_a_shard_of_another_process_appears_only_when_it_is_complete(tmp_path):
    with pytest.raises(KeyError), ShardWriter(tmp_path, "a", process=True) as writer:
        writer.write({"x": np.ones(3)})
        assert [path.name for path in tmp_path.iterdir()] == ["a.partial"]
        raise KeyError
    assert list(tmp_path.iterdir()) == []


LIMITED = """
import resource, signal, sys
import numpy as np
from mmdit_jax.data.records import ShardWriter

signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))
with ShardWriter(sys.argv[1], "a", process=True) as writer:
    for _ in range(int(sys.argv[2])):
        writer.write({"x": np.ones(1 << 18, np.uint8)})
"""


@pytest.mark.parametrize("count", [5, 50])
def test_a_file_that_cannot_grow_fails_with_the_reason_and_leaves_nothing(tmp_path, count):
    command = [sys.executable, "-c", LIMITED, str(tmp_path), str(count)]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    assert done.returncode == 1
    assert "RuntimeError: the process that writes" in done.stderr
    assert "File too large" in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_a_writing_process_that_dies_is_named(tmp_path):
    with (
        pytest.raises(RuntimeError, match=r"writes .*a.partial failed: status -9"),
        ShardWriter(tmp_path, "a", process=True) as writer,
    ):
        writer._writer._process.kill()
        writer._writer._process.wait()
        for _ in range(100):
            writer.write({"x": np.ones(1 << 18, np.uint8)})
    assert list(tmp_path.iterdir()) == []


def test_a_file_without_its_end_stays_unfinished(tmp_path):
    writer = RecordProcess(str(tmp_path / "a"), "group_size:1,uncompressed")
    writer.write(b"1" * 1000)
    writer._process.stdin.close()  # as when the process that writes the records is killed
    writer._process.wait()
    assert ArrayRecordReader(str(tmp_path / "a")).num_records() == 0


def test_few_open_shards_serve_many_threads(tmp_path):
    shards = [_write(tmp_path, f"{s}", range(10 * s, 10 * s + 10)) for s in range(6)]
    reader = ShardReader(tmp_path, shards, open_shards=2)
    wanted = np.random.default_rng(0).integers(0, 60, 2000)
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        read = list(pool.map(lambda n: _value(reader, int(n) // 10, int(n) % 10), wanted))
    np.testing.assert_array_equal(read, wanted)
    assert len(reader._readers) == 2


def test_a_flipped_byte_names_shard_and_record(tmp_path):
    shard = _write(tmp_path, "a.arrayrecord", range(5))
    path = tmp_path / "a.arrayrecord"
    content = bytearray(path.read_bytes())
    content[content.index(np.full(1000, 3, np.int32).tobytes()) + 1234] ^= 1
    path.write_bytes(content)
    reader = ShardReader(tmp_path, [shard], 4)
    assert [_value(reader, 0, index) for index in (0, 1, 2, 4)] == [0, 1, 2, 4]
    with pytest.raises(ValueError, match="a.arrayrecord record 3 is damaged"):
        reader.read(0, 3)
    assert [_value(reader, 0, index) for index in (0, 1, 2, 4)] == [0, 1, 2, 4]


class _Failing:
    """An ArrayRecordReader of a file system that fails now and then, or loses a file."""

    fails = iter(())

    def __init__(self, *arguments, **settings):
        self._reader = ArrayRecordReader(*arguments, **settings)

    def num_records(self):
        return 0 if next(self.fails, None) == "open" else self._reader.num_records()

    def read(self, indices):
        if next(self.fails, None) == "read":
            raise OSError(5, "Input/output error")
        return self._reader.read(indices)


def test_a_file_system_that_fails_now_and_then_is_asked_again(tmp_path, monkeypatch):
    shard = _write(tmp_path, "a.arrayrecord", range(5))
    waited = []
    monkeypatch.setattr(records, "RETRY_SECONDS", (0.1, 0.5))
    monkeypatch.setattr(records, "ArrayRecordReader", _Failing)
    monkeypatch.setattr(records.time, "sleep", waited.append)
    reader = ShardReader(tmp_path, [shard], 4)
    _Failing.fails = iter(["open", "", "", "read"])
    assert _value(reader, 0, 3) == 3 and waited == [0.0, 0.1]
    _Failing.fails = itertools.repeat("open")
    for _ in range(4):  # given up: it does not hold up every record of the shard
        with pytest.raises(ValueError, match="a.arrayrecord record 3 is damaged.*0 readable"):
            reader.read(0, 3)
    assert waited == [0.0, 0.1, 0.0, 0.1, 0.5, 0.0, 0.0, 0.0]
    _Failing.fails = iter(())  # it came back
    assert _value(reader, 0, 3) == 3


def test_lost_records_are_an_error_and_not_an_empty_shard(tmp_path):
    shards = [_write(tmp_path, file, range(5)) for file in ("cut", "gone", "other")]
    (tmp_path / "cut").write_bytes((tmp_path / "cut").read_bytes()[:-5000])
    (tmp_path / "gone").unlink()
    _write(tmp_path, "other", range(4))
    reader = ShardReader(tmp_path, shards, 4)
    for number, shard in enumerate(shards):
        with pytest.raises(ValueError, match=f"{shard.file} has . readable records.* counts 5"):
            reader.read(number, 0)
