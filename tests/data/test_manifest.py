"""A manifest is complete, checked against the files, and compared with the config."""

import dataclasses
import json
import os
import time

import pytest

from mmdit_jax.data.manifest import SCHEMA, Bucket, Manifest, Shard, file_sha256, fits

EXPECTED = {
    "resolution": 256,
    "autoencoder": {"factor": 8, "channels": 16, "kind": "moments", "id": "", "hash": None},
    "text_encoders": {
        "clip_l": {"length": 77, "width": 768, "pooled_width": 768, "id": "openai"},
        "t5": {"length": 77, "width": 4096, "pooled_width": None},
    },
}


def _manifest(directory, shards=3, size=100):
    entries = []
    for number in range(shards):
        path = directory / f"{number}.arrayrecord"
        path.write_bytes(bytes([number % 256]) * size)
        entries.append(Shard(path.name, number % 2, 10, size, file_sha256(path)))
    return Manifest(
        splits={"train": tuple(entries[:-1]), "validation": tuple(entries[-1:])},
        buckets=(Bucket(256, 256), Bucket(192, 320)),
        autoencoder={"factor": 8, "channels": 16, "kind": "moments", "id": "vae", "hash": "a1"},
        text_encoders={
            "clip_l": {"length": 77, "width": 768, "pooled_width": 768, "id": "openai"},
            "clip_g": {"length": 77, "width": 1280, "pooled_width": 1280, "id": "laion"},
            "t5": {"length": 77, "width": 4096, "pooled_width": None, "id": "google"},
        },
        resolution=256,
        source="shapes",
        build={"arguments": ["--resolution=256"]},
    )


@pytest.fixture
def saved(tmp_path):
    manifest = _manifest(tmp_path)
    manifest.save(tmp_path)
    return tmp_path, manifest


def _edit(directory, **changes):
    path = directory / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_save_and_load_round_trip(saved):
    directory, manifest = saved
    assert Manifest.load(directory) == manifest


def test_a_failed_save_leaves_the_old_manifest(saved, monkeypatch):
    directory, manifest = saved
    monkeypatch.setattr(os, "fsync", lambda _: (_ for _ in ()).throw(OSError(28, "disk full")))
    with pytest.raises(OSError, match="disk full"):
        dataclasses.replace(manifest, resolution=512).save(directory)
    assert Manifest.load(directory) == manifest
    assert not list(directory.glob("*.partial"))


def test_a_missing_data_set_says_how_to_build_one(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere is not a directory.*data_pipelines.build"):
        Manifest.load(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match="manifest.json is missing"):
        Manifest.load(tmp_path)


def test_another_schema_prints_both_versions(saved):
    _edit(saved[0], schema=SCHEMA + 1, unknown_field=1)
    with pytest.raises(
        ValueError, match=f"schema {SCHEMA + 1}, this version reads schema 1 and {SCHEMA}"
    ):
        Manifest.load(saved[0])


def test_a_data_set_from_before_there_was_a_choice_of_text_is_full_and_in_half_precision(saved):
    directory, manifest = saved
    path = directory / "manifest.json"
    fields = json.loads(path.read_text())
    del fields["text_storage"], fields["text_precision"]
    path.write_text(json.dumps(fields | {"schema": 1}))
    loaded = Manifest.load(directory)
    assert loaded == manifest
    assert (loaded.text_storage, loaded.text_precision) == ("full", "float16")
    assert loaded.fingerprint() == manifest.fingerprint()


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '"schema"', "\x80"])
def test_damaged_json_is_one_clear_error(saved, text):
    (saved[0] / "manifest.json").write_text(text, encoding="latin-1")
    with pytest.raises(ValueError, match="manifest.json is not a manifest") as error:
        Manifest.load(saved[0])
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "changes, rule",
    [
        ({"unknown": 1}, "does not follow schema"),
        ({"splits": {"train": [{"file": "a"}]}}, "does not follow schema"),
        ({"splits": []}, "does not follow schema"),
        ({"splits": {"train": [["a", 0, "ten", 1, ""]]}}, "does not follow schema"),
        ({"splits": {"train": []}}, "counts 0 records"),
        ({"buckets": []}, "is in bucket 0, there are 0"),
        ({"caption_mix": {"original": 0}}, "caption_mix"),
        ({"caption_mix": {"original": -1, "synthetic": 2}}, "caption_mix"),
        ({"caption_mix": {}}, "caption_mix"),
    ],
)
def test_contents_that_cannot_be_are_refused(saved, changes, rule):
    _edit(saved[0], **changes)
    with pytest.raises(ValueError, match=rule):
        Manifest.load(saved[0])


