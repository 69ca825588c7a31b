"""Vectors of adaLN on meshes: the numbers of one device, and kernels that stay where they lie."""

import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mmdit_jax import sharding
from mmdit_jax.models.modulation import KERNEL, Modulation

BATCH, WIDTH, VECTORS = 16, 32, 6
MODULE = Modulation(VECTORS)


def array(seed, *shape):
    return jax.random.normal(jax.random.key(seed), shape)


def loss(params, y_BD):
    return jnp.sum(MODULE.apply({"params": params}, y_BD) * array(3, BATCH, VECTORS, WIDTH))


def made():
    params = {"kernel": array(0, WIDTH, VECTORS, WIDTH), "bias": array(1, VECTORS, WIDTH)}
    return params, array(2, BATCH, WIDTH)


def test_it_is_a_linear_map_with_the_gradients_of_one():
    params, y_BD = made()
    plain = jax.grad(
        lambda p, y: jnp.sum(
            (jnp.einsum("bd,dse->bse", y, p["kernel"]) + p["bias"][None])
            * array(3, BATCH, VECTORS, WIDTH)
        ),
        argnums=(0, 1),
    )
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-4),
        jax.grad(loss, argnums=(0, 1))(params, y_BD),
        plain(params, y_BD),
    )


@pytest.mark.parametrize(
    "sizes",
    [
        {"data": 2, "fsdp": 4},
        {"data": 1, "fsdp": 4, "context": 2},
        {"data": 2, "fsdp": 2, "tensor": 2},
    ],
)
def test_on_a_mesh_vectors_move_and_the_kernel_does_not(sizes):
    params, y_BD = made()
    step = jax.value_and_grad(loss, argnums=(0, 1))
    expected = step(params, y_BD)
    mesh = sharding.make_mesh(**sizes)
    boxed = {
        "kernel": nn.LogicallyPartitioned(jax.eval_shape(lambda: params["kernel"]), KERNEL),
        "bias": nn.LogicallyPartitioned(jax.eval_shape(lambda: params["bias"]), KERNEL[1:]),
    }
    places = sharding.parameter_shardings(boxed, mesh)
    batch = sharding.batch_sharding(mesh)
    with sharding.entered(mesh):
        compiled = (
            jax.jit(
                step,
                in_shardings=(places, batch),
                out_shardings=(sharding.replicated(mesh), (places, batch)),
            )
            .lower(params, y_BD)
            .compile()
        )
    found = compiled(*jax.device_put((params, y_BD), (places, batch)))
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-4), found, expected
    )
    text = compiled.as_text()
    assert "all-to-all" in text
    # No collective has more than a device's own columns of the kernel.
    own = params["kernel"].size // sizes["fsdp"]
    for shape in re.findall(r"= f32\[([\d,]+)\]\S* (?:all|reduce)-\w+\(", text):
        assert np.prod([int(size) for size in shape.split(",")]) <= own, shape
