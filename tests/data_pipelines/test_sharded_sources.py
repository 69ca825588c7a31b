import io
import json
import os
import random
import tarfile
import time

import numpy as np
import pytest
from PIL import Image

from data_pipelines import parquet, sharded, tars
from data_pipelines.jsonl import Lines
from data_pipelines.samples import Options, Rejected, fingerprint
from data_pipelines.tars import Tars

OPTIONS = Options(resolution=16)


def picture(value, kind="PNG", size=(16, 16)):
    file = io.BytesIO()
    Image.new("RGB", size, (value, 2 * value % 256, 3)).save(file, kind)
    return file.getvalue()


def write_tar(path, members):
    """`members`: (name, bytes) in order; a name may come twice."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as archive:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return path


def told(source):
    return {s.name: [tuple(caption) for caption in s.captions] for s in source.samples}


def reasons(source):
    return {case.name: case.reason for case in source.dropped}


# Tar files


def test_members_that_share_a_key_are_one_sample(tmp_path):
    entry = {"caption": "first", "synthetic_caption": ["A", "B"], "aesthetic": 6.5, "url": "x"}
    write_tar(
        tmp_path / "a-0.tar",
        [
            ("./000.jpg", picture(1, "JPEG")),
            ("./000.txt", b"first"),
            ("./000.json", json.dumps(entry).encode()),
            ("sub/001.WEBP", picture(2, "WEBP")),
            ("sub/001.txt", "\ufeffsecond".encode()),
            ("sub/001.cls", b"7"),
            ("sub/001.seg.png", picture(9)),
            ("sub/001.pyd", b"cos\nsystem\n(S'false'\ntR."),
        ],
    )
    write_tar(tmp_path / "b-0.tar", [("000.txt", b"third"), ("000.png", picture(3))])
    options = Options(resolution=16, fields=frozenset(["aesthetic", "absent"]))
    source = Tars(str(tmp_path / "*.tar"), options)
    assert told(source) == {
        "a-0.tar/./000": [("first", "original"), ("A", "synthetic"), ("B", "synthetic")],
        "a-0.tar/sub/001": [("second", "original")],
        "b-0.tar/000": [("third", "original")],
    }
    assert [s.fields for s in source.samples] == [{"aesthetic": 6.5}, {}, {}]
    read = [source.read(sample) for sample in source.samples]
    assert read == [picture(1, "JPEG"), picture(2, "WEBP"), picture(3)]
    assert source.dropped == []
    assert source.ignored == {".cls": 1, ".seg.png": 1, ".pyd": 1}


def test_everything_wrong_inside_a_tar_is_named_and_the_rest_counts(tmp_path):
    link = tarfile.TarInfo("link.jpg")
    link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
    path = write_tar(
        tmp_path / "x.tar",
        [
            ("../../outside.png", picture(1)),
            ("../../outside.txt", b"nothing is unpacked"),
            ("twice.png", picture(2)),
            ("twice.txt", b"one"),
            ("twice.png", picture(3)),
            ("twice.jpg", picture(3, "JPEG")),
            ("twice.txt", b"two"),
            ("silent.png", picture(4)),
            ("empty.png", picture(4)),
            ("empty.txt", b" \n"),
            ("alone.txt", b"no picture"),
            ("latin.png", picture(5)),
            ("latin.txt", "caf\xe9".encode("latin-1")),
            ("json.png", picture(6)),
            ("json.json", b"{not"),
            ("long.png", picture(7)),
            ("long.txt", b"x" * (tars.MAX_TEXT_BYTES + 1)),
        ],
    )
    with tarfile.open(path, "a") as archive:
        archive.addfile(link)
    source = Tars(str(path), OPTIONS)
    assert list(told(source)) == ["x.tar/../../outside", "x.tar/twice"]
    assert source.read(source.samples[1]) == picture(2)
    assert sorted((case.name, case.reason) for case in source.dropped) == [
        ("x.tar/alone", "missing"),
        ("x.tar/empty", "no_caption"),
        ("x.tar/json", "bad_caption"),
        ("x.tar/latin", "bad_caption"),
        ("x.tar/long", "bad_caption"),
        ("x.tar/silent", "no_caption"),
        ("x.tar/twice.jpg", "duplicate_key"),
        ("x.tar/twice.png", "duplicate_key"),
        ("x.tar/twice.txt", "duplicate_key"),
    ]
    assert source.ignored == {".jpg": 1}


def numbered(count):
    members = []
    for number in range(count):
        members += [(f"{number:03d}.png", picture(number)), (f"{number:03d}.txt", b"a picture")]
    return members


def test_a_tar_that_ends_early_keeps_what_stands_before_the_end(tmp_path):
    whole = write_tar(tmp_path / "whole.tar", numbered(4)).read_bytes()
    first = Tars(str(tmp_path / "whole.tar"), OPTIONS).samples[-1].location[1]
    for length in (*range(512, len(whole), 512), first + 10):
        path = tmp_path / "cut.tar"
        path.write_bytes(whole[:length])
        source = Tars(str(path), OPTIONS)
        for sample in source.samples:
            number = int(sample.name[-3:])
            assert source.read(sample) == picture(number)
        if length >= len(numbered(4)) * 1024 + 512:  # only padding is lost
            assert len(source.samples) == 4 and not source.dropped
        else:
            assert reasons(source)["cut.tar"] == "corrupt_shard"


def test_a_picture_that_is_cut_off_with_its_tar_is_named_itself(tmp_path):
    path = write_tar(tmp_path / "x.tar", [("000.txt", b"first"), ("000.png", picture(0))])
    path.write_bytes(path.read_bytes()[: 3 * 512 + 20])
    source = Tars(str(path), OPTIONS)
    assert source.samples == []
    assert reasons(source) == {"x.tar": "corrupt_shard", "x.tar/000": "corrupt"}


def test_a_damaged_header_is_not_taken_for_the_end(tmp_path):
    path = write_tar(tmp_path / "x.tar", numbered(4))
    data = bytearray(path.read_bytes())
    third = Tars(str(path), OPTIONS).samples[2].location[1] - tarfile.BLOCKSIZE
    data[third + 150] ^= 1  # its checksum
    path.write_bytes(data)
    source = Tars(str(path), OPTIONS)
    assert list(told(source)) == ["x.tar/000", "x.tar/001"]
    assert reasons(source) == {"x.tar": "corrupt_shard"}
    assert f"byte {third}" in source.dropped[0].detail


def test_tars_joined_by_cat_are_reported_and_not_lost_silently(tmp_path):
    one = write_tar(tmp_path / "one.tar", numbered(1)).read_bytes()
    (tmp_path / "one.tar").write_bytes(one + one)
    source = Tars(str(tmp_path / "one.tar"), OPTIONS)
    assert len(source.samples) == 1 and reasons(source) == {"one.tar": "corrupt_shard"}


def test_random_damage_never_ends_a_build(tmp_path):
    whole = write_tar(tmp_path / "x.tar", numbered(6)).read_bytes()
    chance = random.Random(0)
    for _ in range(200):
        data = bytearray(whole)
        for _ in range(chance.choice((1, 5, 50))):
            data[chance.randrange(len(data))] = chance.randrange(256)
        (tmp_path / "x.tar").write_bytes(data)
        source = Tars(str(tmp_path / "x.tar"), OPTIONS)
        for sample in source.samples:
            assert len(source.read(sample)) == sample.bytes


@pytest.mark.parametrize("content", [b"", b"nothing", b"\x1f\x8b" + bytes(2000)])
def test_a_file_that_is_no_plain_tar_is_named(tmp_path, content):
    write_tar(tmp_path / "good.tar", numbered(1))
    (tmp_path / "bad.tar").write_bytes(content)
    source = Tars(str(tmp_path / "*.tar"), OPTIONS)
    assert list(told(source)) == ["good.tar/000"]
    assert reasons(source) == {"bad.tar": "corrupt_shard"}


def test_equal_file_names_in_different_folders_stay_apart(tmp_path):
    for folder in ("train", "more"):
        write_tar(tmp_path / folder / "0.tar", numbered(1))
    source = Tars(str(tmp_path / "**/*.tar"), OPTIONS)
    assert list(told(source)) == ["more/0.tar/000", "train/0.tar/000"]


# What was found is noted


def test_a_second_listing_reads_no_tar_that_is_the_same(tmp_path, monkeypatch):
    for number in range(3):
        write_tar(tmp_path / f"{number}.tar", numbered(3))
    options = Options(resolution=16, index=str(tmp_path / "index"))
    first = Tars(str(tmp_path / "*.tar"), options)
    read = []
    read_index = tars.read_index
    monkeypatch.setattr(
        tars, "read_index", lambda path, *a: read.append(path) or read_index(path, *a)
    )
    again = Tars(str(tmp_path / "*.tar"), options)
    assert read == [] and fingerprint(again) == fingerprint(first)
    assert again.samples == first.samples and again.dropped == first.dropped
    write_tar(tmp_path / "1.tar", numbered(2))
    os.utime(tmp_path / "1.tar", (time.time() + 9, time.time() + 9))
    changed = Tars(str(tmp_path / "*.tar"), options)
    assert read == [str(tmp_path / "1.tar")] and len(changed.samples) == 8
    assert fingerprint(changed) != fingerprint(first)


def test_remote_files_are_found_and_read_by_their_parts(tmp_path, monkeypatch):
    """A path that epath serves and `open` does not; the remote file systems are epath's matter."""
    write_tar(tmp_path / "set/a-0.tar", numbered(2))
    (tmp_path / "set/0.jsonl").write_text(json.dumps({"file": "p.png", "caption": "c"}))
    (tmp_path / "set/p.png").write_bytes(picture(5))
    real = sharded.epath.Path
    under = lambda path: real(str(path).replace("mem://bucket", str(tmp_path)))  # noqa: E731
    monkeypatch.setattr(sharded.epath, "Path", under)
    found = sharded.find_files("mem://bucket/set/*.tar", "webdataset")
    assert found == [str(tmp_path / "set/a-0.tar")]
    monkeypatch.setattr(sharded, "find_files", None)
    source = Lines("mem://bucket/set/0.jsonl", OPTIONS)
    assert [source.read(sample) for sample in source.samples] == [picture(5)]
    with pytest.raises(Rejected, match="missing"):
        sharded.read_whole("mem://bucket/set/none.png")


