import dataclasses
import json
import os
import random
import tarfile
import time

import fsspec
import pytest

from data_pipelines.samples import Options, Rejected, fingerprint
from data_pipelines.sources import sharded, tars
from data_pipelines.sources.folders import Folder
from data_pipelines.sources.jsonl import Lines
from data_pipelines.sources.tars import Tars
from data_pipelines.write import Output
from tests.data_pipelines.making import OPTIONS, picture, reasons, told, write_tar

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
    assert list(told(source)) == ["x.tar/twice"]
    assert source.read(source.samples[0]) == picture(2)
    assert sorted((case.name, case.reason) for case in source.dropped) == [
        ("x.tar/../../outside.png", "outside"),
        ("x.tar/../../outside.txt", "outside"),
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


@pytest.fixture
def remote():
    """A folder of fsspec's file system in memory, as gs:// and s3:// are of others."""
    system = fsspec.filesystem("memory")
    yield system
    system.rm("/bucket", recursive=True)


def test_remote_files_are_found_and_read_by_their_parts(tmp_path, remote):
    for name in ("a-0.tar", "a-1.tar", "sub/b.tar"):
        local = write_tar(tmp_path / name, numbered(2))
        remote.pipe(f"/bucket/set/{name}", local.read_bytes())
    tars_in = "memory:///bucket/set"
    found = sharded.find_files(f"{tars_in}/*.tar", "webdataset")
    assert found == [f"{tars_in}/a-0.tar", f"{tars_in}/a-1.tar"]
    assert len(sharded.find_files(f"{tars_in}/**/*.tar", "webdataset")) == 3
    assert sharded.find_files(f"{tars_in}/a-0.tar", "webdataset") == found[:1]
    options = dataclasses.replace(OPTIONS, index=str(tmp_path / "index"))
    source, local = Tars(f"{tars_in}/*.tar", options), Tars(str(tmp_path / "*.tar"), OPTIONS)
    assert source.samples == local.samples and len(source.samples) == 4
    assert [*map(source.read, source.samples)] == [*map(local.read, local.samples)]
    (first, *_) = [json.loads(note.read_text()) for note in sorted((tmp_path / "index").iterdir())]
    remote.pipe("/bucket/set/a-0.tar", (tmp_path / "a-0.tar").read_bytes())  # as large, and later
    Tars(f"{tars_in}/*.tar", options)
    again = json.loads(min((tmp_path / "index").iterdir()).read_text())
    assert again["shard"][:2] == first["shard"][:2] and again["shard"] != first["shard"]
    with pytest.raises(ValueError, match="matches no file"):
        sharded.find_files(f"{tars_in}/*.zip", "webdataset")
    with pytest.raises(ValueError, match="fsspec knows no nowhere://"):
        sharded.find_files("nowhere://bucket/*.tar", "webdataset")


def test_lines_may_be_remote_and_their_pictures_with_them(remote):
    entry = {"file": "p.png", "caption": "c"}
    remote.pipe("/bucket/0.jsonl", json.dumps(entry).encode())
    remote.pipe("/bucket/p.png", picture(5))
    source = Lines("memory://bucket/0.jsonl", OPTIONS)
    assert [source.read(sample) for sample in source.samples] == [picture(5)]
    with pytest.raises(Rejected, match="missing"):
        sharded.read_whole("memory://bucket/none.png")
    with pytest.raises(ValueError, match="cannot be read"):
        Lines("memory://bucket/none.jsonl", OPTIONS)


def test_what_has_to_be_local_says_so(tmp_path):
    with pytest.raises(ValueError, match="folder:gs://a is remote; .*jsonl:"):
        Folder("gs://a", OPTIONS)
    with pytest.raises(ValueError, match="--output=gs://a/b is remote.*verify"):
        Output("gs://a/b", {}, overwrite=False)


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
