import json
import os

import pytest
from PIL import Image

from data_pipelines.samples import Options, fingerprint
from data_pipelines.sources.folders import Folder

OPTIONS = Options(resolution=16)


def put(path, content=None):
    """A small image, or a file with the given text or bytes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if content is None:
        Image.new("RGB", (16, 16), (1, 2, 3)).save(path)
    elif isinstance(content, bytes):
        path.write_bytes(content)
    else:
        path.write_text(content, encoding="utf-8")


def lines(*entries):
    return "\n".join(json.dumps(entry) for entry in entries) + "\n"


def told(folder):
    return {
        sample.name: [tuple(caption) for caption in sample.captions] for sample in folder.samples
    }


def reasons(folder):
    return {case.name: case.reason for case in folder.dropped}


def test_a_text_file_beside_the_image_is_one_caption(tmp_path):
    put(tmp_path / "b/c.png")
    put(tmp_path / "b/c.txt", "\ufeff  two\nlines \n")
    put(tmp_path / "a.png")
    put(tmp_path / "a.txt", "first")
    folder = Folder(str(tmp_path), OPTIONS)
    assert told(folder) == {
        "a.png": [("first", "original")],
        "b/c.png": [("two\nlines", "original")],
    }
    assert folder.dropped == [] and not folder.ignored


def test_caption_lines_of_every_spelling_add_up_per_picture(tmp_path):
    for name in ("a.png", "sub/b.png", "c.png"):
        put(tmp_path / name)
    put(
        tmp_path / "captions.jsonl",
        lines(
            {"file": "a.png", "caption": " one ", "synthetic_caption": "A one."},
            {"file_name": "./sub/../a.png", "captions": ["two", "one"], "text": None},
            {"image": str(tmp_path / "c.png"), "text": "absolute", "synthetic": ["x", "y"]},
        ),
    )
    put(tmp_path / "sub/metadata.jsonl", lines({"file_name": "b.png", "text": "own folder"}))
    put(tmp_path / "a.txt", "not asked, because a line names the picture")
    folder = Folder(str(tmp_path), OPTIONS)
    assert told(folder) == {
        "a.png": [("one", "original"), ("A one.", "synthetic"), ("two", "original")],
        "c.png": [("absolute", "original"), ("x", "synthetic"), ("y", "synthetic")],
        "sub/b.png": [("own folder", "original")],
    }
    assert folder.ignored == {".txt": 1}


def test_paths_out_of_the_folder_are_refused_even_if_they_exist(tmp_path):
    put(tmp_path / "secret.png")
    put(tmp_path / "data/ok.png")
    put(
        tmp_path / "data/captions.jsonl",
        lines(
            {"file": "ok.png", "caption": "ok"},
            {"file": "../secret.png", "caption": "no"},
            {"file": "x/../../secret.png", "caption": "no"},
            {"file": str(tmp_path / "secret.png"), "caption": "no"},
        ),
    )
    folder = Folder(str(tmp_path / "data"), OPTIONS)
    assert list(told(folder)) == ["ok.png"]
    assert reasons(folder) == {f"captions.jsonl line {n}": "outside" for n in (2, 3, 4)}


def test_lines_that_cannot_be_used_are_named_and_the_others_count(tmp_path):
    put(tmp_path / "a.png")
    good = json.dumps({"file": "a.png", "caption": "fine"})
    bad = [
        "{not json",
        "[1, 2]",
        json.dumps({"caption": "of nothing"}),
        json.dumps({"file": "a\0.png", "caption": "nul"}),
        json.dumps({"file": "a.png", "caption": 7}),
        '{"file": "a.png", "caption": "\\ud800 half a pair"}',
        "[" * 100_000,
    ]
    put(tmp_path / "captions.jsonl", "\n".join([*bad, "", good]))
    folder = Folder(str(tmp_path), OPTIONS)
    assert told(folder) == {"a.png": [("fine", "original")]}
    numbers = range(1, len(bad) + 1)
    assert reasons(folder) == {f"captions.jsonl line {n}": "bad_caption" for n in numbers}


def test_every_picture_without_a_usable_caption_is_dropped_by_name(tmp_path):
    for name in ("none.png", "empty.png", "blank line.png", "latin1.png", "ok.png"):
        put(tmp_path / name)
    put(tmp_path / "ok.txt", "ok")
    put(tmp_path / "empty.txt", " \n ")
    put(tmp_path / "latin1.txt", "caf\xe9".encode("latin-1"))
    put(
        tmp_path / "captions.jsonl",
        lines(
            {"file": "blank line.png", "captions": ["", "  "]}, {"file": "gone.png", "text": "x"}
        ),
    )
    folder = Folder(str(tmp_path), OPTIONS)
    assert list(told(folder)) == ["ok.png"]
    assert reasons(folder) == {
        "none.png": "no_caption",
        "empty.png": "no_caption",
        "blank line.png": "no_caption",
        "latin1.png": "bad_caption",
        "gone.png": "missing",
    }


def test_strange_names_are_files_like_others(tmp_path):
    names = ["Ünï code 日本.png", "emoji 🎈.JPG", "-rf.png", "new\nline.png", "quote'\".png"]
    for name in names:
        put(tmp_path / name)
        put((tmp_path / name).with_suffix(".txt"), "a caption")
    not_utf8 = os.fsdecode(b"\xff\xfe.png")
    put(tmp_path / not_utf8)
    put(tmp_path / os.fsdecode(b"\xff\xfe.txt"), "bytes")
    folder = Folder(str(tmp_path), OPTIONS)
    assert sorted(told(folder)) == sorted([*names, not_utf8])
    assert all(folder.read(sample) for sample in folder.samples)
    assert fingerprint(folder) == fingerprint(Folder(str(tmp_path), OPTIONS))


def test_what_is_no_image_is_counted_and_not_dropped(tmp_path):
    put(tmp_path / "a.png")
    put(tmp_path / "a.txt", "a")
    put(tmp_path / "notes.md", "x")
    put(tmp_path / "LICENSE", "x")
    put(tmp_path / "._a.png", "resource fork")
    put(tmp_path / ".git/b.png")
    folder = Folder(str(tmp_path), OPTIONS)
    assert list(told(folder)) == ["a.png"] and not folder.dropped
    assert folder.ignored == {".md": 1, "no extension": 1, "hidden": 1}


def test_links_are_followed_once_and_pipes_are_not_opened(tmp_path):
    put(tmp_path / "blobs/1.png")
    put(tmp_path / "data/a.txt", "linked file")
    os.symlink(tmp_path / "blobs/1.png", tmp_path / "data/a.png")
    put(tmp_path / "elsewhere/b.png")
    put(tmp_path / "elsewhere/b.txt", "linked folder")
    os.symlink(tmp_path / "elsewhere", tmp_path / "data/more")
    os.symlink(tmp_path / "data", tmp_path / "data/loop")
    os.mkfifo(tmp_path / "data/pipe.png")
    put(tmp_path / "data/pipe.txt", "would block for ever")
    folder = Folder(str(tmp_path / "data"), OPTIONS)
    assert list(told(folder)) == ["a.png", "more/b.png"]
    assert reasons(folder) == {"pipe.png": "unreadable"}


def test_a_broken_link_is_missing_and_a_file_that_vanished_is_unreadable(tmp_path):
    os.symlink(tmp_path / "nowhere.png", tmp_path / "link.png")
    put(tmp_path / "a.png")
    put(tmp_path / "a.txt", "a")
    folder = Folder(str(tmp_path), OPTIONS)
    assert reasons(folder) == {"link.png": "missing"}
    (tmp_path / "a.png").unlink()
    with pytest.raises(Exception, match="unreadable"):
        folder.read(folder.samples[0])


def test_the_output_folder_is_not_searched(tmp_path):
    put(tmp_path / "a.png")
    put(tmp_path / "a.txt", "a")
    put(tmp_path / "out/b.png")
    folder = Folder(str(tmp_path), Options(resolution=16, exclude=str(tmp_path / "out")))
    assert list(told(folder)) == ["a.png"] and not folder.dropped and not folder.ignored


def test_folders_without_images_are_the_users_mistake(tmp_path):
    with pytest.raises(ValueError, match="is not a folder"):
        Folder(str(tmp_path / "none"), OPTIONS)
    put(tmp_path / "readme.md", "x")
    with pytest.raises(ValueError, match="holds no image"):
        Folder(str(tmp_path), OPTIONS)


def test_the_fingerprint_sees_captions_names_and_sizes(tmp_path):
    put(tmp_path / "a.png")
    put(tmp_path / "a.txt", "a")
    seen = {fingerprint(Folder(str(tmp_path), OPTIONS))}
    put(tmp_path / "a.txt", "b")
    seen.add(fingerprint(Folder(str(tmp_path), OPTIONS)))
    put(tmp_path / "a.png", b"longer or shorter")
    seen.add(fingerprint(Folder(str(tmp_path), OPTIONS)))
    os.rename(tmp_path / "a.png", tmp_path / "b.png")
    os.rename(tmp_path / "a.txt", tmp_path / "b.txt")
    seen.add(fingerprint(Folder(str(tmp_path), OPTIONS)))
    assert len(seen) == 4
