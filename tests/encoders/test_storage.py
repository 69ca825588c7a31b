"""States in 8 bits and trimmed text: error bounds, exact zeros, what padding can never do."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mmdit_jax.encoders import storage
from mmdit_jax.encoders.conditioning import assemble

SHAPE = (3, 5, 64)


def states(outliers=0.0, seed=0):
    """Normal states over many magnitudes; two channels are `outliers` times larger."""
    rng = np.random.default_rng(seed)
    values = rng.standard_normal(SHAPE, np.float32) * np.float32(10.0) ** rng.integers(-6, 5, 3)[
        :, None, None
    ].astype(np.float32)
    values[..., [7, 30]] *= 1 + np.float32(outliers)
    return values


def round_trip(values_BTW, precision):
    stored = storage.store(values_BTW, precision)
    assert stored["sequence"].dtype == storage.PRECISIONS[precision]
    return np.asarray(jax.jit(storage.restore)(stored)).astype(np.float64)


@pytest.mark.parametrize("outliers", [0, 100])
def test_int8_is_within_half_a_step_of_the_largest_state_of_the_token(outliers):
    values = states(outliers)
    error = np.abs(round_trip(values, "int8") - values)
    largest = np.abs(values).max(-1, keepdims=True)
    assert (error <= largest / 254 * (1 + 1e-5)).all()
    assert error.max() > 0.9 * (largest / 254).min()  # the bound is no gift


@pytest.mark.parametrize("outliers", [0, 100])
def test_fp8_is_within_half_a_step_of_the_state_itself(outliers):
    values = states(outliers)
    error = np.abs(round_trip(values, "fp8") - values)
    subnormal = np.abs(values).max(-1, keepdims=True) / 448 / 1024
    assert (error <= np.maximum(np.abs(values) / 16, subnormal) * (1 + 1e-5)).all()
    assert (error / np.abs(values)).max() > 0.05


@pytest.mark.parametrize("precision", storage.LARGEST)
def test_the_largest_state_and_zero_are_exact(precision):
    values = states()
    values[1, 2] = 0
    values[0, 0] = np.linspace(-3, 3, SHAPE[2])
    values[0, 1] = 0
    values[0, 1, 5] = np.float32(1e-44)  # its scale is below what float32 holds
    found = round_trip(values, precision)
    assert not found[1, 2].any()
    np.testing.assert_allclose(found[0, 0, [0, -1]], [-3, 3], rtol=1e-6)
    assert np.isfinite(found).all()


@pytest.mark.parametrize("precision", storage.PRECISIONS)
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.filterwarnings("error")
def test_what_is_not_finite_shows_in_what_is_stored(precision, value):
    values = states()
    values[2, 3, 4] = value
    finite_B = np.ones(3, bool)
    for stored in storage.store(values, precision).values():
        finite_B &= np.isfinite(stored).all(tuple(range(1, stored.ndim)))
    assert finite_B.tolist() == [True, True, False]


def test_a_type_without_its_scale_is_refused():
    stored = storage.store(states(), "int8")
    with pytest.raises(ValueError, match="text states are int8 without a scale.*rebuild"):
        storage.restore({"sequence": stored["sequence"]})
    with pytest.raises(ValueError, match="text states are float32 with a scale"):
        storage.restore({"sequence": states(), "scale": stored["scale"]})


@pytest.mark.parametrize("precision", storage.PRECISIONS)
def test_conditions_are_made_of_restored_states_whose_padding_is_zero(precision):
    sequence, pooled = states(), states(seed=1)[:, 0]
    length = np.array([5, 2, 0], np.int32)
    stored = storage.store(sequence, precision)
    text = {"clip_l": {**stored, "pooled": pooled, "length": length}}
    keep = {"clip_l": np.array([False, True, True])}
    expected = round_trip(sequence, precision).astype(np.float32)
    full = assemble({"clip_l": {**stored, "pooled": pooled}}, 70)
    np.testing.assert_array_equal(full.context_BTE[..., :64], expected)
    for row, valid in enumerate(length):
        expected[row, valid:] = 0
    condition = jax.jit(lambda text: assemble(text, 70))(text)
    np.testing.assert_array_equal(condition.context_BTE[..., :64], expected)
    np.testing.assert_array_equal(condition.pooled_BV, pooled)
    expected[0] = 0
    dropped = assemble(text, 70, keep)
    np.testing.assert_array_equal(dropped.context_BTE[..., :64], expected)
    assert not dropped.pooled_BV[0].any() and dropped.pooled_BV[1].any()


def test_padding_that_is_not_a_number_cannot_leak_into_values_or_gradients():
    sequence = states()
    sequence[:, 2:] = np.nan
    outputs = {"sequence": sequence, "length": np.array([2, 1, 2], np.int32)}

    def total(weight):
        return jnp.sum(storage.restore(outputs) * weight)

    value, gradient = jax.value_and_grad(total)(2.0)
    assert np.isfinite(value) and np.isfinite(gradient)
