"""The vectors that shift, scale and gate the tokens of a sample: adaLN (Peebles and Xie 2023)."""

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from mmdit_jax.models.layers import INITIALIZERS, PRODUCT
from mmdit_jax.sharding import constrain

# Logical axes of the kernel, of the vectors as they are used, and as they are computed.
KERNEL = ("condition", "stack", "vectors")
OF_SAMPLES = ("batch", None, "width")
OF_ALL = ("replica", None, "vectors")


class Modulation(nn.Module):
    """One linear map of a condition to several vectors: (B, D) -> (B, S, D).

    A third of the weights of a block of MM-DiT are here, for one product a sample and not one a
    token. So they stay where they lie, and vectors move: each device computes its columns for all
    samples of its fsdp axis.

    Attributes:
        vectors: S.
        dtype: of the matrix product; parameters are float32.
        reduce_dtype: of the kernel's gradient, before it is summed over devices.
    """

    vectors: int
    dtype: Any = jnp.float32
    reduce_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, y_BD: jax.Array) -> jax.Array:
        width = y_BD.shape[-1]

        def parameter(name: str, axes: tuple[str, ...], *shape: int) -> jax.Array:
            zeros = nn.with_logical_partitioning(INITIALIZERS["zeros"], axes)
            return self.param(name, zeros, shape, jnp.float32)

        kernel = parameter("kernel", KERNEL, width, self.vectors, width)
        bias_SD = parameter("bias", KERNEL[1:], self.vectors, width)
        reduce_dtype = jnp.dtype(self.reduce_dtype).name
        m_BSD = modulation(y_BD.astype(self.dtype), kernel, bias_SD, reduce_dtype)
        return checkpoint_name(m_BSD, PRODUCT)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def modulation(
    y_BD: jax.Array, kernel_DSD: jax.Array, bias_SD: jax.Array, reduce_dtype: str
) -> jax.Array:
    """`y @ kernel + bias` in the dtype of y, (B, S, D); the kernel does not move along fsdp."""
    del reduce_dtype
    m_BSD = jax.lax.dot_general(_of_all(y_BD), _kernel(kernel_DSD, y_BD), (((1,), (0,)), ((), ())))
    m_BSD = constrain(m_BSD + bias_SD[None].astype(y_BD.dtype), *OF_ALL)
    return constrain(m_BSD, *OF_SAMPLES)


def _forward(y_BD: jax.Array, kernel_DSD: jax.Array, bias_SD: jax.Array, reduce_dtype: str):
    return modulation(y_BD, kernel_DSD, bias_SD, reduce_dtype), (y_BD, kernel_DSD)


def _backward(reduce_dtype: str, saved: Any, dm_BSD: jax.Array):
    y_BD, kernel_DSD = saved
    dm_BSD = constrain(constrain(dm_BSD, *OF_SAMPLES), *OF_ALL)
    dkernel_DSD = jax.lax.dot_general(
        _of_all(y_BD), dm_BSD, (((0,), (0,)), ((), ())), preferred_element_type=reduce_dtype
    )
    # What a device has is the sum over its columns: rounded after it is summed over all of them.
    dy_BD = jax.lax.dot_general(
        dm_BSD,
        _kernel(kernel_DSD, y_BD),
        (((1, 2), (1, 2)), ((), ())),
        preferred_element_type=jnp.float32,
    )
    return (
        # Summed first and cut then: else the partitioner makes a loop over the columns of it.
        constrain(_of_all(dy_BD), "batch", "width").astype(y_BD.dtype),
        constrain(dkernel_DSD, None, None, "vectors").astype(jnp.float32),
        constrain(jnp.sum(dm_BSD, axis=0, dtype=jnp.float32), None, "vectors"),
    )


def _of_all(y_BD: jax.Array) -> jax.Array:
    return constrain(y_BD, "replica", "width")


def _kernel(kernel_DSD: jax.Array, y_BD: jax.Array) -> jax.Array:
    return constrain(kernel_DSD.astype(y_BD.dtype), None, None, "vectors")


modulation.defvjp(_forward, _backward)