# Lines


def test_lines_name_pictures_beside_their_file(tmp_path):
    for number, name in enumerate(("b.png", "sub/a.png")):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(picture(number))
    lines = [
        {"image_path": "sub/a.png", "TEXT": "one", "aesthetic": 5, "note": [1]},
        {"file": "b.png", "recaption": "Two."},
        {"file": "./sub/../sub/a.png", "synthetic": "One.", "aesthetic": 6, "nsfw": "0.5"},
        {"file": "gone.png", "caption": "x"},
        {"file": "../secret.png", "caption": "x"},
        {"file": "b.png", "caption": 3},
        {"file": "sub", "caption": "a folder"},
        {"caption": "of nothing"},
    ]
    path = tmp_path / "set.jsonl"
    path.write_text("\ufeff" + "\n".join(map(json.dumps, lines)) + "\n\nnot JSON")
    options = Options(resolution=16, fields=frozenset(["aesthetic", "nsfw", "note"]))
    source = Lines(str(path), options)
    assert told(source) == {
        "sub/a.png": [("one", "original"), ("One.", "synthetic")],
        "b.png": [("Two.", "synthetic")],
    }
    assert [s.fields for s in source.samples] == [{"aesthetic": 6, "nsfw": "0.5"}, {}]
    assert [source.read(sample) for sample in source.samples] == [picture(1), picture(0)]
    assert reasons(source) == {
        "gone.png": "missing",
        "set.jsonl line 5": "outside",
        "set.jsonl line 6": "bad_caption",
        "sub": "unreadable",
        "set.jsonl line 8": "bad_caption",
        "set.jsonl line 10": "bad_caption",
    }


