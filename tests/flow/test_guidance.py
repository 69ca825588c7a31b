"""Classifier-free guidance: linear in velocity, silent outside its interval and at scale 1."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from mmdit_jax.flow.guidance import guided
from mmdit_jax.flow.solvers import solve, time_grid

Z = jnp.asarray(np.random.default_rng(0).normal(size=(4, 3, 2)), jnp.float32)
T = jnp.array([0.1, 0.4, 0.6, 0.9])
CONDITION = {"context": jnp.arange(1.0, 5.0), "pooled": jnp.full((4, 2), 0.5)}
NULL = jax.tree.map(jnp.zeros_like, CONDITION)


def predict(z, t, condition):
    """A velocity that mixes every argument, each sample for itself."""
    gain = condition["context"] + condition["pooled"].sum(axis=1) + t
    return gain[:, None, None] * z**2 + t[:, None, None]


def test_guided_velocity_extrapolates_from_null_to_condition():
    conditional, null = predict(Z, T, CONDITION), predict(Z, T, NULL)
    for scale in (0.0, 0.5, 4.5):
        velocity = guided(predict, CONDITION, NULL, scale=scale)(Z, T)
        np.testing.assert_allclose(velocity, null + scale * (conditional - null), rtol=1e-5)
    np.testing.assert_allclose(guided(predict, CONDITION, NULL, scale=0)(Z, T), null, rtol=1e-6)


def test_scale_1_is_the_conditional_bit_by_bit_and_runs_no_null_pass():
    sizes = []

    def recording(z, t, condition):
        sizes.append(z.shape[0])
        return predict(z, t, condition)

    velocity = guided(recording, CONDITION, NULL, scale=1.0)(Z, T)
    np.testing.assert_array_equal(velocity, predict(Z, T, CONDITION))
    assert sizes == [4]


def test_both_passes_are_one_call_on_a_doubled_batch():
    sizes = []

    def recording(z, t, condition):
        sizes.append((z.shape[0], t.shape[0], condition["pooled"].shape[0]))
        return predict(z, t, condition)

    guided(recording, CONDITION, NULL, scale=2.0)(Z, T)
    assert sizes == [(8, 8, 8)]


def test_outside_the_interval_the_velocity_is_conditional():
    inside = guided(predict, CONDITION, NULL, scale=4.5)(Z, T)
    conditional = predict(Z, T, CONDITION)
    velocity = guided(predict, CONDITION, NULL, scale=4.5, interval=(0.4, 0.6))(Z, T)
    outside = jnp.array([0, 3])
    np.testing.assert_allclose(velocity[outside], conditional[outside], rtol=1e-6)
    np.testing.assert_allclose(velocity[1:3], inside[1:3], rtol=1e-6)  # both ends belong to it
    none = guided(predict, CONDITION, NULL, scale=4.5, interval=(0.45, 0.5))(Z, T)
    np.testing.assert_allclose(none, conditional, rtol=1e-6)


def test_steps_outside_the_interval_skip_the_null_pass():
    sizes = []

    def recording(z, t, condition):
        jax.debug.callback(lambda _: sizes.append(z.shape[0]), t[0], ordered=True)
        return predict(z, t, condition)

    velocity = guided(recording, CONDITION, NULL, scale=3.0, interval=(0.2, 0.6))
    solve(velocity, Z, time_grid("exact", 5, 1.0))  # at t = 1, 0.8, 0.6, 0.4, 0.2
    jax.effects_barrier()
    assert sizes == [4, 4, 8, 8, 8]


def test_guidance_runs_on_a_batch_split_over_8_devices():
    """Each sample and its null stay on one device, and the result is that of one device."""
    z = jnp.concatenate([Z, 2 * Z])
    t, condition = jnp.tile(T, 2), jax.tree.map(lambda x: jnp.concatenate([x, x]), CONDITION)
    null = jax.tree.map(jnp.zeros_like, condition)
    split = NamedSharding(Mesh(np.array(jax.devices()[:8]), ("data",)), PartitionSpec("data"))

    @jax.jit
    def run(z, t, condition, null):
        return guided(predict, condition, null, scale=3.0)(z, t)

    arguments = jax.device_put((z, t, condition, null), split)
    np.testing.assert_allclose(run(*arguments), run(z, t, condition, null), rtol=1e-6)
    assert "all-gather" not in run.lower(*arguments).compile().as_text()


def test_impossible_guidance_is_refused():
    for interval in ((0.6, 0.4), (-0.1, 1.0), (0.0, 1000.0)):
        with pytest.raises(ValueError, match="is not ordered inside"):
            guided(predict, CONDITION, NULL, scale=2.0, interval=interval)
    null = {**NULL, "pooled": jnp.zeros((4, 3))}
    with pytest.raises(ValueError, match="differ in shape"):
        guided(predict, CONDITION, null, scale=2.0)
