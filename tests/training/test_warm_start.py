"""Starting from another model: refused unless allowed, and then the function is kept."""

import flax.linen as nn
import jax
import numpy as np
import pytest

from mmdit_jax import config as config_lib
from mmdit_jax.training import state as state_lib
from mmdit_jax.training import warm_start


def config(**changes):
    made = config_lib.default(depth=2, resolution=64, text_length=3)
    made.data.text_encoders.clip_l.update(width=8, pooled_width=8)
    made.data.text_encoders.clip_g.update(width=8, pooled_width=8)
    made.data.text_encoders.t5.update(width=24)
    made.model.update(channels=4, context_width=24, pos_embed_max_size=12)
    made.init_from = "runs/there"
    made.update_from_flattened_dict(changes)
    return made


def random_params(config):
    rng = np.random.default_rng(0)
    tree = nn.meta.unbox(state_lib.abstract_params(config))
    return jax.tree.map(lambda leaf: rng.normal(size=leaf.shape).astype(np.float32) * 0.1, tree)


def run(config, params, z):
    rng = np.random.default_rng(1)
    t = np.array([0.2, 0.9], np.float32)
    context = rng.normal(size=(2, 6, 24)).astype(np.float32)
    pooled = rng.normal(size=(2, 16)).astype(np.float32)
    return state_lib.build_model(config).apply({"params": params}, z, t, context, pooled)


def latents(channels):
    rng = np.random.default_rng(2)
    return rng.normal(size=(2, 8, 8, channels)).astype(np.float32)


@pytest.mark.parametrize(
    ("theirs", "ours", "option"),
    [
        ({"model.qk_norm": False}, {}, "init_adapt.qk_norm=True"),
        ({}, {"model.pos_embed_max_size": 24}, "init_adapt.position_grid=True"),
        ({}, {"data.resolution": 96}, "model.pos_embed_native=4"),
        ({}, {"model.channels": 6}, "init_adapt.channels=True"),
    ],
    ids=["qk_norm", "grid", "native", "channels"],
)
def test_a_difference_is_refused_with_the_option_that_allows_it(theirs, ours, option):
    source, target = config(**theirs), config(**ours)
    with pytest.raises(ValueError, match="init_from=runs/there") as error:
        warm_start.check(source, target)
    assert option in str(error.value)
    target.init_adapt.update(qk_norm=True, position_grid=True, channels=True)
    warm_start.check(source, target)
    warm_start.check(source, source)


@pytest.mark.parametrize(
    ("theirs", "ours", "words"),
    [
        ({"model.depth": 3}, {}, "model.depth is 2 here, 3 there"),
        ({"model.patch": 1}, {}, "model.patch"),
        ({}, {"model.qk_norm": False}, "model.qk_norm=True"),
        ({}, {"model.channels": 3}, "model.channels=4"),
        ({}, {"model.dual_attention_layers": 1}, "dual_attention_layers"),
        ({"data.text_encoders.clip_l.pooled_width": 9}, {}, "16 features here, 17 there"),
    ],
)
def test_what_no_option_allows_is_refused(theirs, ours, words):
    target = config(**ours)
    target.init_adapt.update(qk_norm=True, position_grid=True, channels=True)
    with pytest.raises(ValueError, match=words):
        warm_start.check(config(**theirs), target)


def test_the_grid_of_the_weights_can_be_kept_at_another_resolution():
    target = config(**{"data.resolution": 96, "model.pos_embed_native": 4})
    warm_start.check(config(), target)


def test_new_channels_change_nothing_of_the_old_ones():
    source, target = config(), config(**{"model.channels": 6})
    params = random_params(source)
    abstract = nn.meta.unbox(state_lib.abstract_params(target))
    adapted = warm_start.adapt(params, abstract, source, target)
    z = latents(6)
    old, new = run(source, params, z[..., :4]), run(target, adapted, z)
    # Sums of 24 in place of 16 terms are rounded in another order; the values reach 5.
    np.testing.assert_allclose(new[..., :4], old, rtol=0, atol=1e-5)
    assert float(abs(old).mean()) > 0.01
    np.testing.assert_array_equal(new[..., 4:], 0)


def test_added_qk_norm_has_scales_of_one_and_the_rest_is_kept():
    source, target = config(**{"model.qk_norm": False}), config()
    params = random_params(source)
    abstract = nn.meta.unbox(state_lib.abstract_params(target))
    adapted = warm_start.adapt(params, abstract, source, target)
    assert jax.tree.structure(adapted) == jax.tree.structure(abstract)
    attention = adapted["joint_blocks"]["x_block"]["attn"]
    for name in ("ln_q", "ln_k"):
        np.testing.assert_array_equal(attention.pop(name)["scale"], np.ones((1, 64), np.float32))
    jax.tree.map(
        np.testing.assert_array_equal, attention, params["joint_blocks"]["x_block"]["attn"]
    )


def test_a_larger_grid_leaves_the_centre_where_it_was():
    source = config()
    target = config(**{"model.pos_embed_max_size": 24})
    params = random_params(source)
    z = latents(4)
    np.testing.assert_allclose(run(target, params, z), run(source, params, z), atol=1e-6)
