import functools
import json
import os

import numpy as np
import pytest
from PIL import Image

from data_pipelines import pipeline
from data_pipelines.samples import Caption, Sample
from data_pipelines.stages import encode, shards
from data_pipelines.stages.latents import Pixels
from data_pipelines.stages.pictures import Picture
from mmdit_jax.data import shapes
from mmdit_jax.encoders import pixels, text
from mmdit_jax.encoders.dispatched import Dispatched

pytestmark = pytest.mark.filterwarnings("ignore")

BAD = {
    "alone.png": "no_caption",
    "corrupt.png": "corrupt",
    "cut off.png": "corrupt",
    "tiny.png": "too_small",
}


def test_shapes_keep_every_picture_caption_and_ground_truth(settings, records):
    asked = settings(source="shapes", count=10, validation_count=3, records_per_shard=4)
    manifest = pipeline.build(asked)
    assert [shard.records for shard in manifest.splits["train"]] == [4, 4, 2]
    assert [shard.records for shard in manifest.splits["validation"]] == [3]
    for split, scene_of in (("train", shapes.train_scene), ("validation", shapes.validation_scene)):
        for index, record in enumerate(records(asked.output, split)):
            scene = scene_of(0, index)
            drawn_HWC = pixels.depth_to_space(record["latent"][None], 1)[0]
            np.testing.assert_array_equal(drawn_HWC, shapes.draw(scene, 16))
            assert dict(zip(record["caption_kinds"], record["captions"], strict=True)) == (
                scene.captions
            )
            assert json.loads(record["objects"]) == json.loads(json.dumps(scene.to_json()))
            assert record["original_size"].tolist() == [16, 16]
            assert record["crop"].tolist() == [0, 0, 16, 16]


def test_text_outputs_are_those_of_the_encoders(settings, records):
    asked = settings(source="shapes", count=6)
    pipeline.build(asked)
    encoders = text.load_text_encoders(
        asked.text_paths(),
        asked.lengths(),
        dtype=pipeline.text.jnp.float32,
        batch_size=asked.batch_size,
    )
    found = records(asked.output) + records(asked.output, "validation")
    expected = text.encode(encoders, [caption for each in found for caption in each["captions"]])
    for number, record in enumerate(found):
        for name, outputs in expected.items():
            for kind, values in outputs.items():
                stored = record[f"text/{name}/{kind}"]
                assert stored.dtype == (np.float16 if kind == "sequence" else np.float32)
                wanted = values[2 * number : 2 * number + 2]
                np.testing.assert_allclose(stored, wanted, rtol=2e-3, atol=2e-3)


def test_pixel_latents_have_mean_zero_and_deviation_one(settings, records):
    asked = settings(source="shapes", count=40)
    manifest = pipeline.build(asked)
    latents = np.stack([record["latent"] for record in records(asked.output)]).astype(np.float64)
    z = (latents - manifest.autoencoder["shift"]) * manifest.autoencoder["scale"]
    assert abs(z.mean()) < 1e-6 and abs(z.std() - 1) < 1e-6
    decoded_BHWC = pixels.decode(z.astype(np.float32), manifest.autoencoder)
    np.testing.assert_array_equal(decoded_BHWC, pixels.depth_to_space(latents, 1))


