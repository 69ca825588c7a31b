"""Assembly of context and pooled, the null condition, and the dropout of encoders."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mmdit_jax import sharding
from mmdit_jax.encoders import text


def outputs(batch=3, clip_tokens=5, t5_tokens=7, widths=(4, 6, 11), seed=0):
    rng = np.random.default_rng(seed)
    clip_l, clip_g, t5 = widths

    def draw(*shape):
        return rng.standard_normal(shape, np.float32)

    return {
        "clip_l": {"sequence": draw(batch, clip_tokens, clip_l), "pooled": draw(batch, clip_l)},
        "clip_g": {"sequence": draw(batch, clip_tokens, clip_g), "pooled": draw(batch, clip_g)},
        "t5": {"sequence": draw(batch, t5_tokens, t5)},
    }


def test_shapes_and_zeros_are_the_papers():
    published = outputs(batch=2, clip_tokens=77, t5_tokens=77, widths=(768, 1280, 4096))
    context_BTE, pooled_BV = text.assemble(published, 4096)
    assert context_BTE.shape == (2, 154, 4096) and pooled_BV.shape == (2, 2048)
    assert context_BTE.dtype == pooled_BV.dtype == jnp.float32
    assert not np.any(context_BTE[:, :77, 2048:])
    assert np.all(np.any(np.asarray(context_BTE[:, :77, :2048]) != 0, axis=-1))


def test_every_output_has_its_place():
    given = outputs()
    context_BTE, pooled_BV = text.assemble(given, 13)
    np.testing.assert_array_equal(context_BTE[:, :5, :4], given["clip_l"]["sequence"])
    np.testing.assert_array_equal(context_BTE[:, :5, 4:10], given["clip_g"]["sequence"])
    np.testing.assert_array_equal(context_BTE[:, 5:, :11], given["t5"]["sequence"])
    assert not np.any(context_BTE[:, :5, 10:]) and not np.any(context_BTE[:, 5:, 11:])
    np.testing.assert_array_equal(pooled_BV[:, :4], given["clip_l"]["pooled"])
    np.testing.assert_array_equal(pooled_BV[:, 4:], given["clip_g"]["pooled"])


@pytest.mark.parametrize("dropped", text.ENCODER_NAMES)
def test_a_dropped_encoder_is_zeros_in_its_sample_alone(dropped):
    given = outputs()
    keep = {name: np.array([True, name != dropped, True]) for name in given}
    context_BTE, pooled_BV = text.assemble(given, 13, keep)
    expected = {name: {k: v.copy() for k, v in out.items()} for name, out in given.items()}
    for values in expected[dropped].values():
        values[1] = 0.0
    full_context_BTE, full_pooled_BV = text.assemble(expected, 13)
    np.testing.assert_array_equal(context_BTE, full_context_BTE)
    np.testing.assert_array_equal(pooled_BV, full_pooled_BV)


def test_the_null_condition_of_sampling_is_the_one_of_training():
    given = outputs()
    dropped = {name: jnp.zeros(3, bool) for name in given}
    trained = jax.jit(text.assemble, static_argnums=1)(given, 16, dropped)
    # Sampling knows the shapes alone, from the manifest.
    recorded = {
        "clip_l": {"length": 5, "width": 4, "pooled_width": 4},
        "clip_g": {"length": 5, "width": 6, "pooled_width": 6},
        "t5": {"length": 7, "width": 11, "pooled_width": None},
    }
    for sampled in (
        text.null_condition(given, 16),
        text.null_condition(text.zero_outputs(recorded, 3), 16),
    ):
        np.testing.assert_array_equal(trained.context_BTE, sampled.context_BTE)
        np.testing.assert_array_equal(trained.pooled_BV, sampled.pooled_BV)
        assert not np.any(sampled.context_BTE) and not np.any(sampled.pooled_BV)


def test_not_even_nan_leaks_from_a_dropped_encoder():
    given = outputs()
    given["t5"]["sequence"][:] = np.nan
    context_BTE, _ = text.assemble(given, 13, {"clip_l": True, "clip_g": True, "t5": False})
    assert np.isfinite(context_BTE).all()


def test_half_precision_records_become_the_wanted_type():
    given = outputs()
    halves = {n: {k: v.astype(np.float16) for k, v in o.items()} for n, o in given.items()}
    assert text.assemble(halves, 13).context_BTE.dtype == jnp.float32
    condition = text.assemble(halves, 13, dtype=jnp.bfloat16)
    assert condition.context_BTE.dtype == condition.pooled_BV.dtype == jnp.bfloat16


def test_a_single_clip_is_enough():
    context_BTE, pooled_BV = text.assemble({"clip_g": outputs()["clip_g"]}, 6)
    assert context_BTE.shape == (3, 5, 6) and pooled_BV.shape == (3, 6)


def mismatched_clip_lengths():
    given = outputs()
    given["clip_g"] = outputs(clip_tokens=6)["clip_g"]
    return given


def without_pooled():
    given = outputs()
    del given["clip_l"]["pooled"]
    return given


def mixed_batches():
    return outputs() | {"t5": outputs(batch=2)["t5"]}


@pytest.mark.parametrize(
    ("given", "width", "keep", "message"),
    [
        (outputs(), 10, None, r"10 is smaller .*'t5': 11.*set it to 11"),
        (outputs(widths=(8, 6, 11)), 13, None, r"13 is smaller .*'clip_l \+ clip_g': 14"),
        (mismatched_clip_lengths(), 13, None, r"'clip_l': 5, 'clip_g': 6"),
        (without_pooled(), 13, None, r"clip_l has the outputs \['sequence'\]"),
        (mixed_batches(), 13, None, r"differ in their batch"),
        ({"t5": outputs()["t5"]}, 13, None, r"no pooled vector"),
        (outputs() | {"clip_h": outputs()["clip_l"]}, 13, None, r"unknown text encoders.*clip_h"),
        (outputs(), 13, {"t5": False}, r"keep names \['t5'\]"),
    ],
)
def test_what_does_not_fit_is_named(given, width, keep, message):
    with pytest.raises(ValueError, match=message):
        text.assemble(given, width, keep)


def test_the_papers_rate_drops_every_encoder_in_a_tenth_of_the_samples():
    samples = 200_000
    keep = text.drop_mask(jax.random.key(0), samples, 0.46416)
    dropped_NB = ~np.stack([keep[name] for name in text.ENCODER_NAMES])
    # Five standard deviations of a rate over so many samples.
    assert dropped_NB.all(axis=0).mean() == pytest.approx(0.1, abs=5 * (0.09 / samples) ** 0.5)
    np.testing.assert_allclose(dropped_NB.mean(axis=1), 0.46416, atol=5 * (0.25 / samples) ** 0.5)
    # Independent: not one coin for the sample, nor one for the batch.
    np.testing.assert_allclose(np.corrcoef(dropped_NB), np.eye(3), atol=5 / samples**0.5)


def test_dropping_together_leaves_no_sample_with_a_part_of_its_encoders():
    samples = 20_000
    keep = text.drop_mask(jax.random.key(0), samples, 0.0, together=0.1)
    dropped_NB = ~np.stack([keep[name] for name in text.ENCODER_NAMES])
    assert (dropped_NB == dropped_NB[0]).all()
    assert dropped_NB[0].mean() == pytest.approx(0.1, abs=5 * (0.09 / samples) ** 0.5)
    both = text.drop_mask(jax.random.key(0), samples, 0.3, together=0.1)
    alone = text.drop_mask(jax.random.key(0), samples, 0.3)
    for name in text.ENCODER_NAMES:  # the coins of `rate` stay what they are without `together`
        np.testing.assert_array_equal(both[name], alone[name] & keep[name])


def test_the_coins_of_an_encoder_do_not_depend_on_the_others():
    every = text.drop_mask(jax.random.key(3), 64, 0.5)
    alone = text.drop_mask(jax.random.key(3), 64, 0.5, ["t5"])
    np.testing.assert_array_equal(every["t5"], alone["t5"])


def test_the_coins_are_the_same_on_one_and_on_eight_devices():
    mesh = sharding.make_mesh()
    split = jax.jit(
        lambda key: text.drop_mask(key, 64, 0.5), out_shardings=sharding.batch_sharding(mesh)
    )(jax.random.key(3))
    for name, keep_B in text.drop_mask(jax.random.key(3), 64, 0.5).items():
        assert len(split[name].sharding.device_set) == 8
        np.testing.assert_array_equal(keep_B, split[name])


@pytest.mark.parametrize(("rate", "kept"), [(0.0, True), (1.0, False)])
def test_rates_of_nothing_and_of_all_are_exact(rate, kept):
    for keep_B in text.drop_mask(jax.random.key(0), 1000, rate).values():
        assert np.all(np.asarray(keep_B) == kept)


def test_a_rate_that_is_no_probability_is_refused():
    with pytest.raises(ValueError, match=r"46\.4 is no probability"):
        text.drop_mask(jax.random.key(0), 4, 46.4)
