"""Products in eight bits: within rounding, on any mesh, with gradients; without, as it was."""

import functools
import re
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mmdit_jax import config as config_lib
from mmdit_jax import run, sharding
from mmdit_jax.models import BACKBONES
from mmdit_jax.models.product import QUANTIZATIONS, product
from tests.models.test_backbones import tiny

NAMES = ("embed", "stack", "heads_out")
QUANTIZED = pytest.mark.parametrize("quantization", ["int8", "fp8"])


def factors(inputs=96):
    """Activations with tokens of very different size, a kernel, and the gradient of the result."""
    keys = jax.random.split(jax.random.key(0), 4)
    size = jnp.exp(3 * jax.random.normal(keys[3], (4, 6, 1)))
    return (
        size * jax.random.normal(keys[0], (4, 6, inputs)),
        jax.random.normal(keys[1], (inputs, 3, 64)) / 8,
        size[..., None] * jax.random.normal(keys[2], (4, 6, 3, 64)),
    )


def with_gradients(x, kernel, dy, quantization):
    def apply(x, kernel):
        return product(x, kernel, NAMES, "float32", quantization)

    y, backward = jax.vjp(apply, x, kernel)
    return y, *backward(dy)


def rounding(factor, axes, quantization):
    """By how much each entry may change, if its scale follows from the largest along the axes."""
    largest = np.abs(factor).max(axes, keepdims=True)
    if quantization == "int8":  # half of a step of 127.5 on either side of zero
        return np.broadcast_to(largest / 255, factor.shape)
    # Half of the last of 3 bits, and below 2^-6, where they end, half of 2^-9.
    return np.maximum(np.abs(factor) / 16, largest / 448 / 1024)


@pytest.fixture
def qwix():
    pytest.importorskip("qwix")


@QUANTIZED
def test_a_product_is_within_the_rounding_of_its_factors(qwix, quantization):
    x, kernel, dy = factors()
    y, dx, dkernel = with_gradients(x, kernel, dy, quantization)
    flat_dy, flat_kernel = np.reshape(dy, (4, 6, -1)), np.reshape(kernel, (len(kernel), -1))
    for found, a, b in (
        (np.reshape(y, flat_dy.shape), x, flat_kernel),
        (dx, flat_dy, flat_kernel.T),
    ):
        a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
        da, db = rounding(a, -1, quantization), rounding(b, 0, quantization)
        bound = np.abs(a) @ db + da @ np.abs(b) + da @ db
        error = np.abs(found - a @ b)
        assert np.all(error <= 1.0001 * bound)
        # Errors of both signs cancel, and it is rounded at all.
        assert 0.01 < np.mean(error) / np.mean(bound) < 0.2
    # The gradient of the kernel is not rounded.
    np.testing.assert_array_equal(dkernel, with_gradients(x, kernel, dy, "none")[2])


@QUANTIZED
def test_a_token_is_rounded_by_itself(qwix, quantization):
    x, kernel, _ = factors()
    whole = product(x, kernel, NAMES, "float32", quantization)
    alone = product(x[2:3, 4:5], kernel, NAMES, "float32", quantization)
    np.testing.assert_allclose(alone, whole[2:3, 4:5], rtol=1e-5)
    zeros = product(jnp.zeros_like(x), kernel, NAMES, "float32", quantization)
    np.testing.assert_array_equal(zeros, 0)


@QUANTIZED
@pytest.mark.parametrize(
    "sizes", [{"data": 2, "fsdp": 4}, {"fsdp": 2, "tensor": 2, "context": 2}], ids=str
)
def test_any_mesh_gives_the_same_and_gathers_kernels_in_eight_bits(qwix, quantization, sizes):
    arrays = factors(inputs=256)
    expected = with_gradients(*arrays, quantization)
    with sharding.entered(sharding.make_mesh(**sizes)):
        program = functools.partial(with_gradients, quantization=quantization)
        compiled = jax.jit(program).lower(*arrays).compile()
    found = compiled(*arrays)
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5 * float(jnp.abs(b).max()))
    gathered = re.findall(r"= (\w+)\[([\d,]+)\]\S* all-gather\(", compiled.as_text())
    large = {d for d, shape in gathered if np.prod([int(n) for n in shape.split(",")]) > 10_000}
    # XLA on CPU moves float8 as bytes, or as the float16 that it multiplies.
    assert large <= {"s8", "u8", "f8e4m3fn", "f16"} and large


def test_without_qwix_the_plain_product_works_and_a_quantised_one_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "qwix", None)
    x, kernel, dy = factors()
    y, backward = jax.vjp(lambda x, k: jnp.einsum("bli,isk->blsk", x, k), x, kernel)
    for a, b in zip(with_gradients(x, kernel, dy, "none"), (y, *backward(dy)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5 * float(jnp.abs(b).max()))
    config = config_lib.default(depth=2)
    run.build(config)
    config.model.quantization = "int8"
    with pytest.raises(ValueError, match=r"^model.quantization needs .*qwix.*pip install.*none$"):
        run.build(config)


def test_the_config_has_the_names_of_the_table():
    assert config_lib.QUANTIZATIONS == tuple(QUANTIZATIONS)


def loss_and_gradients(model, params, inputs, mesh=None):
    def loss(params):
        return jnp.mean(jnp.square(model.apply({"params": params}, *inputs) - inputs[0]))

    with sharding.entered(mesh):
        return jax.jit(jax.value_and_grad(loss))(params)


def cosine(a, b):
    a, b = (np.concatenate([np.ravel(x) for x in jax.tree.leaves(tree)]) for tree in (a, b))
    return float(a @ b / np.linalg.norm(a) / np.linalg.norm(b))


@pytest.mark.long
@pytest.mark.parametrize("name", BACKBONES)
def test_gradients_of_every_backbone_point_where_the_exact_ones_do(qwix, name):
    """Under scan and remat; of each block, so that none passes its gradient by."""
    model, params, inputs = tiny(name, depth=3)
    exact, gradients = loss_and_gradients(model, params, inputs)
    for quantization in ("int8", "fp8"):
        quantized = model.clone(quantization=quantization, remat="dots")
        value, found = loss_and_gradients(quantized, params, inputs)
        assert 0 < abs(value - exact) < 0.01 * exact
        assert found.keys() == gradients.keys()
        for part in found:
            assert 0.99 < cosine(found[part], gradients[part]) < 1 - 1e-9, part


@pytest.mark.long
def test_a_quantised_model_on_eight_devices_is_that_of_one(qwix):
    """But for what is on the edge of two steps, where the last bit decides."""
    model, params, inputs = tiny("mmdit", depth=2)
    model = model.clone(quantization="int8", remat="full")
    value, gradients = loss_and_gradients(model, params, inputs)
    mesh = sharding.make_mesh(fsdp=2, tensor=2, context=2)
    found, found_gradients = loss_and_gradients(model, params, inputs, mesh)
    np.testing.assert_allclose(found, value, rtol=1e-4)
    assert cosine(found_gradients, gradients) > 0.9999
