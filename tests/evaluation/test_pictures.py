"""FID, CLIP score and path length of sampled pictures: exact for any count, batch and mesh."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from mmdit_jax import sharding
from mmdit_jax.encoders import clip_image
from mmdit_jax.evaluation import clip_score, fid, frechet, path_length
from mmdit_jax.evaluation.features import PictureFeatures
from mmdit_jax.evaluation.sampling import Sampler, SampleSettings
from mmdit_jax.flow import formulation as formulation_lib


def make_features(batch_size=8, devices=1, scale=1.0):
    """The mean and the spread of each channel."""

    def apply(params, x_BHWC):
        x_BHWC = params * x_BHWC.astype(jnp.float32)
        return jnp.concatenate([x_BHWC.mean((1, 2)), x_BHWC.std((1, 2))], -1)

    return PictureFeatures(
        apply,
        jnp.float32(scale),
        lambda picture: clip_image.prepare(picture, 8),
        {"network": "moments", "scale": scale},
        mesh=sharding.make_mesh(devices=jax.devices()[:devices]),
        batch_size=batch_size,
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("pictures")
    rng = np.random.default_rng(0)
    for i in range(19):
        size = (8 + i, 12 + 2 * (i % 3), 3)
        Image.fromarray(rng.integers(0, 256, size, np.uint8)).save(path / f"{i:02d}.png")
    return path


def test_features_do_not_depend_on_batch_size_or_mesh(folder):
    pictures = list(fid.folder_source(folder).pictures())
    base = make_features(batch_size=1)(pictures)
    assert base.shape == (19, 6)
    for other in (make_features(batch_size=8), make_features(batch_size=19, devices=8)):
        np.testing.assert_allclose(other(pictures), base, rtol=1e-5)


def test_statistics_are_kept_by_what_decides_them(folder, tmp_path):
    source = fid.folder_source(folder)
    first = fid.reference(make_features(), source, tmp_path)
    assert first.count == 19 and len(list(tmp_path.iterdir())) == 1

    def never():
        raise AssertionError("kept statistics are read")

    again = fid.reference(make_features(), source._replace(pictures=never), tmp_path)
    np.testing.assert_array_equal(again.covariance_DD, first.covariance_DD)
    fid.reference(make_features(scale=2.0), source, tmp_path)  # another network
    fid.reference(make_features(), source._replace(about={"other": 1}), tmp_path)
    files = list(tmp_path.iterdir())
    assert len(files) == 3
    for file in files:
        file.write_bytes(b"PK damaged")
    repaired = fid.reference(make_features(), source, tmp_path)
    np.testing.assert_array_equal(repaired.covariance_DD, first.covariance_DD)


def test_a_changed_picture_is_another_reference(folder, tmp_path):
    before = fid.folder_source(folder).about
    (tmp_path / "a").symlink_to(folder)
    for file in folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "a").unlink()
    assert fid.folder_source(tmp_path).about == before
    Image.new("RGB", (9, 9)).save(tmp_path / "03.png")
    assert fid.folder_source(tmp_path).about != before


def test_fid_of_the_reference_itself_is_zero_and_parts_do_not_matter(folder):
    network, source = make_features(), fid.folder_source(folder)
    reference = fid.reference(network, source)
    same = fid.Fid("fid", network, reference)
    for picture in source.pictures():
        same.add([""], picture[None])
    assert same.metrics()["fid"] == pytest.approx(0, abs=1e-6)
    darker = fid.Fid("fid", network, reference)
    for picture in source.pictures():
        darker.add([""], picture[None] // 2)
    direct = frechet.Moments()
    direct.add(network(picture // 2 for picture in source.pictures()))
    expected = frechet.distance(direct.gaussian(), reference)
    assert darker.metrics()["fid"] == pytest.approx(expected, rel=1e-9) and expected > 1


def test_a_folder_without_pictures_and_a_damaged_one_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="holds no pictures"):
        fid.folder_source(tmp_path)
    (tmp_path / "a.png").write_bytes(b"no picture")
    with pytest.raises(ValueError, match="a.png is no picture"):
        list(fid.folder_source(tmp_path).pictures())


@pytest.mark.parametrize(
    ("size", "box"), [((16, 8), (4, 0, 12, 8)), ((8, 24), (0, 8, 8, 16)), ((8, 8), (0, 0, 8, 8))]
)
def test_clip_sees_the_middle(size, box):
    picture = np.random.default_rng(1).integers(0, 256, (size[1], size[0], 3), np.uint8)
    left, top, right, bottom = box
    np.testing.assert_array_equal(clip_image.prepare(picture, 8), picture[top:bottom, left:right])


class FakeText:
    """A prompt is a direction in the space of the features: "2" is the third axis."""

    def encode(self, prompts):
        return {"pooled": 7 * np.eye(6, dtype=np.float32)[[int(p) for p in prompts]]}


def test_clip_score_is_a_hundred_times_the_cosine():
    score = clip_score.ClipScore(make_features(), FakeText())
    flat = np.zeros((2, 8, 8, 3), np.uint8)
    flat[0, ..., 1], flat[1] = 200, 90  # green; grey
    score.add(["1"], flat[:1])
    score.add(["0"], flat[1:])
    expected = [100, 100 / np.sqrt(3)]
    found = score.metrics()
    assert found["clip_score"] == pytest.approx(np.mean(expected), rel=1e-5)
    stderr = np.std(expected, ddof=1) / np.sqrt(2)
    assert found["clip_score_stderr"] == pytest.approx(stderr, rel=1e-5)


def make_sampler(predict, devices=1):
    return Sampler(
        predict=predict,
        assemble=lambda text, keep: text["x"],
        encode=lambda texts: {"x": np.zeros((len(texts), 1), np.float32)},
        decode=lambda z: jnp.clip(jnp.round(128 + 30 * z), 0, 255).astype(jnp.uint8),
        formulation=formulation_lib.make(),
        latent_shape=(4, 4, 3),
        mesh=sharding.make_mesh(devices=jax.devices()[:devices]),
        settings=SampleSettings(steps=3, cfg=1.0),
        batch_size=4,
    )


def straight(params, z, t, condition):
    """The velocity towards one point: paths are straight, at any number of steps."""
    del condition
    return (z - params) / jnp.maximum(t, 1e-3).reshape(-1, 1, 1, 1)


def test_straight_paths_are_as_long_as_they_reach():
    sampler = make_sampler(straight)
    found = path_length.path_length(
        lambda n: sampler.with_settings(steps=n), jnp.float32(2.0), ["0"] * 6
    )
    assert found["straightness"] == pytest.approx(1, abs=1e-5)
    assert found["path_length"] == pytest.approx(found["displacement"], rel=1e-5)
    # |eps - 2| of 48 dimensions
    assert found["path_length"] == pytest.approx(np.sqrt(48 * 5), rel=0.15)
    assert "clip_score_50" not in found and sampler.settings.steps == 3


def test_a_curved_path_is_longer_and_few_steps_score_less():
    def curved(params, z, t, condition):
        del params, condition
        return jnp.stack([-20 * z[..., 1], 20 * z[..., 0], 0 * z[..., 2]], -1)

    found = path_length.path_length(
        lambda n: make_sampler(curved, devices=8).with_settings(steps=n),
        jnp.float32(0),
        ["0", "1", "2"] * 3,
        lambda: clip_score.ClipScore(make_features(), FakeText()),
    )
    assert found["straightness"] < 0.5
    assert found["path_length"] > 2 * found["displacement"]
    best = found["clip_score_50"]
    for steps in (5, 10, 20):
        decrease = 100 * (best - found[f"clip_score_{steps}"]) / best
        assert found[f"clip_decrease_{steps}"] == pytest.approx(decrease)


def test_the_table_has_the_columns_of_the_paper():
    paper = {
        "clip_decrease_5": 4.30,
        "clip_decrease_10": 0.86,
        "clip_decrease_20": 0.21,
        "path_length": 191.13,
    }
    lines = path_length.table([("15", paper), ("30", {"path_length": 187.96})]).splitlines()
    assert lines[0] == "| run | 5/50 | 10/50 | 20/50 | path length |"
    assert lines[1] == "|---|---|---|---|---|"
    assert lines[2] == "| 15 | 4.30% | 0.86% | 0.21% | 191.13 |"
    assert lines[3] == "| 30 | - | - | - | 187.96 |"