def test_fields_that_are_named_replace_the_usual_ones(tmp_path):
    (tmp_path / "a.png").write_bytes(picture(0))
    entry = {"where": "a.png", "de": "eins", "fr": ["un", "une"], "llava": "One.", "caption": "no"}
    (tmp_path / "set.jsonl").write_text(json.dumps(entry))
    options = Options(
        resolution=16,
        image_field="where",
        caption_fields=("de", "fr"),
        synthetic_fields=("llava",),
    )
    assert told(Lines(str(tmp_path / "set.jsonl"), options)) == {
        "a.png": [(text, "original") for text in ("eins", "un", "une")] + [("One.", "synthetic")]
    }


# Tables


def write_table(path, columns, rows_per_group=4):
    pyarrow = pytest.importorskip("pyarrow")
    pyarrow.parquet.write_table(pyarrow.table(columns), path, row_group_size=rows_per_group)


def test_rows_of_both_layouts_are_read_group_by_group(tmp_path, monkeypatch):
    pytest.importorskip("pyarrow.parquet")
    numbers = range(10)
    plain = {"jpg": [picture(n) for n in numbers], "text": [f"row {n}" for n in numbers]}
    write_table(tmp_path / "a.parquet", {**plain, "aesthetic": [n / 2 for n in numbers]})
    nested = [{"bytes": picture(100 + n), "path": f"{n}.png"} for n in numbers]
    nested[3] = None
    captions = [["one", "two"]] * 9 + [[]]
    write_table(tmp_path / "b.parquet", {"image": nested, "captions": captions}, 3)
    options = Options(resolution=16, fields=frozenset(["aesthetic"]))
    source = parquet.Parquet(str(tmp_path / "*.parquet"), options)
    assert told(source)["a.parquet/1-000001"] == [("row 5", "original")]
    assert told(source)["b.parquet/0-000002"] == [("one", "original"), ("two", "original")]
    assert reasons(source) == {"b.parquet/3-000000": "no_caption"}
    assert [s.fields["aesthetic"] for s in source.samples[:10]] == [n / 2 for n in numbers]

    loads = []
    load = source._load
    monkeypatch.setattr(source, "_load", lambda *place: loads.append(place) or load(*place))
    for sample in source.samples:
        number = source.samples.index(sample)
        if number == 13:
            with pytest.raises(Rejected, match="NoneType instead of the bytes"):
                source.read(sample)
        else:
            value = number if number < 10 else 90 + number
            assert source.read(sample) == picture(value)
    assert loads == [(0, 0), (0, 1), (0, 2), (1, 0), (1, 1), (1, 2)]


