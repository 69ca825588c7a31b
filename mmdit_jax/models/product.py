"""The product of activations with a weight: how the weight is gathered, summed, and quantised.

Quantised products are those of Google's qwix, a package of its own. Nothing that is stored changes:
parameters stay float32, and both factors are rounded to eight bits anew in each product, by scales
that follow from their largest magnitudes: one a token, one a row or a column of the kernel.
"""

import functools
from collections.abc import Sequence
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp

from mmdit_jax.sharding import RULES, fitted, kernel_gradient, place_of, platform

LANES = 128  # of the vector registers of a TPU

# What both factors are rounded to. Gradients are e4m3 too: with a scale for each token the finer
# mantissa is worth more than the range of e5m2.
QUANTIZATIONS = {"none": None, "int8": jnp.int8, "fp8": jnp.float8_e4m3fn}


def load_qwix() -> ModuleType:
    """The package, which is needed for no other setting.

    Raises:
        ValueError: it is not installed.
    """
    try:
        import qwix
    except ImportError as error:
        raise ValueError(
            "model.quantization needs the package qwix, which is not installed: "
            '`pip install "qwix>=0.1.8"`, or set model.quantization=none'
        ) from error
    return qwix


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3, 4))
def product(
    x: jax.Array,
    kernel: jax.Array,
    names: tuple[str, ...],
    reduce_dtype: str,
    quantization: str = "none",
) -> jax.Array:
    """`x @ kernel` over x's last and the kernel's first axis, in the dtype of x.

    The kernel is gathered in that dtype, and again for the backward pass: no layer is kept whole.
    Its gradient comes out of the matrix product as `reduce_dtype`, and so it is summed over the
    devices: in bfloat16 half as much moves, but the sum over n devices rounds n times. (A product
    in bfloat16 has accumulated in float32 until there, at no cost.)

    Args:
        x: (..., inputs).
        kernel: (inputs, ...), float32.
        names: logical axes of the kernel.
        reduce_dtype: name of a dtype.
        quantization: of this product and of the one for the gradient of x, a name in
            `QUANTIZATIONS`. The kernel is then gathered in eight bits. The product for its own
            gradient stays in the dtype of x.
    """
    del reduce_dtype
    return _multiply(x, kernel, ((x.ndim - 1,), (0,)), names, quantization)


def _product_forward(x: jax.Array, kernel: jax.Array, *settings: Any):
    return product(x, kernel, *settings), (x, kernel)


def _product_backward(
    names: tuple[str, ...], reduce_dtype: str, quantization: str, saved: Any, dy: jax.Array
):
    x, kernel = saved
    leading = tuple(range(x.ndim - 1))
    outputs = tuple(range(x.ndim - 1, dy.ndim))

    def multiply(x: jax.Array, dy: jax.Array) -> jax.Array:
        if platform() == "tpu" and dy.shape[-1] % (2 * LANES) == LANES:
            # Of columns that are an odd number of lanes, as 2432 and 7296, the compiler for v6e
            # sums all rows on every device, which moves twice the bytes.
            dy = jnp.pad(dy, [(0, 0)] * (dy.ndim - 1) + [(0, LANES)])
        # On CPU the first factor is written down transposed: the smaller one.
        swap = x.shape[-1] > dy.shape[-1]
        factors = (dy, x) if swap else (x, dy)
        gradient = jax.lax.dot_general(
            *factors, ((leading, leading), ((), ())), preferred_element_type=jnp.dtype(reduce_dtype)
        )
        if swap and platform() == "cpu":
            # Without it the transpose becomes a part of the product, which is then 15% slower.
            gradient = jax.lax.optimization_barrier(gradient)
        return gradient.T if swap else gradient

    dkernel = kernel_gradient(multiply, x, dy, names).astype(kernel.dtype)
    contracted = (outputs, tuple(range(1, kernel.ndim)))
    return _multiply(dy, kernel, contracted, names, quantization), dkernel


product.defvjp(_product_forward, _product_backward)


def _multiply(
    x: jax.Array,
    kernel: jax.Array,
    contracted: tuple[tuple[int, ...], tuple[int, ...]],
    names: tuple[str, ...],
    quantization: str,
) -> jax.Array:
    """x times the kernel over these axes of the two, in the dtype of x."""
    dimensions = (contracted, ((), ()))
    if quantization == "none":
        return jax.lax.dot_general(x, gather_kernel(kernel.astype(x.dtype), names), dimensions)
    qwix, dtype = load_qwix(), QUANTIZATIONS[quantization]
    rows, columns = (
        [axis for axis in range(factor.ndim) if axis not in axes]
        for factor, axes in zip((x, kernel), contracted, strict=True)
    )
    # In float32: a quotient of up to 127 in bfloat16 would be rounded twice.
    quantized_x = qwix.quantize(x.astype(jnp.float32), dtype, channelwise_axes=rows)
    quantized_kernel = jax.tree.map(
        lambda part: gather_kernel(part, names),  # values and scales
        qwix.quantize(kernel, dtype, channelwise_axes=columns),
    )
    return qwix.dot_general(quantized_x, quantized_kernel, dimensions).astype(x.dtype)


def gather_kernel(kernel: jax.Array, names: Sequence[str]) -> jax.Array:
    """A parameter whole along fsdp, as it is used; what tensor splits stays split.

    Left to itself the TPU compiler turns a product with a split kernel into a loop over its parts,
    19 columns of 2432 on 128 chips. What is gathered is split until here: cast or quantised before.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return kernel
    kernel = fitted(kernel, place_of(kernel.shape, names, dict(mesh.shape)))
    return fitted(kernel, ["tensor" if RULES[n] == "tensor" else None for n in names])
