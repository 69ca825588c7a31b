"""Embeddings, patches, positions: the numbers of the released models."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mmdit_jax import sharding
from mmdit_jax.models import layers, product


def coordinates(table, features, axis):
    """Reads a coordinate back: frequency 0 of an axis is sin(c), cos(c)."""
    half = features // 2
    part = table[:, :half] if axis == "column" else table[:, half:]
    quarter = features // 4
    slow = -1  # the slowest frequency never wraps here
    angle = np.arctan2(part[:, quarter + slow], 1e-30)
    del angle
    frequency = 10000.0 ** (-(quarter - 1) / quarter)
    return np.arctan2(part[:, quarter - 1], part[:, 2 * quarter - 1]) / frequency


@pytest.mark.parametrize(
    ("size", "native", "expected"),
    [
        (16, 16, np.arange(16.0)),  # 256 px: 0..15
        (64, 64, np.arange(64) / 4),  # 1024 px: the centre of arange(192)/4 - 16, 0..15.75
        (192, 64, np.arange(192) / 4 - 16),  # the whole SD3 table
    ],
)
def test_position_coordinates_equal_the_paper(size, native, expected):
    table = layers.position_embedding(1, size, 128, max_size=192, native=native)
    np.testing.assert_allclose(coordinates(table, 128, "column"), expected, atol=2e-3)
    table = layers.position_embedding(size, 1, 128, max_size=192, native=native)
    np.testing.assert_allclose(coordinates(table, 128, "row"), expected, atol=2e-3)


def test_position_crop_is_central_for_a_wide_picture():
    """T34: rows and columns are cropped each on its own; row by row, column first in features."""
    table = layers.position_embedding(4, 8, 64, max_size=12, native=8).reshape(4, 8, 64)
    column = coordinates(table[0], 64, "column")
    row = coordinates(table[:, 0], 64, "row")
    np.testing.assert_allclose(column, np.arange(8) * 2.0, atol=1e-3)
    np.testing.assert_allclose(row, (np.arange(4) + 2) * 2.0, atol=1e-3)
    # The first half of the features does not know the row.
    np.testing.assert_array_equal(table[0, :, :32], table[3, :, :32])
    assert not np.array_equal(table[0, :, 32:], table[3, :, 32:])


def test_a_random_crop_is_a_part_of_the_same_grid():
    """The centre gives the centre crop; any other place the rows and columns of the whole grid."""
    grid = {"max_size": 12, "native": 8}
    whole = layers.position_embedding(12, 12, 64, **grid).reshape(12, 12, 64)
    offsets = np.array([[4, 2], [0, 0], [8, 4], [1, 3]])
    crops = layers.cropped_position_embedding(jnp.asarray(offsets), 4, 8, 64, **grid)
    assert crops.shape == (4, 32, 64) and crops.dtype == jnp.float32
    np.testing.assert_array_equal(crops[0], layers.position_embedding(4, 8, 64, **grid))
    for crop, (top, left) in zip(crops, offsets, strict=True):
        expected = whole[top : top + 4, left : left + 8].reshape(32, 64)
        np.testing.assert_array_equal(crop, expected)


def test_crops_of_a_stored_table_are_those_of_the_formula_and_no_gradient_reaches_it():
    grid = {"max_size": 12, "native": 8}
    stored = layers.PositionTable(64, **grid)
    whole = layers.position_embedding(12, 12, 64, **grid).reshape(12, 12, 64)
    params = {"params": {"table": jnp.asarray(whole)}}
    centre = layers.position_embedding(4, 8, 64, **grid)
    np.testing.assert_array_equal(stored.apply(params, 4, 8), centre[None])
    offsets = jnp.array([[0, 3], [8, 4]])
    np.testing.assert_array_equal(
        stored.apply(params, 4, 8, offsets),
        layers.cropped_position_embedding(offsets, 4, 8, 64, **grid),
    )
    gradient = jax.grad(lambda p: stored.apply(p, 4, 8, offsets).sum())(params)
    np.testing.assert_array_equal(gradient["params"]["table"], 0)
    with pytest.raises(ValueError, match="4 x 13 patches exceed"):
        stored.apply(params, 4, 13)


def test_position_embedding_literal():
    table = layers.position_embedding(1, 2, 8, max_size=2, native=2)
    # One row at coordinate 0.5 * 0 ... the grid of 2 positions spans 0 and 8.
    x = np.array([0.0, 8.0])
    w = np.array([1.0, 0.01])
    expected = np.concatenate([np.sin(x[:, None] * w), np.cos(x[:, None] * w)], axis=1)
    np.testing.assert_allclose(table[:, :4], expected, atol=1e-6)


def test_timestep_features_are_cosines_then_sines_of_1000_t():
    t = jnp.array([0.0, 0.0375, 1.0])
    features = np.asarray(layers.timestep_features(t))
    frequencies = np.exp(-np.log(10000.0) * np.arange(128) / 128)
    angles = 1000.0 * np.array([0.0, 0.0375, 1.0])[:, None] * frequencies
    assert features.shape == (3, 256) and features.dtype == np.float32
    np.testing.assert_allclose(features[:, :128], np.cos(angles), atol=2e-4)
    np.testing.assert_allclose(features[:, 128:], np.sin(angles), atol=2e-4)


def test_timestep_features_tell_neighbouring_noise_levels_apart():
    """T3: a thousand timesteps in bfloat16 are 507 values; here every one is its own."""
    t = (jnp.arange(1000) + 1) / 1000
    features = np.asarray(layers.timestep_features(t))
    assert len(np.unique(features, axis=0)) == 1000


def test_unpatchify_inverts_patchify_and_the_token_order_is_row_column_channel():
    z = jax.random.normal(jax.random.key(0), (2, 4, 6, 3))
    tokens = layers.patchify(z, 2)
    assert tokens.shape == (2, 6, 12)
    np.testing.assert_array_equal(layers.unpatchify(tokens, 2, 4, 6), z)
    np.testing.assert_array_equal(tokens[0, 1].reshape(2, 2, 3), z[0, 0:2, 2:4])
    np.testing.assert_array_equal(tokens[0, 3].reshape(2, 2, 3), z[0, 2:4, 0:2])


def test_modulate_is_x_times_one_plus_scale_plus_shift():
    x = jnp.ones((1, 2, 3))
    out = layers.modulate(x, jnp.full((1, 3), 5.0), jnp.full((1, 3), 2.0))
    np.testing.assert_array_equal(out, np.full((1, 2, 3), 8.0))


def test_layer_norm_has_zero_mean_unit_variance_and_no_parameters():
    x = 3 + 2 * jax.random.normal(jax.random.key(0), (2, 5, 64))
    y = np.asarray(layers.layer_norm(x))
    np.testing.assert_allclose(y.mean(-1), 0, atol=1e-5)
    np.testing.assert_allclose(y.var(-1), 1, atol=1e-4)


def test_linear_is_initialised_as_the_flat_matrix_of_dit():
    layer = layers.Linear((3, 64), ("embed", "stack", "heads_out"))
    kernel = layer.init(jax.random.key(0), jnp.zeros((1, 64)))["params"]["kernel"].value
    bound = np.sqrt(6 / (64 + 192))
    assert kernel.shape == (64, 3, 64)
    assert 0.97 * bound < float(jnp.abs(kernel).max()) <= bound


@pytest.mark.parametrize("reduce_dtype", ["float32", "bfloat16"])
def test_the_gradient_of_a_kernel_is_reduced_in_the_dtype_asked_for(reduce_dtype):
    """A sum of 4097 equal products: float32 has it, bfloat16 has what is left of it by rounding."""
    types = {"dtype": jnp.bfloat16, "reduce_dtype": reduce_dtype}
    module = layers.Linear((2,), ("features", "embed"), **types)
    # Wider than the output: what is transposed after the product, XLA does not keep unrounded.
    x = jnp.full((4097, 4), 1.0, jnp.bfloat16)
    params = {"kernel": jnp.ones((4, 2)), "bias": jnp.zeros(2)}
    grads = jax.jit(jax.grad(lambda p: jnp.sum(module.apply({"params": p}, x))))(params)
    assert grads["kernel"].dtype == jnp.float32
    expected = jnp.float32(4097).astype(reduce_dtype).astype(jnp.float32)
    np.testing.assert_array_equal(grads["kernel"], jnp.full((4, 2), expected))
    # Biases are small: theirs is summed in float32 either way.
    np.testing.assert_array_equal(grads["bias"], jnp.full(2, 4097.0))


@pytest.mark.parametrize(
    ("sizes", "names", "inputs", "outputs"),
    [
        ({"data": 2, "fsdp": 4}, ("features", "embed"), (8, 20), (16,)),
        ({"data": 1, "fsdp": 4, "context": 2}, ("embed", "mlp"), (8, 6, 16), (64,)),
        ({"data": 2, "fsdp": 2, "tensor": 2}, ("heads_out", "embed"), (8, 6, 16), (16,)),
    ],
)
def test_the_gradient_of_a_kernel_is_summed_by_a_reduce_scatter(sizes, names, inputs, outputs):
    x, kernel, weight = (
        jax.random.normal(jax.random.key(n), shape)
        for n, shape in enumerate([inputs, (inputs[-1], *outputs), (*inputs[:-1], *outputs)])
    )

    def gradient(kernel):
        return jax.grad(lambda k: jnp.sum(product.product(x, k, names, "float32") * weight))(kernel)

    with sharding.entered(sharding.make_mesh(**sizes)):
        compiled = jax.jit(gradient).lower(kernel).compile()
    np.testing.assert_allclose(compiled(kernel), gradient(kernel), rtol=1e-5, atol=1e-5)
    made = compiled.as_text()
    assert "reduce-scatter(" in made
    # Over the other axes goes what a device holds then: one fsdp-th of the gradient at most.
    own = kernel.size // sizes["fsdp"]
    for shape in re.findall(r"= f32\[([\d,]+)\]\S* all-reduce\(", made):
        assert np.prod([int(size) for size in shape.split(",")]) <= own
