"""Validation loss: fixed triples, any batch size, any number of samples, any mesh."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mmdit_jax import sharding
from mmdit_jax.evaluation import validation as validation_lib
from mmdit_jax.evaluation.validation import Validation
from mmdit_jax.flow import formulation as formulation_lib


class FakeLoader:
    """27 samples of two buckets, in memory."""

    counts = (20, 7)

    class manifest:  # noqa: N801
        autoencoder = {"kind": "mean", "shift": 0.0, "scale": 1.0}

    def __init__(self):
        rng = np.random.default_rng(0)
        self.latents = [rng.normal(size=(n, 4, 4 + 2 * b, 3)) for b, n in enumerate(self.counts)]

    def bucket_ids(self, bucket):
        return np.arange(self.counts[bucket]) + sum(self.counts[:bucket])

    def examples(self, ids, caption=0):
        del caption
        bucket = int(ids[0] >= self.counts[0])
        rows = np.asarray(ids) - sum(self.counts[:bucket])
        return {
            "latent": self.latents[bucket][rows].astype(np.float32),
            "text": {"t5": {"sequence": np.zeros((len(ids), 1, 1), np.float32)}},
        }


def predict(params, z, t, condition):
    del condition
    return params * z * jnp.reshape(t, (-1, 1, 1, 1))


def validation(loader, batch_size=8, devices=1, samples=100, levels=4):
    return Validation(
        predict=predict,
        assemble=lambda text, keep: (text["t5"]["sequence"],),
        formulation=formulation_lib.make(),
        loader=loader,
        mesh=sharding.make_mesh(devices=jax.devices()[:devices]),
        samples=samples,
        levels=levels,
        batch_size=batch_size,
    )


@functools.cache
def loss(**settings):
    return validation(FakeLoader(), **settings)(jnp.float32(0.5))


def test_loss_does_not_depend_on_batch_size_or_mesh():
    """T45, T46: 27 samples divide by neither, and fillers weigh nothing."""
    base = loss(batch_size=1)
    assert base.samples == 27
    for other in (loss(batch_size=8), loss(batch_size=27), loss(batch_size=8, devices=8)):
        np.testing.assert_allclose(other.mean, base.mean, rtol=1e-6)
        np.testing.assert_allclose(other.per_level, base.per_level, rtol=1e-6)
        np.testing.assert_allclose(other.standard_error, base.standard_error, rtol=1e-5)


def test_mean_is_the_mean_of_the_levels_and_levels_differ():
    base = loss()
    assert base.mean == pytest.approx(np.mean(base.per_level), rel=1e-9)
    assert len(base.per_level) == 4 and len(set(base.per_level)) == 4


def test_triples_are_fixed_but_noise_differs_between_samples():
    assert loss.__wrapped__() == loss.__wrapped__()
    one = loss(samples=1)
    assert one.samples == 1 and one.standard_error == 0.0
    assert loss(samples=2).mean != one.mean


def test_a_part_of_the_split_has_every_bucket_in_its_share():
    """Of 27 samples in buckets of 20 and 7, the first 14 would be one bucket alone."""
    seen = []

    class Spying(FakeLoader):
        def examples(self, ids, caption=0):
            seen.append(np.unique(ids))
            return super().examples(ids, caption)

    found = validation(Spying(), samples=14)(jnp.float32(0.5))
    assert found.samples == 14
    np.testing.assert_array_equal(np.concatenate(seen), [*range(10), *range(20, 24)])


def test_levels_are_the_midpoints_of_equal_strata():
    """With output c t z and unit variances, the level is read back from the loss."""
    base = loss(levels=4, samples=100)
    for i, found in enumerate(base.per_level):
        t, c = (i + 0.5) / 4, 0.5
        # output = c t z, z = (1-t) x0 + t eps, target eps - x0; unit variances
        expected = (c * t * (1 - t) + 1) ** 2 + (c * t * t - 1) ** 2
        assert found == pytest.approx(expected, rel=0.12)


def times_of(grid, levels=8):
    seen = []

    def spy(params, z, t, condition):
        del params, condition
        jax.debug.callback(lambda t: seen.append(np.asarray(t)), t, ordered=True)
        return z

    found = Validation(
        predict=spy,
        assemble=lambda text, keep: (text["t5"]["sequence"],),
        formulation=formulation_lib.make(),
        loader=FakeLoader(),
        mesh=sharding.make_mesh(devices=jax.devices()[:1]),
        samples=20,
        levels=levels,
        batch_size=15,
        grid=grid,
    )(jnp.float32(0))
    jax.effects_barrier()
    return found, seen


@pytest.mark.parametrize(
    ("grid", "expected"),
    [
        ("midpoints", [0.0625, 0.1875, 0.3125, 0.4375, 0.5625, 0.6875, 0.8125, 0.9375]),
        ("paper", [0.125, 0.25, 0.375, 0.5, 0.625, 0.75, 0.875]),
        ("mlperf", [0.0, 0.125, 0.25, 0.375, 0.5, 0.625, 0.75, 0.875]),
    ],
)
def test_named_grids_of_t(grid, expected):
    found, seen = times_of(grid)
    assert len(found.per_level) == len(expected)
    np.testing.assert_array_equal([t[0] for t in seen[: len(expected)]], np.float32(expected))
    assert all(np.ptp(t) == 0 for t in seen)


def test_stratified_levels_fill_their_strata_and_belong_to_the_sample():
    _, seen = times_of("stratified", levels=4)
    for level in range(4):
        assert np.all((seen[level] >= level / 4) & (seen[level] < (level + 1) / 4))
        assert np.unique(seen[level]).size == 14  # and one that fills the batch up
    _, again = times_of("stratified", levels=4)
    np.testing.assert_array_equal(np.concatenate(seen), np.concatenate(again))


@pytest.mark.parametrize(("grid", "levels"), [("thirds", 8), ("paper", 1)])
def test_a_grid_that_is_none_is_refused(grid, levels):
    with pytest.raises(ValueError, match=grid):
        validation_lib.level_count(grid, levels)
