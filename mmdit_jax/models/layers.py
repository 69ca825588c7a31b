"""The parts that every backbone shares: linear maps, norms, embeddings, patches, positions.

Names of parts follow DiT and SD3 (`x_embedder`, `t_embedder`, `adaLN_modulation`, ...), because
they are also the map to published weights.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name

from mmdit_jax.models.product import product

PRODUCT = "product"  # what remat policies call the products with weights

NORM_EPSILON = 1e-6  # of every LayerNorm and RMSNorm of the SD3 family


def _flat_xavier_uniform(key: jax.Array, shape: Sequence[int], dtype: Any = jnp.float32):
    """Xavier-uniform of the kernel seen as one flat (in, out) matrix, as DiT initialises."""
    bound = math.sqrt(6.0 / (shape[0] + math.prod(shape[1:])))
    return jax.random.uniform(key, shape, dtype, -bound, bound)


INITIALIZERS = {
    "xavier": _flat_xavier_uniform,
    "normal_0.02": nn.initializers.normal(0.02),
    "zeros": nn.initializers.zeros_init(),
}


# What is cheap to compute again keeps its argument for the backward pass and nothing in between.
_again = functools.partial(jax.checkpoint, prevent_cse=False)


class Linear(nn.Module):
    """`x @ kernel + bias` with an output of one or several axes and named parameter axes.

    q, k and v share one kernel (D, 3, D) and so do the vectors of a modulation (D, 6, D): one
    matrix product, but each projection stays a matrix of its own for the optimizer and for names.

    Attributes:
        features: output axes, e.g. `(3, 64)`.
        axes: logical names of the kernel's axes, input first.
        initializer: a name in `INITIALIZERS`.
        dtype: of the matrix product; parameters are float32.
        reduce_dtype: of the kernel's gradient, before it is summed over devices.
        quantization: a name in `product.QUANTIZATIONS`.
    """

    features: tuple[int, ...]
    axes: tuple[str, ...]
    initializer: str = "xavier"
    dtype: Any = jnp.float32
    reduce_dtype: Any = jnp.float32
    quantization: str = "none"

    @nn.compact
    def __call__(self, *inputs: jax.Array, of: Callable[..., jax.Array] | None = None) -> jax.Array:
        """The map of x, the one input, or of what the function `of` makes of all inputs.

        What `of` makes is not kept for the backward pass but made again; the last axis is that of
        the first input.
        """
        x = inputs[0]
        kernel = self.param(
            "kernel",
            nn.with_logical_partitioning(INITIALIZERS[self.initializer], self.axes),
            (x.shape[-1], *self.features),
            jnp.float32,
        )
        bias = self.param(
            "bias",
            nn.with_logical_partitioning(nn.initializers.zeros_init(), self.axes[1:]),
            self.features,
            jnp.float32,
        )
        reduce_dtype = jnp.dtype(self.reduce_dtype).name
        settings = (self.axes, reduce_dtype, self.quantization)

        def multiply(kernel: jax.Array, *inputs: jax.Array) -> jax.Array:
            x = inputs[0] if of is None else of(*inputs)
            return product(x.astype(self.dtype), kernel, *settings)

        y = (multiply if of is None else _again(multiply))(kernel, *inputs)
        # A remat policy does not see the product inside of its gradient: it goes by this name.
        y = checkpoint_name(y, PRODUCT)
        return add_bias(y, bias)


@jax.custom_vjp
def add_bias(y: jax.Array, bias: jax.Array) -> jax.Array:
    """`y + bias` in the dtype of y; the gradient of the bias is summed in float32 all the way."""
    return y + jnp.expand_dims(bias.astype(y.dtype), tuple(range(y.ndim - bias.ndim)))


def _add_bias_backward(bias: jax.Array, dy: jax.Array):
    return dy, jnp.sum(dy, tuple(range(dy.ndim - bias.ndim)), dtype=bias.dtype)


add_bias.defvjp(lambda y, bias: (add_bias(y, bias), bias), _add_bias_backward)


class RMSNorm(nn.Module):
    """The learnable scale of an RMSNorm over the head size, one for all heads (paper 5.3.2).

    Where attention is a kernel of ours it normalises there; elsewhere `rms_norm` does.
    """

    features: int

    def setup(self):
        ones = nn.with_logical_partitioning(nn.initializers.ones_init(), ("head",))
        self.scale_K = self.param("scale", ones, (self.features,), jnp.float32)


@_again
def rms_norm(x_BLNK: jax.Array, scale_K: jax.Array) -> jax.Array:
    """RMSNorm over the last axis, its root in float32."""
    x, dtype = x_BLNK.astype(jnp.float32), x_BLNK.dtype
    x = x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + NORM_EPSILON)
    # SD3 rounds to the compute dtype before the scale (conventions 1.4).
    return x.astype(dtype) * jnp.expand_dims(scale_K, (0, 1, 2)).astype(dtype)


def layer_norm(x: jax.Array) -> jax.Array:
    """LayerNorm without parameters over the last axis, statistics in float32."""
    x32 = x.astype(jnp.float32)
    mean = jnp.mean(x32, axis=-1, keepdims=True)
    variance = jnp.mean(jnp.square(x32 - mean), axis=-1, keepdims=True)
    return ((x32 - mean) * jax.lax.rsqrt(variance + NORM_EPSILON)).astype(x.dtype)


def modulate(x_BLD: jax.Array, shift_BD: jax.Array, scale_BD: jax.Array) -> jax.Array:
    """`x (1 + scale) + shift`, the same for all tokens of a sample."""
    return x_BLD * (1 + scale_BD[:, None]) + shift_BD[:, None]


def modulated_norm(x_BLD: jax.Array, shift_BD: jax.Array, scale_BD: jax.Array) -> jax.Array:
    """`layer_norm`, then `modulate`."""
    return modulate(layer_norm(x_BLD), shift_BD, scale_BD)


def gelu(x: jax.Array) -> jax.Array:
    """GELU in its tanh form."""
    return nn.gelu(x, approximate=True)


class Mlp(nn.Module):
    """Linear - GELU(tanh) - Linear, four times as wide inside."""

    width: int
    dtype: Any = jnp.float32
    reduce_dtype: Any = jnp.float32
    quantization: str = "none"

    @nn.compact
    def __call__(self, *inputs: jax.Array, of: Callable[..., jax.Array] | None = None) -> jax.Array:
        """Arguments as those of `Linear`."""
        types = {"dtype": self.dtype, "reduce_dtype": self.reduce_dtype}
        types["quantization"] = self.quantization
        h_BLF = Linear((4 * self.width,), ("embed", "mlp"), name="fc1", **types)(*inputs, of=of)
        return Linear((self.width,), ("mlp", "embed"), name="fc2", **types)(h_BLF, of=gelu)


class VectorEmbedder(nn.Module):
    """Linear - SiLU - Linear, from a vector per sample to the width, N(0, 0.02) as in DiT."""

    width: int
    dtype: Any = jnp.float32
    reduce_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x_BV: jax.Array) -> jax.Array:
        settings = {
            "initializer": "normal_0.02",
            "dtype": self.dtype,
            "reduce_dtype": self.reduce_dtype,
        }
        h_BD = Linear((self.width,), ("features", "embed"), name="fc1", **settings)(x_BV)
        return Linear((self.width,), ("embed", "mlp"), name="fc2", **settings)(nn.silu(h_BD))


def timestep_features(t_B: jax.Array, size: int = 256) -> jax.Array:
    """Sinusoids of 1000 t as (B, size), [cos, sin], frequencies 10000^(-i/128); float32 always.

    In bfloat16 a thousand timesteps collapse to 507 values (T3), so nothing here follows the
    compute dtype.
    """
    half = size // 2
    frequencies = jnp.exp(-math.log(10000.0) * jnp.arange(half, dtype=jnp.float32) / half)
    angles = 1000.0 * t_B.astype(jnp.float32)[:, None] * frequencies[None]
    return jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=-1)


def patchify(z_BHWC: jax.Array, patch: int) -> jax.Array:
    """Cuts into `patch` x `patch` squares: (B, I, patch * patch * C), tokens row by row.

    Inside a token the order is (row, column, channel), as `unpatchify` expects.
    """
    b, h, w, c = z_BHWC.shape
    z = z_BHWC.reshape(b, h // patch, patch, w // patch, patch, c)
    return z.transpose(0, 1, 3, 2, 4, 5).reshape(b, (h // patch) * (w // patch), patch * patch * c)


def unpatchify(x_BIP: jax.Array, patch: int, height: int, width: int) -> jax.Array:
    """Inverse of `patchify` for a latent of `height` x `width`."""
    b, _, p = x_BIP.shape
    c = p // (patch * patch)
    x = x_BIP.reshape(b, height // patch, width // patch, patch, patch, c)
    return x.transpose(0, 1, 3, 2, 4, 5).reshape(b, height, width, c)


def position_embedding(
    height: int,
    width: int,
    features: int,
    *,
    max_size: int,
    native: int,
    dtype: Any = np.float32,
) -> np.ndarray:
    """Sine-cosine embedding of a centre crop of the position grid (paper, Sec. 5.3.2).

    The grid has `max_size` positions an axis; position p has the coordinate
    (p - (max_size - native) / 2) * 16 / native, so that an image of `native` patches reaches from
    0 to 16 (excluded) as at 256 px, whatever the resolution. The first half of the features
    encodes the column, the second the row; each is [sin, cos] with frequencies
    10000^(-i / (features / 4)).

    Args:
        height: rows of patches.
        width: columns of patches.
        features: width of the model, a multiple of 4.
        max_size: patches an axis that the grid holds (192 in SD3).
        native: patches an axis at the training resolution (16 at 256 px, 64 at 1024 px).
        dtype: to which the values are rounded, as those of released weights are.

    Returns:
        (height * width, features) float32, computed in float64.

    Raises:
        ValueError: more rows or columns than the grid holds.
    """
    _check_grid(height, width, max_size)
    axis_MF = _position_axis(features, max_size, native, dtype)
    rows_HF, columns_WF = (
        axis_MF[start : start + size]
        for size in (height, width)
        for start in [(max_size - size) // 2]
    )
    return np.concatenate(
        [np.tile(columns_WF, (height, 1)), np.repeat(rows_HF, width, axis=0)], axis=1
    )


def _check_grid(height: int, width: int, max_size: int) -> None:
    if height > max_size or width > max_size:
        raise ValueError(
            f"{height} x {width} patches exceed the position grid of {max_size} x {max_size}; "
            "use a smaller picture or a larger model.pos_embed_max_size"
        )


def cropped_position_embedding(
    offset_B2: jax.Array,
    height: int,
    width: int,
    features: int,
    *,
    max_size: int,
    native: int,
    dtype: Any = np.float32,
) -> jax.Array:
    """As `position_embedding`, with a crop of its own for each sample.

    Args:
        offset_B2: int, first row and first column of the crop; at most `max_size` - size.
        height, width, features, max_size, native, dtype: see `position_embedding`.

    Returns:
        (B, height * width, features) float32.
    """
    axis_MF = jnp.asarray(_position_axis(features, max_size, native, dtype))

    def one(offset_2: jax.Array) -> jax.Array:
        rows_HF = jax.lax.dynamic_slice_in_dim(axis_MF, offset_2[0], height)
        columns_WF = jax.lax.dynamic_slice_in_dim(axis_MF, offset_2[1], width)
        table = [jnp.tile(columns_WF, (height, 1)), jnp.repeat(rows_HF, width, axis=0)]
        return jnp.concatenate(table, axis=1)

    return jax.vmap(one)(offset_B2)


def _position_axis(features: int, max_size: int, native: int, dtype: Any) -> np.ndarray:
    """Embedding of every position of one axis of the grid, (max_size, features / 2) float32."""
    positions = np.arange(max_size, dtype=np.float64)
    coordinates = (positions - (max_size - native) / 2) * (16.0 / native)
    quarter = features // 4
    frequencies = 10000.0 ** (-np.arange(quarter, dtype=np.float64) / quarter)
    angles = coordinates.reshape(-1, 1) * frequencies
    axis_MF = np.concatenate([np.sin(angles), np.cos(angles)], axis=1).astype(np.float32)
    return axis_MF.astype(dtype).astype(np.float32)


class PositionTable(nn.Module):
    """A position grid that came with the weights and that no formula of ours makes.

    It lies among the parameters, so that it is sharded, saved and exported as they are, but is
    none: no gradient reaches it, and `FIXED` names it for what counts or trains parameters.

    Attributes:
        features: width of the model.
        max_size, native: see `position_embedding`, which it holds until weights are loaded.
    """

    features: int
    max_size: int
    native: int

    @nn.compact
    def __call__(self, height: int, width: int, offset_B2: jax.Array | None = None) -> jax.Array:
        """The centre crop, (1, height * width, features), or with offsets a crop a sample.

        Raises:
            ValueError: more rows or columns than the grid holds.
        """
        size, features = self.max_size, self.features
        _check_grid(height, width, size)

        def formula(key: jax.Array, shape: Sequence[int], dtype: Any) -> jax.Array:
            del key
            grid = position_embedding(size, size, features, max_size=size, native=self.native)
            return jnp.asarray(grid.reshape(shape), dtype)

        table_MMD = self.param(
            "table",
            nn.with_logical_partitioning(formula, ("features", "features", "embed")),
            (size, size, features),
            jnp.float32,
        )
        table_MMD = jax.lax.stop_gradient(table_MMD)

        def crop(row: Any, column: Any) -> jax.Array:
            start = (row, column, jnp.zeros_like(row))
            part = jax.lax.dynamic_slice(table_MMD, start, (height, width, features))
            return part.reshape(height * width, features)

        if offset_B2 is None:
            top, left = (jnp.int32((size - side) // 2) for side in (height, width))
            return crop(top, left)[None]
        return jax.vmap(lambda offset_2: crop(offset_2[0], offset_2[1]))(offset_B2)


POSITION_TABLE = ("pos_embed", "table")  # the path of the array in a model
FIXED = ("pos_embed",)  # modules whose arrays are no parameters: not counted, trained or decayed
