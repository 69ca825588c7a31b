"""Validation loss: fixed triples, any batch size, any number of samples, any mesh."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mmdit_jax import sharding
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
