"""Attention: every implementation against float64, the choice by platform, tokens over devices."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mmdit_jax import config as config_lib
from mmdit_jax import mesh as mesh_lib
from mmdit_jax import sharding
from mmdit_jax.models import attention as attention_lib
from mmdit_jax.models import flash
from mmdit_jax.models.attention import QKV, Projected, joint_attention
from tests.models.test_mmdit import randomised, tiny

HEADS, SIZE = 2, 64


def streams(*lengths, batch=2, seed=0, dtype=jnp.float32, heads=HEADS, norm=False):
    """Random queries, keys and values; with QK-norm each stream has scales of its own."""
    rng = np.random.default_rng(seed)

    def draw(length):
        return jnp.asarray(rng.normal(size=(batch, length, heads * SIZE)), dtype)

    def projected(length):
        scale = jnp.asarray(1 + 0.3 * rng.normal(size=SIZE), jnp.float32)
        return Projected(draw(length), scale if norm else None)

    return [QKV(projected(n), projected(n), draw(n)) for n in lengths]


def reference(parts, cotangents):
    """Outputs of the streams, and gradients as a tree like `parts`, in float64 by the formulas."""
    ends = np.cumsum([part.v.shape[1] for part in parts])[:-1]

    def exact(x):
        x = np.asarray(x, np.float64)
        return x.reshape(*x.shape[:2], -1, SIZE)

    def norm(x):
        root = 1 / np.sqrt(np.mean(exact(x.x_BLD) ** 2, axis=-1, keepdims=True) + 1e-6)
        return exact(x.x_BLD) * root, root

    def normed(x):
        return exact(x.x_BLD) if x.scale_K is None else norm(x)[0] * np.float64(x.scale_K)

    def norm_gradient(x, dy):
        if x.scale_K is None:
            return Projected(flat(dy), None)
        hat, root = norm(x)
        dhat = dy * np.float64(x.scale_K)
        dx = root * (dhat - hat * np.mean(dhat * hat, axis=-1, keepdims=True))
        return Projected(flat(dx), np.sum(dy * hat, axis=(0, 1, 2)))

    def flat(x):
        return x.reshape(*x.shape[:2], -1)

    q, k = (
        np.concatenate([normed(getattr(part, name)) for part in parts], axis=1) for name in "qk"
    )
    v = np.concatenate([exact(part.v) for part in parts], axis=1)
    g = np.concatenate([exact(x) for x in cotangents], axis=1)
    logits = np.einsum("blnk,bmnk->bnlm", q, k) / SIZE**0.5
    p = np.exp(logits - logits.max(axis=-1, keepdims=True))
    p /= p.sum(axis=-1, keepdims=True)
    dp = np.einsum("blnk,bmnk->bnlm", g, v)
    ds = p * (dp - (p * dp).sum(axis=-1, keepdims=True)) / SIZE**0.5
    gradients = (
        np.einsum("bnlm,bmnk->blnk", ds, k),
        np.einsum("bnlm,blnk->bmnk", ds, q),
        np.einsum("bnlm,blnk->bmnk", p, g),
    )
    outputs = np.split(flat(np.einsum("bnlm,bmnk->blnk", p, v)), ends, axis=1)
    split = zip(*(np.split(x, ends, axis=1) for x in gradients), strict=True)
    return outputs, [
        QKV(norm_gradient(part.q, dq), norm_gradient(part.k, dk), flat(dv))
        for part, (dq, dk, dv) in zip(parts, split, strict=True)
    ]


def agrees(implementation, lengths, *, dtype, relative, **more):
    parts = streams(*lengths, dtype=dtype, **more)
    cotangents = [part.v for part in streams(*lengths, seed=1, dtype=dtype, **more)]

    @jax.jit
    def values(parts):
        outputs, pull = jax.vjp(lambda x: joint_attention(x, implementation=implementation), parts)
        return outputs, pull(cotangents)[0]

    found, exact = (jax.tree.leaves(x) for x in (values(parts), reference(parts, cotangents)))
    for one, other in zip(found, exact, strict=True):
        assert one.shape == other.shape and one.dtype in (dtype, jnp.float32)
        error = np.abs(np.asarray(one, np.float64) - other).max() / np.abs(other).max()
        assert error < relative


def test_xla_agrees_with_float64():
    agrees("xla", (5, 24), dtype=jnp.float32, relative=1e-5)
    agrees("xla", (5, 24), dtype=jnp.bfloat16, relative=0.03)


@pytest.mark.parametrize("name", ["xla", "flash", "splash"])
def test_streams_are_normalised_by_scales_of_their_own(name):
    agrees(name, (5, 24), dtype=jnp.float32, relative=1e-5, norm=True)


@pytest.mark.parametrize("heads", [2, 3])
def test_flash_agrees_with_float64_whatever_the_length(heads):
    """29 tokens are padded to 32, and an odd head is joined by one of zeros."""
    agrees("flash", (5, 24), dtype=jnp.float32, relative=1e-5, heads=heads)
    agrees("flash", (5, 24), dtype=jnp.bfloat16, relative=0.03, heads=heads, norm=True)


def test_flash_agrees_with_float64_over_several_blocks(monkeypatch):
    for name, value in (("ONE_BLOCK", 256), ("LEAST_QUERIES", 128), ("MOST_LOGITS", 128 * 128)):
        monkeypatch.setattr(flash, name, value)
    assert flash.blocks(321, 321) == ((384, 128), (384, 128))
    agrees("flash", (77, 200, 44), dtype=jnp.float32, relative=1e-5, norm=True)
    agrees("flash", (128, 256), dtype=jnp.float32, relative=1e-5)


@pytest.mark.parametrize(
    ("tokens", "expected"),
    [
        ((29, 29), ((32, 32), (32, 32))),
        ((410, 410), ((416, 416), (416, 416))),
        ((1178, 1178), ((1280, 640), (1280, 640))),
        ((4250, 4250), ((4352, 256), (4352, 2176))),
        ((1063, 4250), ((1152, 384), (4352, 2176))),
        ((4096, 154), ((4096, 2048), (256, 256))),
    ],
)
def test_blocks_of_flash_waste_little_and_fit_vmem(tokens, expected):
    found = flash.blocks(*tokens)
    assert found == expected
    (padded, block), (padded_keys, key_block) = found
    assert padded % block == padded_keys % key_block == 0
    assert padded >= tokens[0] and padded_keys >= tokens[1]


def test_splash_agrees_with_float64_whatever_the_length():
    """29 tokens are padded to 128."""
    agrees("splash", (5, 24), dtype=jnp.float32, relative=1e-5)


@pytest.mark.long
def test_splash_agrees_with_float64_over_several_blocks(monkeypatch):
    monkeypatch.setattr(attention_lib, "MOST_BLOCK", 128)
    monkeypatch.setattr(attention_lib, "LEAST_BLOCK", 128)
    agrees("splash", (77, 244), dtype=jnp.float32, relative=1e-5)
    agrees("splash", (128, 128), dtype=jnp.bfloat16, relative=0.03)


@pytest.mark.accelerator
@pytest.mark.parametrize("lengths", [(154, 256), (154, 4096), (77, 256)])
def test_the_kernel_of_the_accelerator_agrees_with_float64(lengths):
    if jax.default_backend() == "cpu":
        pytest.skip("no accelerator here")
    agrees("auto", lengths, dtype=jnp.bfloat16, relative=0.03)


@pytest.mark.parametrize(
    ("length", "padded", "block"),
    [(29, 128, 128), (410, 512, 512), (1024, 1024, 1024), (1178, 1280, 640), (4250, 4480, 896)],
)
def test_padding_is_to_the_least_length_of_large_blocks(length, padded, block):
    assert attention_lib.padding(length) == (padded, block)


def test_the_implementation_follows_the_platform_of_the_mesh_and_can_be_forced(monkeypatch):
    def choice(platform, dtype=jnp.bfloat16, wanted="auto", kind="TPU v6 lite", keys=410):
        monkeypatch.setattr(sharding, "platform", lambda: platform)
        monkeypatch.setattr(sharding, "device_kind", lambda: kind)
        return attention_lib.chosen(wanted, dtype, keys)

    assert choice("cpu") == "xla"
    assert choice("tpu") == "flash"
    assert choice("tpu", kind="TPU v4") == "splash"
    assert choice("tpu", keys=128 * 128) == "splash"
    assert choice("gpu") == "cudnn_or_xla"
    assert choice("gpu", jnp.float32) == "xla"
    for name in config_lib.ATTENTIONS[1:]:
        assert choice("tpu", wanted=name) == name
        assert name in (*attention_lib.IMPLEMENTATIONS, attention_lib.FLASH)


def test_xla_takes_over_where_cudnn_refuses():
    parts = streams(5, 24, dtype=jnp.bfloat16)
    joined = [
        jnp.concatenate([attention_lib.heads(x) for x in xs], axis=1)
        for xs in zip(*((part.q.x_BLD, part.k.x_BLD, part.v) for part in parts), strict=True)
    ]
    with pytest.raises((RuntimeError, ValueError, NotImplementedError)):
        attention_lib.cudnn_attention(*joined)
    expected = attention_lib.xla_attention(*joined)
    np.testing.assert_array_equal(attention_lib.cudnn_or_xla_attention(*joined), expected)


def compiled_gradients(function, mesh, *arguments):
    """Value and gradients on a mesh, and the compiled program."""
    with sharding.entered(mesh):
        program = jax.jit(jax.value_and_grad(function)).lower(*arguments).compile()
        return program(*arguments), program.as_text()


def gathered_sizes(text):
    """Last axis of everything that is gathered from other devices."""
    found = re.findall(r"f32\[([0-9,]*)\]\S* all-gather\(", text)
    return {int(shape.split(",")[-1]) for shape in found}


@pytest.mark.parametrize("name", ["xla", "flash", "splash"])
def test_queries_stay_and_keys_and_values_are_gathered(name):
    """5 and 15 tokens over 4 devices: padded to 8 and 16, and the padding is not attended to."""
    whole = streams(5, 15, batch=1, norm=True)

    def pad(x):
        missing = ((0, 0), (0, -x.shape[1] % 4), (0, 0))
        return jnp.pad(x, missing, constant_values=7.0)

    padded = jax.tree.map(lambda x: pad(x) if x.ndim == 3 else x, whole)
    mesh = mesh_lib.make_mesh(data=1, tensor=2, context=4)

    def value(parts, tokens=None):
        found = joint_attention(parts, tokens, name)
        kept = [o[:, :n] for o, n in zip(found, (5, 15), strict=True)]
        return jnp.sum(jnp.sin(jnp.concatenate(kept, axis=1)))

    expected, expected_grads = jax.jit(jax.value_and_grad(value))(whole)
    (found, grads), text = compiled_gradients(
        functools.partial(value, tokens=(5, 15)), mesh, padded
    )
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    for n, a, b in zip((5, 15), grads, expected_grads, strict=True):
        for part, exact in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
            if part.ndim == 1:  # a scale, of which each device has all
                np.testing.assert_allclose(part, exact, rtol=1e-4, atol=1e-5)
                continue
            np.testing.assert_allclose(part[:, :n], exact, atol=1e-5)
            np.testing.assert_array_equal(part[:, n:], 0)
    shapes = re.findall(r"f32\[([0-9,]*)\]\S* all-gather\(", text)
    # Of each stream the keys and the values, with one of the two heads.
    own = ["1,16,64", "1,8,64"] if name == "flash" else ["1,16,1,64", "1,8,1,64"]
    assert sorted(shapes) == sorted(own * 2)


@pytest.mark.long
@pytest.mark.parametrize(
    "sizes", [{"context": 4, "data": 2}, {"context": 2, "fsdp": 2, "tensor": 2}]
)
def test_a_model_with_its_tokens_over_devices_has_the_same_loss_and_gradients(sizes):
    """5 text and 15 image tokens, and one block with an attention of the image alone."""
    model, params, inputs = tiny(dual_attention_layers=1)
    inputs = (jax.random.normal(jax.random.key(5), (2, 6, 10, 4)), *inputs[1:])
    params = randomised(params, 0.1)

    def loss(params, *inputs):
        return jnp.mean(model.apply({"params": params}, *inputs) ** 2)

    (value, grads), _ = compiled_gradients(loss, None, params, *inputs)
    mesh = mesh_lib.make_mesh(**{"data": 1, **sizes})
    (found, found_grads), text = compiled_gradients(loss, mesh, params, *inputs)
    np.testing.assert_allclose(found, value, rtol=1e-6)
    for a, b in zip(jax.tree.leaves(found_grads), jax.tree.leaves(grads), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5 * float(jnp.abs(b).max()) + 1e-8)
    if "data" in sizes:  # the parameters are whole: heads of 64, and the output in patches of 16
        assert gathered_sizes(text) == {16, 64}
