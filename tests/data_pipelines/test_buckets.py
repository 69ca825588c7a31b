"""Aspect buckets: every picture at the size nearest to it, every shard of one size."""

import functools
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data_pipelines import pipeline
from data_pipelines.stages import shards
from mmdit_jax.data.loader import Loader
from mmdit_jax.data.manifest import Bucket, Manifest
from mmdit_jax.encoders.pixels import depth_to_space

pytestmark = pytest.mark.filterwarnings("ignore")

# Height and width of the picture -> bucket; the sizes at 32 px in steps of 16 are 1:4, 1:1, 4:1.
PICTURES = {
    (40, 40): (32, 32),
    (32, 60): (32, 32),
    (20, 70): (16, 64),
    (16, 64): (16, 64),
    (30, 90): (16, 64),
    (100, 25): (64, 16),
}


@pytest.fixture
def pictures(tmp_path):
    """Three of each size: a gradient from black on the left to blue on the right."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    for number, (height, width) in enumerate(list(PICTURES) * 3):
        picture = np.zeros((height, width, 3), np.uint8)
        picture[..., 2] = np.linspace(0, 255, width).astype(np.uint8)
        picture[..., 1] = number
        Image.fromarray(picture).save(folder / f"{number:02d}.png")
        (folder / f"{number:02d}.txt").write_text(f"picture {number}")
    return folder


@pytest.fixture
def bucketed(settings, pictures):
    return functools.partial(
        settings,
        source=f"folder:{pictures}",
        resolution=32,
        buckets="aspect",
        bucket_step=16,
        validation_count=4,
        records_per_shard=3,
    )


def test_every_picture_has_the_size_nearest_to_it(bucketed, records, capsys):
    manifest = pipeline.build(bucketed())
    assert manifest.buckets == (Bucket(16, 64), Bucket(32, 32), Bucket(64, 16))
    found = records(bucketed().output) + records(bucketed().output, "validation")
    assert len(found) == 18
    for record in found:
        size = PICTURES[tuple(record["original_size"].tolist())]
        picture = depth_to_space(record["latent"][None], 2)[0]
        assert picture.shape == (*size, 3)
        # The crop is of the same shape, in the middle, and as long as the picture on one axis.
        top, left, height, width = record["crop"].tolist()
        assert height / width == pytest.approx(size[0] / size[1], rel=0.05)
        whole = record["original_size"].tolist()
        assert height == whole[0] or width == whole[1]
        assert abs(whole[0] - height - 2 * top) <= 1 and abs(whole[1] - width - 2 * left) <= 1
        blue = picture[..., 2].astype(int)
        assert blue[0, 0] == pytest.approx(255 * left / (whole[1] - 1), abs=9)
    report = json.loads((Path(bucketed().output) / "report.json").read_text())
    assert report["buckets"] == {"16x64": 9, "32x32": 6, "64x16": 3}
    assert "9 16x64" in capsys.readouterr().out


def test_every_shard_is_of_one_bucket_and_the_loader_reads_them(bucketed):
    manifest = pipeline.build(bucketed())
    for split in ("train", "validation"):
        loader = Loader(bucketed().output, split=split, batch_size=2, seed=0)
        for bucket in loader.filled_buckets():
            size = manifest.buckets[bucket]
            ids = loader.bucket_ids(bucket)
            latents = loader.examples(ids)["latent"]
            assert latents.shape[1:3] == (size.height // 2, size.width // 2)
    assert sum(loader.counts) == 4
    assert all(shard.records <= 3 for shard in manifest.splits["train"])
    assert len({shard.file for shard in manifest.splits["train"]}) == len(manifest.splits["train"])


def test_an_interrupted_build_ends_like_an_uninterrupted_one(bucketed, tmp_path, monkeypatch, tree):
    pipeline.build(bucketed(output=str(tmp_path / "whole")))
    with monkeypatch.context() as patch:
        left = iter(range(2))
        write = shards._write_shard

        def interrupted(*arguments):
            if next(left, None) is None:
                raise KeyboardInterrupt
            return write(*arguments)

        patch.setattr(shards, "_write_shard", interrupted)
        with pytest.raises(KeyboardInterrupt):
            pipeline.build(bucketed())
    pipeline.build(bucketed())
    assert tree(tmp_path / "out") == tree(tmp_path / "whole")


def test_a_longer_picture_goes_to_the_longest_bucket_unless_max_aspect_drops_it(
    bucketed, pictures, dropped
):
    Image.new("RGB", (200, 20)).save(pictures / "long.png")
    (pictures / "long.txt").write_text("long")
    manifest = pipeline.build(bucketed())
    assert sum(shard.records for shards in manifest.splits.values() for shard in shards) == 19
    manifest = pipeline.build(bucketed(max_aspect=4.0, overwrite=True))
    assert Bucket(16, 64) in manifest.buckets and dropped(bucketed().output) == {
        "long.png": "aspect"
    }
    with pytest.raises(ValueError, match="only the square .* --max_aspect=3: use"):
        pipeline.build(bucketed(max_aspect=3.0, overwrite=True))


def test_near_copies_are_compared_at_one_size(bucketed, records, dropped):
    """The same gradient in three sizes: one is kept."""
    pipeline.build(bucketed(deduplicate="near", validation_count=0))
    assert list(dropped(bucketed().output).values()) == ["near_duplicate"] * 17
    assert len(records(bucketed().output)) == 1


def test_a_square_build_has_one_bucket_and_no_histogram(settings, images, capsys):
    manifest = pipeline.build(settings(source=f"folder:{images}"))
    assert manifest.buckets == (Bucket(16, 16),)
    assert "buckets" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"buckets": "wide"}, "--buckets=wide.*square or aspect"),
        ({"bucket_step": 24}, "--bucket_step=24.*16.*use 32|--bucket_step=24.*use 16"),
        ({"bucket_step": 48}, "32 is no multiple of the bucket step 48"),
        ({"bucket_step": 32}, "only the square at --resolution=32, --bucket_step=32"),
        ({"buckets": "square"}, "--bucket_step=16 has no effect.*--buckets=aspect"),
        ({"source": "shapes"}, "--buckets=aspect has no effect.*shapes"),
        ({"pixel_factor": 32}, "--bucket_step=16 is no multiple of the factor 32"),
    ],
)
def test_settings_that_cannot_be_are_refused(bucketed, change, words):
    with pytest.raises(ValueError, match=words):
        pipeline.build(bucketed(**change))


def test_the_manifest_says_the_bucket_of_every_shard(bucketed):
    pipeline.build(bucketed())
    manifest = Manifest.load(bucketed().output)
    numbers = [shard.bucket for shard in manifest.splits["train"]]
    assert numbers == sorted(numbers) and set(numbers) == {0, 1, 2}