def test_a_folder_keeps_the_good_pictures_and_names_the_others(settings, images, records, dropped):
    asked = settings(source=f"folder:{images}", validation_count=2)
    manifest = pipeline.build(asked)
    assert dropped(asked.output) == BAD
    assert sum(shard.records for shard in manifest.splits["train"]) == 10
    found = records(asked.output) + records(asked.output, "validation")
    heights = [record["original_size"][0] for record in found]
    assert sorted(heights) == list(range(20, 32))
    for record in found:
        height = int(record["original_size"][0])
        side = min(height, 24)
        box = ((height - side) // 2, (24 - side) // 2, side, side)
        assert tuple(record["crop"]) == box
        picture = Image.open(images / f"{height - 20:02d}.png")
        area = (box[1], box[0], box[1] + side, box[0] + side)
        expected = picture.resize((16, 16), Image.Resampling.LANCZOS, box=area)
        np.testing.assert_array_equal(record["latent"], np.asarray(expected))
    with open(os.path.join(asked.output, "report.json")) as file:
        report = json.load(file)
    assert report["kept"] == {"train": 10, "validation": 2}
    assert {reason: entry["count"] for reason, entry in report["dropped"].items()} == {
        "corrupt": 2,
        "too_small": 1,
        "no_caption": 1,
    }


def test_an_output_inside_the_source_is_not_a_part_of_it(settings, images):
    asked = settings(source=f"folder:{images}", output=str(images / "out"))
    pipeline.build(asked)
    with open(os.path.join(asked.output, "report.json")) as file:
        assert json.load(file)["ignored_files"] == {}


def test_copies_of_one_file_never_stand_on_both_sides(settings, images, records):
    for number in range(12):
        for copy in range(3):
            name = f"copy{copy} of {number:02d}"
            (images / f"{name}.png").write_bytes((images / f"{number:02d}.png").read_bytes())
            (images / f"{name}.txt").write_text("copied")
    asked = settings(source=f"folder:{images}", validation_fraction=0.2)
    pipeline.build(asked)
    sides = [
        {record["latent"].tobytes() for record in records(asked.output, split)}
        for split in ("train", "validation")
    ]
    assert sides[0] and sides[1] and not sides[0] & sides[1]
    with open(os.path.join(asked.output, "report.json")) as file:
        assert json.load(file)["exact_duplicates"] == 36


def test_a_latent_that_is_not_finite_is_dropped_and_reported(settings, monkeypatch, dropped):
    def broken(self, pictures_BHWC):
        latents = pictures_BHWC.astype(np.float32)
        latents[0, 0, 0, 0] = np.nan
        return Dispatched(latents, lambda: latents)

    monkeypatch.setattr(Pixels, "dispatch", broken)
    asked = settings(source="shapes", count=8, validation_count=1, records_per_shard=4)
    manifest = pipeline.build(asked)  # batches of 4: the first of each is broken
    assert [shard.records for shard in manifest.splits["train"]] == [3, 3]
    assert manifest.splits["validation"] == ()
    lost = {"train/0000000", "train/0000004", "validation/0000000"}
    assert dropped(asked.output) == dict.fromkeys(lost, "non_finite")


def test_a_build_that_keeps_nothing_leaves_no_manifest(settings, monkeypatch):
    def nothing(self, x):
        return Dispatched(None, lambda: np.full(x.shape, np.nan, np.float32))

    monkeypatch.setattr(Pixels, "dispatch", nothing)
    asked = settings(source="shapes", count=4)
    with pytest.raises(ValueError, match="none of 4 training pictures could be encoded"):
        pipeline.build(asked)
    assert not os.path.exists(os.path.join(asked.output, "manifest.json"))


def test_the_result_does_not_depend_on_how_captions_are_kept(
    settings, monkeypatch, tmp_path, records
):
    ask = functools.partial(settings, source="shapes", count=30, records_per_shard=10)
    pipeline.build(ask())
    monkeypatch.setattr(shards, "TABLE_BYTES", 0)  # one table per shard
    pipeline.build(ask(output=str(tmp_path / "small")))
    for ours, theirs in zip(records(ask().output), records(tmp_path / "small"), strict=True):
        for field in ours:
            if field.startswith("text/"):
                np.testing.assert_allclose(ours[field], theirs[field], rtol=2e-3, atol=2e-3)


def test_a_content_key_changes_with_everything_that_decides_the_record():
    sample = Sample("a.png", (Caption("a", "original"),))
    picture = Picture(np.zeros((16, 16, 3), np.uint8), (20, 24), (0, 2, 20, 20), "hash")
    autoencoder = {"hash": "pixels"}
    texts = {"t5": {"hash": "t5", "length": 8}}
    identity = encode.encoding_identity(autoencoder, texts, "float32")
    keys = [encode.content_key(picture, sample, identity)]
    for change in (
        {"sha256": "other"},
        {"crop": (0, 1, 20, 20)},
        {"original_size": (20, 25)},
        {"pixels_HWC": np.zeros((32, 32, 3), np.uint8)},
    ):
        keys.append(encode.content_key(picture._replace(**change), sample, identity))
    other = Sample("a.png", (Caption("b", "original"),))
    keys.append(encode.content_key(picture, other, identity))
    for arguments in (
        ({"hash": "kl"}, texts, "float32"),
        (autoencoder, {"t5": {"hash": "other", "length": 8}}, "float32"),
        (autoencoder, {"t5": {"hash": "t5", "length": 9}}, "float32"),
        (autoencoder, texts, "bfloat16"),
    ):
        keys.append(encode.content_key(picture, sample, encode.encoding_identity(*arguments)))
    assert len(set(keys)) == len(keys)
    assert encode.content_key(picture, Sample("b.png", sample.captions), identity) == keys[0]


def test_without_folders_built_in_encoders_are_made_beside_the_data(settings, caplog):
    none = {"clip_l": "", "clip_g": "", "t5": ""}
    asked = settings(source="shapes", count=4, text_length=12, **none)
    manifest = pipeline.build(asked)
    assert "RANDOM weights" in caplog.text
    for name, entry in manifest.text_encoders.items():
        assert entry["path"] == f"encoders/{name}"
        assert asked.output and os.path.isdir(os.path.join(asked.output, entry["path"]))
    assert manifest.autoencoder["id"] == "pixels/1"


def test_encoders_elsewhere_are_recorded_by_absolute_path(settings, encoder_folders, monkeypatch):
    monkeypatch.chdir(os.path.dirname(encoder_folders["t5"]))
    relative = {name: os.path.basename(path) for name, path in encoder_folders.items()}
    manifest = pipeline.build(settings(source="shapes", count=4, **relative))
    assert {n: entry["path"] for n, entry in manifest.text_encoders.items()} == encoder_folders


FOLDER = {"source": "folder:/tmp", "count": None}
NEAR = {**FOLDER, "deduplicate": "near"}


@pytest.mark.parametrize(
    "change, message",
    [
        ({"resolution": 100}, "--resolution=100 is no multiple of 16"),
        ({"resolution": 0}, "--resolution=0 is no multiple of 16"),
        ({"count": 0}, "--count=0 is too small; use 1 or more"),
        ({"batch_size": 0}, "--batch_size=0 is too small"),
        ({"validation_fraction": 1.5}, "--validation_fraction=1.5 is not a fraction"),
        ({"text_dtype": "int8"}, "--text_dtype=int8 is unknown; use float32 or bfloat16"),
        ({"t5": ""}, "--t5 not given although another text encoder is"),
        ({"clip_l": "/nowhere"}, "/nowhere is no folder"),
        ({"source": "folder:/nowhere", "count": None}, "--source=folder:/nowhere is not a folder"),
        ({"source": "folder:", "count": None}, "--source=folder names no DIR"),
        ({"source": "imagenet"}, "--source=imagenet is unknown; use one of shapes, folder"),
        ({"source": "shapes:big"}, "take none"),
        (
            {"source": "folder:/tmp", "count": 5},
            "--count=5 has no effect: --source=folder:/tmp is used whole",
        ),
        ({"max_aspect": 2.0}, "--max_aspect=2.0 has no effect: --source=shapes draws"),
        ({"near_clusters": 2}, "--near_clusters=2 has no effect: it needs --deduplicate=near"),
        ({**FOLDER, "max_aspect": 0.5}, "--max_aspect=0.5 is the longer side over the shorter"),
        ({**FOLDER, "deduplicate": "all"}, "--deduplicate=all is unknown; use none, exact, near"),
        ({**FOLDER, "score": "good"}, "--score has 'good', a rule is NAME"),
        ({**FOLDER, "score": "a>=x"}, "--score has 'a>=x', a rule is NAME"),
        ({**FOLDER, "filter": "nowhere:f"}, "--filter=nowhere:f cannot be imported"),
        ({**FOLDER, "filter": "json:nothing"}, "--filter=json:nothing cannot be imported"),
        ({**FOLDER, "filter": "json:__doc__"}, "--filter=json:__doc__ is a str, a function"),
        ({**NEAR, "embedding": "json:dumps"}, "--near_threshold=None of --embedding=json:dumps"),
        ({**NEAR, "near_threshold": 1.5}, "--near_threshold=1.5 of --embedding=phash is a number"),
        ({**FOLDER, "source": "webdataset:/no/*.tar"}, "--source=webdataset:/no/*.tar matches no"),
        ({**FOLDER, "source": "jsonl:/no/x.jsonl"}, "--source=jsonl:/no/x.jsonl cannot be read"),
        ({"autoencoder": "magic"}, "--autoencoder=magic is unknown; use one of pixels"),
        ({"pixel_factor": 5}, "--pixel_factor=5 does not divide --resolution=16"),
        ({"output": "/dev/null/out"}, "--output=/dev/null/out cannot be written"),
        ({"text_length": 1}, "--text_length=1 is too small"),
        ({"text_length": 78}, "length 78 does not fit"),
    ],
)
def test_mistakes_are_named_with_their_remedy(settings, change, message):
    asked = settings(**{"source": "shapes", "count": 4, **change})
    with pytest.raises((ValueError, FileNotFoundError)) as caught:
        pipeline.build(asked)
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_the_command_ends_with_the_next_command_or_with_one_line_and_exit_code_2(
    encoder_folders, tmp_path, commands
):
    arguments = [f"--output={tmp_path / 'out'}", "--source=shapes", "--count=4", "--text_length=8"]
    arguments += [f"--{name}={path}" for name, path in encoder_folders.items()]
    assert commands.run("data_pipelines.build", *arguments, "--resolution=17", code=2) == (
        "error: --resolution=17 is no multiple of 16 (autoencoder 8 x patch 2); use 16\n"
    )
    said = commands.run("data_pipelines.build", *arguments, "--resolution=16")
    assert f"--config.data.path={tmp_path / 'out'}" in said
