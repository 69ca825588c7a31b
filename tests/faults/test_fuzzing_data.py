"""Damaged and forged records, shards and manifests: refused in one line, or accepted and then sane.

The short form runs on every test; `-m slow` runs the long one, 10,000 inputs and more a target.
"""

import json
import os
import random

import msgpack
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mmdit_jax.data import records
from mmdit_jax.data.loader import Loader
from mmdit_jax.data.manifest import Manifest, file_sha256
from mmdit_jax.data.records import DTYPES, ShardReader, ShardWriter, decode_record, encode_record
from mmdit_jax.data.sample_fields import check_sample
from tests.data.making import TEXT, TOKENS, build, record_of
from tests.faults.mutations import few, fuzz, mutated_bytes, mutated_json, sizes, time_limit


def record(number=1):
    return record_of(number, 4, 4, 2, 3, TEXT, TOKENS)


# Records


def is_record(fields):
    """What every accepted record is, whatever its bytes were."""
    for name, value in fields.items():
        assert isinstance(name, str)
        if isinstance(value, np.ndarray):
            assert value.dtype in DTYPES.values() and not value.flags.writeable
        else:
            assert isinstance(value, str | int | float | list)
            assert not isinstance(value, list) or all(isinstance(item, str) for item in value)


def read_record(data):
    fields = decode_record(data, "here")
    check_sample(fields, "here")
    is_record(fields)


@sizes
def test_damaged_records_are_refused_or_hold_what_a_record_holds(count):
    rng = random.Random(0)
    good = [encode_record(record(n)) for n in range(4)]
    counts = fuzz(read_record, (mutated_bytes(rng, rng.choice(good), good) for _ in range(count)))
    assert counts["refused"] > count / 3 and counts["accepted"], counts


_LEAVES = st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.floats()
_LEAVES |= st.text(max_size=3) | st.binary(max_size=9) | st.just(msgpack.ExtType(5, b"x"))
_ARRAYS = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from([*DTYPES, "object", "O", "V8", "<f2", ""]),
        "shape": st.lists(st.integers(-1, 5) | st.integers(2**30, 2**63), max_size=9),
        "data": st.binary(max_size=9) | st.text(max_size=3),
    }
)
_NAMES = st.sampled_from(["latent", "caption_kinds", "key", "text/t5/length", "crop", "x"])
_RECORDS = st.dictionaries(
    _NAMES | st.text(max_size=3),
    _ARRAYS | _LEAVES | st.lists(_LEAVES, max_size=3),
    max_size=3,
)


@settings(max_examples=50, deadline=None, database=None, derandomize=True)
@given(_RECORDS)
def test_records_of_any_structure_are_refused_or_hold_what_a_record_holds(fields):
    fuzz(read_record, [msgpack.packb(fields)])


@pytest.mark.parametrize(
    "data, rule",
    [
        (b"\x91" * 100_000, "not a msgpack record"),
        (b"\xdd\x00\x0f\xff\xff" * 500 + b"\0" * 1_100_000, "not a msgpack record"),
        (msgpack.packb({"x": {"dtype": "int8", "shape": [2**63] * 60_000, "data": b""}}), "shape"),
        (msgpack.packb({"x": {"dtype": "int8", "shape": [1] * 9, "data": b"1"}}), "shape"),
        (
            msgpack.packb({"x": {"dtype": "int8", "shape": [0] + [2**31 - 1] * 7, "data": b""}}),
            "sh",
        ),
        (msgpack.packb({"x": {"dtype": "bool", "shape": [2], "data": b"\1\2"}}), "neither false"),
        (msgpack.packb({b"latent": 1}), "a name is text"),
        (msgpack.packb({"n" * 201: 1}), "a name is text"),
        (b"\x82\xa1x\x01\xa1x\x02", "twice"),
        (encode_record({"latent": np.ones(3)}), "latent"),
        (encode_record({"latent": "text"}), "latent"),
        (encode_record({"caption_kinds": "original"}), "caption_kinds"),
        (encode_record({"text/t5/length": np.ones(3)}), "length"),
    ],
    ids=range(13),
)
def test_records_that_would_cost_much_or_mean_nothing_are_refused(data, rule):
    with pytest.raises(ValueError, match=rule) as error, time_limit(1):
        read_record(data)
    assert "here" in str(error.value) and len(str(error.value)) < 500


@few
def test_forged_records_in_a_sound_shard_never_make_a_batch_of_another_kind(tmp_path, count):
    """The checksums of a shard vouch for the bytes and not for who wrote them."""
    rng = random.Random(1)
    good = [encode_record(record(n)) for n in range(4)]
    build(tmp_path, [(0, 1)], [(0, 1)])
    manifest = Manifest.load(tmp_path)
    with ShardWriter(tmp_path, "forged") as writer:
        writer.write(record())
        for _ in range(count):
            writer.write(forged_record(rng, good))
    splits = {**manifest.splits, "train": (writer.shard,)}
    Manifest(**{**vars(manifest), "splits": splits}).save(tmp_path)
    loader = Loader(tmp_path, batch_size=1, seed=0)
    expected = {name: (x.shape[1:], x.dtype) for name, x in leaves(loader.examples([0]))}

    def read(number):
        batch = leaves(loader.examples([0, number]))
        assert {name: (x.shape[1:], x.dtype) for name, x in batch} == expected

    assert fuzz(read, range(1, count + 1))["accepted"]


