"""Schedules, weight-decay mask, Muon's matrices, EMA."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from mmdit_jax import config as config_lib
from mmdit_jax.training import optimizer as lib
from mmdit_jax.training.state import count_parameters


def config(**settings):
    made = config_lib.default()
    made.steps = 100
    made.optimizer.update({"warmup": 10, **settings})
    return made


def rates(schedule, **settings):
    fn = lib.learning_rate_schedule(config(schedule=schedule, **settings), 2.0)
    return np.array([float(fn(s)) for s in range(100)])


@pytest.mark.parametrize("schedule", config_lib.SCHEDULES)
def test_every_schedule_warms_up_linearly_from_the_first_step(schedule):
    r = rates(schedule)
    np.testing.assert_allclose(r[:10], 0.2 * np.arange(1, 11), rtol=1e-5)


def test_schedules_after_the_warm_up():
    np.testing.assert_allclose(rates("constant")[10:], 2.0)
    np.testing.assert_allclose(rates("linear")[55], 1.0, rtol=1e-5)
    np.testing.assert_allclose(rates("cosine")[55], 1.0, rtol=1e-5)
    assert rates("cosine")[30] > rates("linear")[30]
    wsd = rates("wsd", decay_fraction=0.2)
    np.testing.assert_allclose(wsd[10:80], 2.0)
    np.testing.assert_allclose(wsd[90], 1.0, rtol=1e-5)
    for schedule in ("linear", "cosine", "wsd"):
        assert rates(schedule)[-1] < 0.15
        assert rates(schedule, final_fraction=0.5)[-1] >= 1.0


def params():
    key = jax.random.key(0)

    def matrix(*shape):
        return jax.random.normal(jax.random.fold_in(key, sum(shape)), shape)

    return {
        "joint_blocks": {
            "x_block": {
                "attn": {"qkv": {"kernel": matrix(2, 8, 3, 8), "bias": matrix(2, 3, 8)}},
                "mlp": {"fc1": {"kernel": matrix(2, 8, 32), "bias": matrix(2, 32)}},
            }
        },
        "last_block": {"x_block": {"attn": {"qkv": {"kernel": matrix(8, 3, 8)}}}},
        "final_linear": {"kernel": matrix(8, 4), "bias": matrix(4)},
    }


def test_weight_decay_touches_kernels_only():
    p = params()
    optimizer = lib.make_optimizer(config(name="adamw", weight_decay=0.5, clip_norm=0.0))
    zero = jax.tree.map(jnp.zeros_like, p)
    updates, _ = optimizer.update(zero, optimizer.init(p), p)
    for path, leaf in jax.tree_util.tree_leaves_with_path(updates):
        assert bool(jnp.any(leaf != 0)) == lib.is_kernel(path), path


def muon_updates(p, grads):
    optimizer = lib.make_optimizer(
        config(name="muon", warmup=0, muon_learning_rate=1.0, learning_rate=1e-3, clip_norm=0.0)
    )
    return optimizer.update(grads, optimizer.init(p), p)[0]


def test_muon_orthogonalises_each_projection_of_each_layer_by_itself():
    p = params()
    updates = muon_updates(p, p)
    qkv = updates["joint_blocks"]["x_block"]["attn"]["qkv"]["kernel"]
    for layer in range(2):
        for projection in range(3):
            singular = np.linalg.svd(np.asarray(qkv[layer, :, projection]), compute_uv=False)
            assert 0.5 < singular.min() and singular.max() < 1.5
    # Scaling the gradient of one projection changes no projection: they do not share a norm.
    scaled = jax.tree.map(jnp.copy, p)
    scaled["joint_blocks"]["x_block"]["attn"]["qkv"]["kernel"] = (
        p["joint_blocks"]["x_block"]["attn"]["qkv"]["kernel"].at[0, :, 1].multiply(100.0)
    )
    again = muon_updates(p, scaled)["joint_blocks"]["x_block"]["attn"]["qkv"]["kernel"]
    np.testing.assert_allclose(again, qkv, atol=1e-4)


def test_muon_leaves_everything_outside_the_blocks_to_adamw():
    p = params()
    updates = muon_updates(p, p)
    # The first AdamW step has the size of the learning rate in every entry.
    for leaf in (updates["final_linear"]["kernel"], updates["final_linear"]["bias"]):
        np.testing.assert_allclose(np.abs(leaf), 1e-3, rtol=1e-2)
    bias = updates["joint_blocks"]["x_block"]["mlp"]["fc1"]["bias"]
    np.testing.assert_allclose(np.abs(bias), 1e-3, rtol=1e-2)


def test_gradients_are_clipped_by_their_global_norm():
    p = {"a": {"kernel": jnp.ones((3, 4))}}
    huge = {"a": {"kernel": jnp.full((3, 4), 1e6)}}
    clip = lib.make_optimizer(config(clip_norm=1.0))
    state = clip.init(p)
    clipped, _ = optax.clip_by_global_norm(1.0).update(huge, optax.EmptyState())
    np.testing.assert_allclose(
        clip.update(huge, state, p)[0]["a"]["kernel"],
        lib.make_optimizer(config(clip_norm=0.0)).update(clipped, state[1], p)[0]["a"]["kernel"],
        rtol=1e-6,
    )


def test_ema_moves_every_hundredth_step_by_one_percent():
    ema, p = {"w": jnp.float32(1.0)}, {"w": jnp.float32(2.0)}
    for step in range(1, 201):
        ema = lib.update_ema(ema, p, jnp.int32(step), decay=0.99, every=100)
    np.testing.assert_allclose(ema["w"], 2.0 - 0.99**2, rtol=1e-6)
    every = lib.update_ema({"w": jnp.float32(1.0)}, p, jnp.int32(7), decay=0.9, every=1)
    np.testing.assert_allclose(every["w"], 1.1, rtol=1e-6)
    skipped = {"decay": 0.9, "every": 1, "accepted": jnp.bool_(False)}
    assert lib.update_ema({"w": jnp.float32(1.0)}, p, jnp.int32(7), **skipped)["w"] == 1.0


@pytest.mark.parametrize("name", config_lib.OPTIMIZERS)
def test_a_stored_position_table_is_no_parameter(name):
    """Neither trained nor decayed nor averaged nor counted, and it has no moments."""
    made = config(name=name, weight_decay=0.1)
    made.model.pos_embed = "stored"
    weights = params() | {"pos_embed": {"table": jnp.full((3, 3, 8), 0.7)}}
    optimizer = lib.make_optimizer(made)
    state = optimizer.init(weights)
    assert (3, 3, 8) not in [leaf.shape for leaf in jax.tree.leaves(state)]
    ones = jax.tree.map(jnp.ones_like, weights)  # though no gradient reaches it
    updates, _ = optimizer.update(ones, state, weights)
    updated = optax.apply_updates(weights, updates)
    np.testing.assert_array_equal(updated["pos_embed"]["table"], weights["pos_embed"]["table"])
    assert not np.array_equal(updated["final_linear"]["kernel"], weights["final_linear"]["kernel"])
    ema = lib.update_ema(weights, updated, jnp.int32(1), decay=0.97, every=1)
    np.testing.assert_array_equal(ema["pos_embed"]["table"], weights["pos_embed"]["table"])
    assert count_parameters(weights) == count_parameters(params())
