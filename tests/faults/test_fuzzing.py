"""Damaged and forged inputs: refused in one line, or accepted and then sane; nothing hangs.

The short form runs on every test; `-m slow` runs the long one, 10,000 inputs and more a target.
"""

import functools
import io
import json
import os
import random
import shutil
import tarfile

import msgpack
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from data_pipelines import images
from data_pipelines.filters import Rules
from data_pipelines.folders import Folder
from data_pipelines.jsonl import Lines
from data_pipelines.samples import REASONS, Options, Rejected
from data_pipelines.tars import Tars
from mmdit_jax import config as config_lib
from mmdit_jax import run, strict_json
from mmdit_jax.data import records
from mmdit_jax.data.loader import Loader
from mmdit_jax.data.manifest import Manifest, file_sha256
from mmdit_jax.data.records import DTYPES, ShardReader, ShardWriter, decode_record, encode_record
from mmdit_jax.data.sample_fields import check_sample
from mmdit_jax.encoders import folder as hf_folder
from mmdit_jax.interop.tensors import Stored, Tensors, write_file
from mmdit_jax.training import workdir as workdir_lib
from tests.data.making import TEXT, TOKENS, build, record_of
from tests.data_pipelines.making import write_tar
from tests.faults.mutations import fuzz, mutated_bytes, mutated_json, time_limit

pytestmark = pytest.mark.filterwarnings("ignore")  # of Pillow, about damaged files

# How many examples: by default, and the promise.
SHORT, LONG = 300, 10_000
SIZES = [pytest.param(SHORT, id="short"), pytest.param(LONG, id="long", marks=pytest.mark.slow)]
sizes = pytest.mark.parametrize("count", SIZES)
# Opening files takes most of the time of these.
few = pytest.mark.parametrize(
    "count",
    [pytest.param(60, id="short"), pytest.param(LONG, id="long", marks=pytest.mark.slow)],
)


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

    def read(data):
        (directory / "manifest.json").write_bytes(data)
        manifest = Manifest.load(directory)
        is_manifest(manifest, directory)
        loader = Loader(directory, batch_size=2, seed=0)
        assert loader.sample_ids(3).shape == (2,)

    counts = fuzz(read, examples())
    assert counts["refused"] > count / 2 and counts["accepted"], counts


# Configs

ARGUMENTS = "depth=2 depth=-1 depth=1e9 resolution=0 resolution=99999999999 tiny tiny=x".split()
ARGUMENTS += ["depth=nan", "text_length=-3", "=", ",,", "depth", "resolution=\0", "a=b"]
VALUES = "0 -1 2 0.5 1e400 1e308 nan inf abc None True () (1, [[ 0x1 {} é __import__('os')".split()
VALUES += ["", "('a',)", "(1, 2)", "lambda: 1", "1" * 400, "(" * 300]


def leaf_names(tree, prefix=""):
    for name, value in tree.items():
        if hasattr(value, "keys"):
            yield from leaf_names(value, f"{prefix}{name}.")
        yield f"{prefix}{name}"


def is_config(config):
    """What every accepted config is: of sane sizes, so that nothing that follows is huge."""
    assert 1 <= config.model.depth <= 1024 and 1 <= config.batch_size <= 1 << 24
    assert 1 <= config.steps < 1 << 31 and config_lib.image_tokens(config) < 1 << 26
    for value in leaf_values(config.to_dict()):
        assert not isinstance(value, float) or np.isfinite(value)


def leaf_values(tree):
    for value in tree.values():
        if isinstance(value, dict):
            yield from leaf_values(value)
        else:
            yield value