def forged_record(rng, good):
    """A record with a field taken out, exchanged for another one, or damaged in its bytes."""
    if rng.random() < 0.4:
        return mutated_bytes(rng, rng.choice(good), good)
    fields = msgpack.unpackb(rng.choice(good))
    name, other = rng.choice(list(fields)), rng.choice(list(fields))
    kind = rng.randrange(4)
    if kind == 0:
        del fields[name]
    elif kind == 1:
        fields[name] = fields[other]
    elif kind == 2:
        fields[name] = rng.choice([None, 3, 0.5, "x", [], ["a"] * 5, b"1", {}])
    elif isinstance(fields[name], dict):
        fields[name]["shape"] = rng.choice([fields[name]["shape"][::-1], [1], [], [0, 2**31]])
        fields[name]["dtype"] = rng.choice(list(DTYPES))
    return msgpack.packb(fields)


def leaves(batch):
    yield "latent", batch["latent"]
    for name, parts in batch["text"].items():
        for part, values in parts.items():
            yield f"{name}/{part}", values


# Shards


@few
def test_a_damaged_shard_gives_the_records_that_were_written_or_an_error(
    tmp_path, count, monkeypatch
):
    monkeypatch.setattr(records, "RETRY_SECONDS", ())
    rng = random.Random(2)
    written = [encode_record({"x": np.full(200, n, np.int16), "key": str(n)}) for n in range(5)]
    with ShardWriter(tmp_path, "whole") as writer:
        for data in written:
            writer.write(data)
    shard, whole = writer.shard, (tmp_path / "whole").read_bytes()

    def read(data):
        (tmp_path / "whole").write_bytes(data)
        reader = ShardReader(tmp_path, [shard], 1)
        refused = None
        for index in range(len(written)):
            try:
                assert reader.read(0, index) == written[index]
            except ValueError as error:
                refused = error
        if refused:
            raise refused
        # Equal records, though bytes between them may differ: only the whole hash notices that.
        assert data == whole or file_sha256(tmp_path / "whole") != shard.sha256

    counts = fuzz(read, (mutated_bytes(rng, whole) for _ in range(count)))
    assert counts["refused"] > count / 2, counts


# Manifests


def is_manifest(manifest, directory):
    """What every accepted manifest is."""
    root = os.path.realpath(directory)
    files = []
    for shards in manifest.splits.values():
        for shard in shards:
            path = os.path.realpath(os.path.join(directory, shard.file))
            assert path.startswith(root + os.sep), path
            assert os.path.join(directory, shard.file) == os.path.normpath(path), shard.file
            assert type(shard.records) is int and 0 <= shard.records <= shard.bytes
            assert os.path.getsize(path) == shard.bytes
            assert 0 <= shard.bucket < len(manifest.buckets) and isinstance(shard.sha256, str)
            files.append(path)
    assert len(set(files)) == len(files)
    assert all(b.height >= 1 and b.width >= 1 for b in manifest.buckets)
    assert all(np.isfinite(float(weight)) for weight in manifest.caption_mix.values())
    assert type(manifest.resolution) is int and manifest.resolution >= 1
    assert len(manifest.fingerprint()) == 64


def manifest_reader(directory):
    """Reads the data set in `directory` with the bytes of another manifest."""

    def read(data):
        (directory / "manifest.json").write_bytes(data)
        manifest = Manifest.load(directory)
        is_manifest(manifest, directory)
        loader = Loader(directory, batch_size=2, seed=0)
        assert loader.sample_ids(3).shape == (2,)

    return read


@few
def test_damaged_manifests_are_refused_or_describe_what_is_there(tmp_path, count):
    rng = random.Random(3)
    (tmp_path / "outside").write_bytes(b"x" * 100)
    directory = tmp_path / "data"
    build(directory, [(0, 4), (0, 3)], [(0, 2)])
    text = (directory / "manifest.json").read_text()
    first = directory / "train-00000.arrayrecord"
    names = ("../data/" + first.name, str(first), "./" + first.name, "sub/../" + first.name)

    def examples():
        for _ in range(count):
            kind = rng.random()
            if kind < 0.3:
                yield mutated_bytes(rng, text.encode())
            elif kind < 0.9:
                yield mutated_json(rng, json.loads(text)).encode("utf-8", "surrogatepass")
            else:  # the right file by a name that leads around
                yield text.replace(first.name, rng.choice(names)).encode()

    counts = fuzz(manifest_reader(directory), examples())
    assert counts["refused"] > count / 2 and counts["accepted"], counts