def test_every_missing_or_resized_shard_is_listed_at_once(saved):
    directory, _ = saved
    (directory / "0.arrayrecord").unlink()
    (directory / "2.arrayrecord").write_bytes(b"short")
    with pytest.raises(ValueError) as error:
        Manifest.load(directory)
    message = str(error.value)
    assert message.startswith("2 of 3 shards")
    assert "0.arrayrecord (No such file" in message
    assert "2.arrayrecord (5 bytes, 100 when written)" in message
    assert "1.arrayrecord" not in message
    assert Manifest.load(directory, check_shards=False).resolution == 256


def test_contents_are_hashed_when_asked(saved):
    directory, manifest = saved
    (directory / "1.arrayrecord").write_bytes(b"x" * 100)
    manifest.check_shards(directory)
    with pytest.raises(ValueError, match="1 of 3 shards.*1.arrayrecord [(]other contents"):
        manifest.check_shards(directory, contents=True)


def test_ten_thousand_shards_load_in_seconds(tmp_path):
    _manifest(tmp_path, shards=10_000, size=1).save(tmp_path)
    start = time.perf_counter()
    Manifest.load(tmp_path)
    assert time.perf_counter() - start < 3


def test_a_data_set_that_fits_is_accepted(saved):
    fits(saved[1], EXPECTED)
    fits(saved[1], {})


def test_every_mismatch_is_in_one_line_with_both_values(saved):
    wrong = {
        "resolution": 512,
        "text_storage": "trimmed",
        "autoencoder": {"factor": 8, "channels": 4, "kind": "mean", "hash": "b2"},
        "text_encoders": {
            "t5": {"length": 256, "width": 4096, "id": "other"},
            "t6": {"length": 77},
        },
    }
    with pytest.raises(ValueError) as error:
        fits(saved[1], wrong)
    message = str(error.value)
    for part in (
        "resolution is 256 in the data set, 512 in the config",
        "autoencoder.channels is 16 in the data set, 4 in the config",
        "autoencoder.kind is 'moments' in the data set, 'mean' in the config",
        "autoencoder.hash is 'a1' in the data set, 'b2' in the config",
        "text_encoders.t5.length is 77 in the data set, 256 in the config",
        "text_encoders.t5.id is 'google' in the data set, 'other' in the config",
        "text_storage is 'full' in the data set, 'trimmed' in the config",
        "text_encoders.t6 is absent from the data set, {'length': 77} in the config",
        "rebuild",
    ):
        assert part in message
    assert "factor" not in message and "width" not in message and "\n" not in message


def test_a_fingerprint_follows_everything_that_numbers_the_samples(saved):
    manifest = saved[1]
    first, *rest = manifest.splits["train"]
    changed = [
        dataclasses.replace(first, file="other"),
        dataclasses.replace(first, bucket=1),
        dataclasses.replace(first, records=11),
        dataclasses.replace(first, bytes=101),
        dataclasses.replace(first, sha256="0"),
    ]
    variants = [(shard, *rest) for shard in changed] + [(*rest, first), tuple(rest)]
    prints = [
        dataclasses.replace(manifest, splits={**manifest.splits, "train": shards}).fingerprint()
        for shards in variants
    ]
    prints.append(dataclasses.replace(manifest, caption_mix={"original": 1.0}).fingerprint())
    prints.append(manifest.fingerprint())
    assert len(set(prints)) == len(prints)
    assert dataclasses.replace(manifest, source="elsewhere").fingerprint() == prints[-1]
    assert Manifest.load(saved[0]).fingerprint() == prints[-1]