@pytest.mark.parametrize(
    "count", [pytest.param(60, id="short"), pytest.param(2000, id="long", marks=pytest.mark.slow)]
)
def test_overrides_on_the_command_line_are_refused_in_one_line_or_make_a_sane_config(count):
    """What `command.run` ends with exit code 2: flags.Error, ValueError, TypeError, OSError."""
    from absl import flags
    from ml_collections import config_flags

    from mmdit_jax import command

    rng = random.Random(4)
    names = [*leaf_names(config_lib.default()), "model.none", "", "steps.x"]

    def words():
        argument = ":" + rng.choice(ARGUMENTS) if rng.random() < 0.3 else ""
        yield f"--config=configs/shapes.py{argument}"
        for _ in range(rng.choice((1, 1, 2))):
            value = rng.choice(VALUES) if rng.random() < 0.8 else str(rng.randrange(1, 9))
            yield f"--config.{rng.choice(names)}={value}"

    def parse(words):
        values = flags.FlagValues()
        argv = ["train", *words]
        defined = config_flags.DEFINE_config_file("config", flag_values=values, sys_argv=argv)
        # The check of names, which every command does first, looks at the flags of the process.
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(command.flags, "FLAGS", values)
            try:
                command._check_config(words)
                values(argv)
            except (flags.Error, ValueError, TypeError, OSError):
                return  # one line and exit code 2, whoever raised it
        config = defined.value
        run.build(config)
        is_config(config)
        built.append(words)

    built = []
    counts = fuzz(parse, ([*words()] for _ in range(count)))
    assert counts["refused"] and built, counts


@pytest.mark.parametrize(
    "name, value",
    [("model.depth", 10**9), ("batch_size", 2**40), ("steps", 2**31), ("data.threads", 10**6)]
    + [("optimizer.learning_rate", float("inf")), ("samples.steps", 10**9), ("data.factor", 0)],
)
def test_numbers_that_would_be_an_allocation_are_refused(name, value):
    config = config_lib.default()
    group, _, last = name.rpartition(".")
    (config[group] if group else config)[last] = value
    with pytest.raises(ValueError, match=f"{name}=.* must be (at (least|most) |finite)"):
        config_lib.validate(config)


@few
def test_a_damaged_config_of_a_run_is_refused_in_one_line_or_is_sane(tmp_path, count):
    rng = random.Random(5)
    config = config_lib.default(depth=1)
    manifest = Manifest({}, (), {}, {}, 256, "test")
    workdir_lib.write_identity(str(tmp_path), config, manifest)
    text = (tmp_path / "config.json").read_text()

    def examples():
        for _ in range(count):
            if rng.random() < 0.3:
                yield mutated_bytes(rng, text.encode())
            else:
                yield mutated_json(rng, json.loads(text)).encode("utf-8", "surrogatepass")

    def read(data):
        (tmp_path / "config.json").write_bytes(data)
        is_config(run.build(run.read_config(str(tmp_path))).config)
        workdir_lib.check_identity(
            workdir_lib.read_identity(str(tmp_path)), config, manifest, workdir=str(tmp_path)
        )

    counts = fuzz(read, examples())
    assert counts["refused"] > count / 2 and counts["accepted"], counts


# Pictures


def encoded(kind, mode="RGB", size=(24, 17), **options):
    rng = np.random.default_rng(0)
    channels = len(Image.new(mode, (1, 1)).getbands())
    values = rng.integers(0, 256, (size[1], size[0], channels), np.uint8)
    file = io.BytesIO()
    Image.frombytes(mode, size, values.tobytes()).save(file, kind, **options)
    return file.getvalue()


@functools.cache
def pictures():
    text = Image.Exif()
    text[0x0112] = 6
    found = [
        encoded("PNG"),
        encoded("PNG", "RGBA"),
        encoded("PNG", "P"),
        encoded("JPEG", exif=text),
        encoded("JPEG", progressive=True),
        encoded("JPEG", "CMYK"),
        encoded("WEBP"),
        encoded("WEBP", lossless=True),
        encoded("GIF", "P"),
        encoded("BMP"),
        encoded("PPM"),
        encoded("TIFF"),
        encoded("TIFF", compression="tiff_lzw"),
        encoded("TIFF", compression="jpeg"),
    ]
    grey = Image.fromarray(np.arange(300, dtype=np.uint16).reshape(15, 20))
    for kind in ("PNG", "TIFF"):
        file = io.BytesIO()
        grey.save(file, kind)
        found.append(file.getvalue())
    return found


