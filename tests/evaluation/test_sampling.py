"""The sampler: reproducible pictures, guidance through the trained null condition, grids."""

import jax
import jax.numpy as jnp
import numpy as np

from mmdit_jax import sharding
from mmdit_jax.encoders.conditioning import assemble
from mmdit_jax.evaluation.sampling import Sampler, SampleSettings, draw_grid
from mmdit_jax.flow import formulation as formulation_lib

WIDTH = 6


def encode(texts):
    """A caption's features are its length."""
    value = np.array([len(text) / 10 for text in texts], np.float32)
    sequence = np.broadcast_to(value[:, None, None], (len(texts), 2, WIDTH))
    return {
        "clip_l": {"sequence": sequence[..., :3], "pooled": np.stack([value] * 3, 1)},
        "clip_g": {"sequence": sequence[..., :3], "pooled": np.stack([value] * 3, 1)},
        "t5": {"sequence": sequence},
    }


def predict(params, z, t, condition):
    """The exact velocity of data that is one constant per caption: x0 = mean of the pooled.

    With params None, something that keeps the noise visible.
    """
    if params is None:
        return 0.3 * z
    _, pooled = condition
    x0 = params * jnp.mean(pooled, axis=1).reshape(-1, 1, 1, 1)
    return (z - x0) / jnp.maximum(t, 1e-3).reshape(-1, 1, 1, 1)


def sampler(devices=1, batch_size=4, **settings):
    return Sampler(
        predict=predict,
        assemble=lambda text, keep: assemble(text, WIDTH, keep),
        encode=encode,
        decode=lambda z: jnp.clip(jnp.round(z * 100), 0, 255).astype(jnp.uint8),
        formulation=formulation_lib.make(),
        latent_shape=(4, 4, 3),
        mesh=sharding.make_mesh(devices=jax.devices()[:devices]),
        settings=SampleSettings(**{"steps": 4, "cfg": 1.0, **settings}),
        batch_size=batch_size,
    )


PROMPTS = ["a", "four", "seven char", "x" * 13, "a"]


def test_euler_reaches_the_data_of_an_exact_velocity():
    pictures = sampler()(1.0, PROMPTS)
    assert pictures.shape == (5, 4, 4, 3) and pictures.dtype == np.uint8
    for picture, prompt in zip(pictures, PROMPTS, strict=True):
        assert np.abs(picture.astype(int) - 10 * len(prompt)).max() <= 1


def test_guidance_moves_away_from_the_null_condition_of_zeros():
    """The null is x0 = 0, so a scale of 2 doubles x0."""
    pictures = sampler(cfg=2.0)(1.0, PROMPTS)
    for picture, prompt in zip(pictures, PROMPTS, strict=True):
        assert np.abs(picture.astype(int) - min(255, 20 * len(prompt))).max() <= 1


def test_a_picture_does_not_depend_on_batch_size_or_mesh():
    base = sampler(batch_size=1)(None, PROMPTS)
    for other in (sampler(batch_size=4), sampler(batch_size=8, devices=8)):
        np.testing.assert_allclose(other(None, PROMPTS).astype(int), base.astype(int), atol=1)
    assert np.abs(base[0].astype(int) - base[4].astype(int)).max() > 5  # same prompt, new noise
    assert not np.array_equal(sampler(seed=1)(None, PROMPTS), base)


def test_a_picture_of_another_size_is_sampled_by_the_same_sampler():
    make = sampler()
    wide = make(1.0, PROMPTS, (2, 8))
    assert wide.shape == (5, 2, 8, 3) and make(1.0, PROMPTS).shape == (5, 4, 4, 3)
    for picture, prompt in zip(wide, PROMPTS, strict=True):
        assert np.abs(picture.astype(int) - 10 * len(prompt)).max() <= 1


def test_a_grid_of_wide_pictures_keeps_their_aspect():
    pictures = np.zeros((3, 8, 32, 3), np.uint8)
    pictures[1] = (0, 200, 0)
    pixels = np.asarray(draw_grid(pictures, ["one", "two", "three"], columns=1))
    rows, columns = np.nonzero((pixels == (0, 200, 0)).all(-1))
    assert np.ptp(columns) + 1 == 160 and np.ptp(rows) + 1 == 40 and len(rows) == 160 * 40


def test_grid_has_a_cell_and_a_label_for_every_picture():
    pictures = np.zeros((5, 16, 16, 3), np.uint8)
    pictures[4] = (0, 200, 0)
    grid = draw_grid(pictures, ["a very long prompt that needs several lines to fit"] * 5)
    pixels = np.asarray(grid)
    green = (pixels == (0, 200, 0)).all(-1)
    assert green.sum() == 160 * 160
    dark = (pixels[:, :, :] == 0).all(-1).sum()
    assert dark > 4 * 160 * 160  # four black pictures and the ink of the labels
