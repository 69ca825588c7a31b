"""Starting from another model: refused unless allowed, and then the function is kept."""

import flax.linen as nn
import jax
import numpy as np
import pytest

from mmdit_jax import config as config_lib
from mmdit_jax.models.layers import position_embedding
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


def autoencoder(**changes):
    known = {"id": "AutoencoderKL-f8c4", "hash": "a" * 64, "kind": "moments", "channels": 4}
    return known | {"scale": 1.5305, "shift": 0.0609} | changes


@pytest.mark.parametrize(
    ("there", "words"),
    [
        ({"hash": "b" * 64}, f"hash {'a' * 64} here, {'b' * 64} there"),
        ({"scale": 0.18215}, "scale 1.5305 here, 0.18215 there"),
        ({"shift": 0.0}, "shift 0.0609 here, 0.0 there"),
    ],
)
def test_latents_of_another_autoencoder_are_refused_unless_allowed(there, words):
    target = config()
    with pytest.raises(ValueError, match="init_adapt.autoencoder=True") as error:
        warm_start.check_latents(autoencoder(**there), autoencoder(), target)
    assert words in str(error.value)
    target.init_adapt.autoencoder = True
    (said,) = warm_start.check_latents(autoencoder(**there), autoencoder(), target)
    assert words in said


def test_latents_that_are_known_to_be_the_same_or_not_known_are_not_refused():
    assert warm_start.check_latents(autoencoder(), autoencoder(path="elsewhere"), config()) == []
    unknown = {"kind": "moments", "id": "the autoencoder of SD3", "hash": ""}
    assert warm_start.check_latents(unknown, autoencoder(), config()) == []
    pixels = autoencoder(kind="pixels")  # whose scale and shift are measured
    (said,) = warm_start.check_latents(pixels | {"scale": 0.02}, pixels, config())
    assert "scale 1.5305 here, 0.02 there" in said
    target = config(**{"init_adapt.channels": True})
    other = autoencoder(hash="b" * 64, channels=3)
    assert len(warm_start.check_latents(other, autoencoder(), target)) == 1


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


STORED = {"model.pos_embed": "stored"}


def test_a_stored_table_is_read_between_its_places_and_not_beyond_its_edge():
    """Of a table that is linear in row and column, nothing is lost between places."""
    source = config(**STORED)
    assert source.model.pos_embed_max_size == 12 and config_lib.position_native(source) == 4
    row, column = np.meshgrid(np.arange(12.0), np.arange(12.0), indexing="ij")
    params = random_params(source)
    params["pos_embed"]["table"][:] = (row + 20 * column)[..., None]
    finer = {"model.pos_embed_max_size": 20, "model.pos_embed_native": 8}
    target = config(**STORED, **finer, **{"init_adapt.position_grid": True})
    assert "20 for 8 patches an axis, stored, here" in warm_start.check(source, target)[0]
    abstract = nn.meta.unbox(state_lib.abstract_params(target))
    adapted = warm_start.adapt(params, abstract, source, target)["pos_embed"]["table"]
    # The native squares, 8 places in the middle of 20 and 4 in the middle of 12, are the same.
    places = 4 + (np.arange(20) - 6) / 2
    expected = places[:, None] + 20 * places[None]
    np.testing.assert_allclose(adapted, np.repeat(expected[..., None], 128, 2), rtol=1e-6)
    wider = config(**STORED, **{"model.pos_embed_max_size": 14, "init_adapt.position_grid": True})
    with pytest.raises(ValueError, match="beyond its edge, keep theirs .*max_size=12"):
        warm_start.check(source, wider)


def test_between_stored_and_computed_tables_nothing_is_silent():
    stored, computed = config(**STORED), config()
    with pytest.raises(ValueError, match="computed, here, 12 for 4, stored, there.*=stored"):
        warm_start.check(stored, computed)
    params = random_params(computed)
    abstract = nn.meta.unbox(state_lib.abstract_params(stored))
    adapted = warm_start.adapt(params, abstract, computed, stored)
    table = np.asarray(adapted["pos_embed"]["table"]).reshape(144, 128)
    np.testing.assert_array_equal(table, position_embedding(12, 12, 128, max_size=12, native=4))
    abstract = nn.meta.unbox(state_lib.abstract_params(computed))
    back = warm_start.adapt(adapted, abstract, stored, computed)
    assert jax.tree.structure(back) == jax.tree.structure(params)


def test_text_that_was_stored_otherwise_is_refused():
    with pytest.raises(ValueError, match="text_storage is trimmed here, full there.*=full"):
        warm_start.check(config(), config(**{"data.text_storage": "trimmed"}))