def test_row_groups_leave_the_memory_again(tmp_path, monkeypatch):
    numbers = range(12)
    columns = {"image": [picture(n) for n in numbers], "text": ["x"] * 12}
    write_table(tmp_path / "a.parquet", columns, 2)
    source = parquet.Parquet(str(tmp_path / "a.parquet"), OPTIONS)
    monkeypatch.setattr(parquet, "CACHE_BYTES", 1)
    for sample in source.samples:
        source.read(sample)
        assert len(source._groups) <= 2


def test_damaged_tables_are_named(tmp_path):
    columns = {"image": [picture(n) for n in range(8)], "text": [f"row {n}" for n in range(8)]}
    write_table(tmp_path / "a.parquet", columns)
    data = bytearray((tmp_path / "a.parquet").read_bytes())
    (tmp_path / "cut.parquet").write_bytes(data[: len(data) // 2])
    (tmp_path / "none.parquet").write_bytes(b"")
    source = parquet.Parquet(str(tmp_path / "*.parquet"), OPTIONS)
    assert len(source.samples) == 8
    assert reasons(source) == {"cut.parquet": "corrupt_shard", "none.parquet": "corrupt_shard"}
    for sample in source.samples[:1]:
        data[60:400] = bytes(340)
        (tmp_path / "a.parquet").write_bytes(data)
        with pytest.raises(Rejected, match="corrupt|missing"):
            source.read(sample)


def test_tables_that_cannot_serve_are_the_users_mistake(tmp_path, monkeypatch):
    columns = {"pic": [picture(n) for n in range(4)], "text": ["x"] * 4}
    write_table(tmp_path / "a.parquet", columns)
    with pytest.raises(ValueError, match="columns pic, text, a picture is in image or .*--image_f"):
        parquet.Parquet(str(tmp_path / "a.parquet"), OPTIONS)
    options = Options(resolution=16, image_field="pic")
    assert len(parquet.Parquet(str(tmp_path / "a.parquet"), options).samples) == 4
    monkeypatch.setattr(parquet, "MAX_GROUP_BYTES", 100)
    with pytest.raises(ValueError, match="row groups of .* bytes and one is read at once"):
        parquet.Parquet(str(tmp_path / "a.parquet"), options)
    monkeypatch.setitem(__import__("sys").modules, "pyarrow", None)
    monkeypatch.setitem(__import__("sys").modules, "pyarrow.parquet", None)
    with pytest.raises(ValueError, match=r"needs pyarrow.*pip install 'mmdit-jax\[parquet\]'"):
        parquet.Parquet(str(tmp_path / "a.parquet"), OPTIONS)


# TensorFlow Datasets


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A data set of TFDS in the ArrayRecord format, written without tensorflow."""
    import tensorflow_datasets as tfds
    from array_record.python.array_record_module import ArrayRecordWriter
    from etils import epath
    from tensorflow_datasets.proto import tf_example_pb2

    root = tmp_path_factory.mktemp("tfds")
    folder = root / "tiny" / "1.0.0"
    folder.mkdir(parents=True)
    examples = []
    for number in range(5):
        example = tf_example_pb2.Example()
        feature = example.features.feature
        feature["image"].bytes_list.value.append(picture(number))
        feature["text"].bytes_list.value.append(f"picture {number}".encode() * (number != 3))
        feature["label"].int64_list.value.append(number % 2)
        feature["aesthetic"].float_list.value.append(number / 2)
        examples.append(example.SerializeToString())
    writer = ArrayRecordWriter(
        str(folder / "tiny-train.array_record-00000-of-00001"), "group_size:1"
    )
    for example in examples:
        writer.write(example)
    writer.close()
    template = tfds.core.ShardedFileTemplate(
        data_dir=epath.Path(folder),
        dataset_name="tiny",
        split="train",
        filetype_suffix="array_record",
    )
    split = tfds.core.SplitInfo(
        name="train",
        shard_lengths=[len(examples)],
        num_bytes=sum(map(len, examples)),
        filename_template=template,
    )
    features = tfds.features.FeaturesDict(
        {
            "image": tfds.features.Image(shape=(None, None, 3)),
            "text": tfds.features.Text(),
            "label": tfds.features.ClassLabel(names=["grey_cat", "dog"]),
            "aesthetic": tfds.features.Scalar(np.float32),
        }
    )
    tfds.folder_dataset.write_metadata(
        data_dir=str(folder), features=features, split_infos=[split], check_data=False
    )
    return root


def test_a_prepared_tfds_data_set_is_read_without_tensorflow(tiny, tmp_path):
    from data_pipelines.tfds import Tfds

    options = Options(resolution=16, fields=frozenset(["aesthetic"]), index=str(tmp_path / "index"))
    for source in (Tfds(f"tiny@{tiny}", options), Tfds(f"tiny@{tiny}", options)):
        assert told(source) == {
            f"train/{n:07d}": [(f"picture {n}", "original")] for n in (0, 1, 2, 4)
        }
        assert reasons(source) == {"train/0000003": "no_caption"}
        assert [s.fields for s in source.samples] == [{"aesthetic": n / 2} for n in (0, 1, 2, 4)]
        read = [source.read(sample) for sample in source.samples]
        assert read == [picture(n) for n in (0, 1, 2, 4)]  # the bytes as they were encoded
    assert "tensorflow" not in __import__("sys").modules
    labels = Options(resolution=16, caption_fields=("label",), tfds_split="train[1:3]")
    assert list(told(Tfds(f"tiny@{tiny}", labels)).values()) == [
        [("dog", "original")],
        [("grey cat", "original")],
    ]


@pytest.mark.parametrize(
    "name, options, message",
    [
        ("none", {}, "--source=tfds:none@.* is not to be had"),
        ("tiny", {"tfds_split": "test"}, "--tfds_split=test of train"),
        ("tiny", {"image_field": "label"}, "--image_field=label is none of them"),
        ("tiny", {"caption_fields": ("prompt",)}, "none of the captions prompt"),
    ],
)
def test_what_tfds_does_not_have_is_named(tiny, name, options, message):
    from data_pipelines.tfds import Tfds

    with pytest.raises(ValueError, match=message):
        Tfds(f"{name}@{tiny}", Options(resolution=16, **options))