def decode(data):
    target = (8, 8)
    decoded = images.decode(data, target)
    height, width = decoded.size
    assert decoded.image.mode == "RGB" and 1 <= height * width <= images.MAX_PIXELS
    assert decoded.image.size == (width // decoded.scale, height // decoded.scale)
    crop = images.centre_crop(decoded.size, target)
    pixels = images.resize(decoded.image, crop, target, decoded.scale)
    assert pixels.shape == (8, 8, 3) and pixels.dtype == np.uint8


def known_reason(target):
    """Runs a target whose refusals have to be one of the documented reasons."""

    def checked(example):
        try:
            target(example)
        except Rejected as rejected:
            assert rejected.reason in REASONS and "\n" not in rejected.detail
            raise

    return checked


@sizes
def test_damaged_pictures_are_dropped_for_a_documented_reason_or_are_pictures(count):
    rng = random.Random(6)
    good = pictures()
    for data in good:
        decode(data)
    examples = (mutated_bytes(rng, rng.choice(good), good) for _ in range(count))
    counts = fuzz(known_reason(decode), examples, refusal=Rejected)
    assert counts["refused"] > count / 4 and counts["accepted"], counts


# Captions and archives


def listed(source):
    """Everything a source lists is usable, and everything it leaves out has a reason."""
    rules = Rules(score="aesthetic>=5")
    for sample in source.samples:
        assert sample.captions and all(caption.text.strip() for caption in sample.captions)
        "".join(caption.text for caption in sample.captions).encode()
        try:
            rules.before(sample)
            source.read(sample)
        except Rejected as rejected:
            assert rejected.reason in REASONS
    for case in source.dropped:
        assert case.reason in REASONS and "\n" not in case.detail
    names = [sample.name for sample in source.samples]
    assert len(set(names)) == len(names)
    json.dumps([names, source.dropped])


ENTRIES = [
    {"file": "a.png", "caption": "a cat", "aesthetic": 6},
    {"file": "b/c.png", "captions": ["one", "two"], "synthetic": "three", "aesthetic": 4.5},
]


@few
def test_damaged_caption_files_lose_lines_and_nothing_else(tmp_path, count):
    rng = random.Random(7)
    (tmp_path / "b").mkdir()
    for name in ("a.png", "b/c.png"):
        (tmp_path / name).write_bytes(encoded("PNG"))
    text = "\n".join(map(json.dumps, ENTRIES)).encode()
    options = Options(resolution=16, fields=frozenset(["aesthetic"]))

    def examples():
        for number in range(count):
            if rng.random() < 0.3:
                yield number, mutated_bytes(rng, text)
            else:
                lines = [mutated_json(rng, entry) for entry in ENTRIES]
                yield number, "\n".join(lines).encode("utf-8", "surrogatepass")

    def read(example):
        number, data = example
        (tmp_path / "captions.jsonl").write_bytes(data)
        if number % 2:
            listed(Folder(str(tmp_path), options))
        else:
            listed(Lines(str(tmp_path / "captions.jsonl"), options))

    assert fuzz(read, examples())["refused"] == 0


@few
def test_damaged_tar_files_lose_members_and_nothing_else(tmp_path, count):
    rng = random.Random(8)
    members = []
    for number in range(3):
        members.append((f"{number}.png", encoded("PNG")))
        members.append((f"{number}.txt", b"a picture"))
        members.append((f"{number}.json", json.dumps(ENTRIES[1]).encode()))
    plain = write_tar(tmp_path / "plain.tar", members).read_bytes()
    with tarfile.open(tmp_path / "pax.tar", "w", format=tarfile.PAX_FORMAT) as archive:
        for name, data in members:
            info = tarfile.TarInfo("é" * 120 + name)
            info.size, info.pax_headers = len(data), {"comment": "x" * 200}
            archive.addfile(info, io.BytesIO(data))
    good = [plain, (tmp_path / "pax.tar").read_bytes()]
    options = Options(resolution=16, fields=frozenset(["aesthetic"]))

    def read(data):
        (tmp_path / "x.tar").write_bytes(data)
        listed(Tars(str(tmp_path / "x.tar"), options))

    examples = (mutated_headers(rng, rng.choice(good)) for _ in range(count))
    assert fuzz(read, examples)["refused"] == 0


def mutated_headers(rng, data):
    """A tar with bytes damaged anywhere, or a field of a header changed and its sum made right."""
    if rng.random() < 0.5:
        return mutated_bytes(rng, data)
    changed, blocks = bytearray(data), len(data) // 512
    for _ in range(50):
        start = 512 * rng.randrange(blocks)
        if changed[start + 257 : start + 262] == b"ustar":
            break
    fields = [(0, 100), (100, 8), (124, 12), (124, 12), (124, 12), (156, 1), (345, 155)]
    field, width = rng.choice(fields)
    # In base 256: minus one, minus 4096, and the largest.
    odd = [b"\xff" * width, b"\xff" * (width - 2) + b"\xf0\0", b"\x80" + b"\xff" * (width - 1)]
    odd.append(b"7" * width)
    odd += [b"../" * (width // 3), b"/etc/passwd".ljust(width, b"\0"), rng.randbytes(width)]
    changed[start + field : start + field + width] = rng.choice(odd)[:width].ljust(width, b"\0")
    changed[start + 148 : start + 156] = b" " * 8
    total = sum(changed[start : start + 512])
    changed[start + 148 : start + 156] = b"%06o\0 " % total
    return bytes(changed)


# Weights


@sizes
def test_damaged_weights_are_refused_or_have_the_shapes_that_the_header_says(tmp_path, count):
    rng = random.Random(9)
    values = {"a": np.arange(12, dtype=np.float32).reshape(3, 4), "b": np.ones(5, np.float16)}
    tensors = [Stored(name, x.shape, x.dtype, lambda x=x: x) for name, x in values.items()]
    path = tmp_path / "x.safetensors"
    write_file(path, tensors)
    good = path.read_bytes()
    length = int.from_bytes(good[:8], "little")
    header = json.loads(good[8 : 8 + length])

    def examples():
        for _ in range(count):
            if rng.random() < 0.5:
                yield mutated_bytes(rng, good)
            else:
                text = mutated_json(rng, header).encode("utf-8", "surrogatepass")
                size = len(text) if rng.random() < 0.9 else rng.choice((0, 1, 2**62, 2**64 - 1))
                yield size.to_bytes(8, "little") + text + good[8 + length :]

    def read(data):
        path.write_bytes(data)
        opened = Tensors(path)
        for name in opened.names():
            found = opened.read(name)
            assert found.shape == opened.shape(name) and found.dtype == opened.dtype(name)

    counts = fuzz(read, examples())
    assert counts["refused"] > count / 3 and counts["accepted"], counts


@few
def test_damaged_folders_of_weights_are_refused_and_never_lead_outside(tmp_path, count):
    rng = random.Random(10)
    (tmp_path / "outside.safetensors").write_bytes(b"x")
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "one.safetensors").write_bytes(b"x")
    index = {"metadata": {"total_size": 1}, "weight_map": {"a": "one.safetensors"}}
    odd = ["../outside.safetensors", str(tmp_path / "outside.safetensors"), "..", "/", 3, None, {}]

    def read(text):
        (folder / "model.safetensors.index.json").write_text(text, errors="surrogateescape")
        for file in hf_folder.weight_files(folder):
            assert file.parent == folder and file.name == "one.safetensors"

    refusal = (ValueError, FileNotFoundError)
    examples = (mutated_json(rng, index, odd) for _ in range(count))
    counts = fuzz(read, examples, refusal=refusal)
    assert counts["refused"] and counts["accepted"], counts


def test_strict_json_has_no_extensions(tmp_path):
    for text in ("NaN", "[Infinity]", "[" * 100_000, "{", "", '"\\ud8"'):
        with pytest.raises(ValueError):
            strict_json.parse(text)
    path = tmp_path / "x.json"
    for content in (b"[]", b"\xff", b"null", b"{"):
        path.write_bytes(content)
        with pytest.raises(ValueError, match="x.json is .*; fetch it again"):
            strict_json.read_object(path, "fetch it again")
    shutil.rmtree(tmp_path)
    with pytest.raises(OSError):
        strict_json.read_object(path, "fetch it again")
