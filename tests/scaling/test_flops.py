"""Closed forms of FLOPs against XLA's own count and against the paper."""

import dataclasses
import functools
import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest

from mmdit_jax import config as config_lib
from mmdit_jax.encoders import clip, t5, vae
from mmdit_jax.models import BACKBONES
from mmdit_jax.models.backbone import REMAT_POLICIES
from mmdit_jax.models.crossdit import CrossBlock
from mmdit_jax.models.mmdit import JointBlock
from mmdit_jax.models.uvit import OutBlock
from mmdit_jax.scaling import flops

SD3 = {"context_width": 4096, "pooled_width": 2048, "patch_values": 64}


def unscanned(name):
    """XLA counts a scanned block once, so the blocks stand side by side here."""

    class Unscanned(BACKBONES[name]):
        def _scan(self, block, name, length, carry, *inputs, each=(), reverse=False, **settings):
            made = []
            for i in range(length):
                own = [xs[i] for xs in each]  # in whatever order: they are of one shape
                carry, more = block(**settings, name=f"{name}_{i}")(carry, *inputs, *own)
                made.append(more)
            return carry, made

    return Unscanned


def counted(function, *shapes) -> float:
    """XLA's count, which needs no compilation; it has the elementwise work, too."""
    return jax.jit(function).lower(*shapes).cost_analysis()["flops"]


def zeros(*shape):
    return jax.ShapeDtypeStruct(shape, jnp.float32)


def within_one_percent(depth, backbone="mmdit", dual=0):
    own = {"dual_attention_layers": dual} if dual else {}
    if backbone == "mmdit3":
        own["clip_tokens"] = 77
    model = unscanned(backbone)(depth=depth, attention="xla", **own)
    inputs = [zeros(1, 32, 32, 16), zeros(1), zeros(1, 154, 4096), zeros(1, 2048)]
    params = jax.eval_shape(model.init, jax.random.key(0), *inputs)
    closed = flops.backbone_forward(
        backbone=backbone,
        depth=depth,
        image_tokens=256,
        text_tokens=154,
        dual_attention_layers=dual,
        **SD3,
    )
    assert closed <= counted(model.apply, params, *inputs) < 1.01 * closed


def products(jaxpr) -> int:
    """FLOPs of the matrix products of a program, those inside a scan as often as it runs."""
    total = 0
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            (contracted, _), _ = equation.params["dimension_numbers"]
            terms = math.prod(equation.invars[0].aval.shape[i] for i in contracted)
            total += 2 * terms * math.prod(equation.outvars[0].aval.shape)
        times = equation.params["length"] if equation.primitive.name == "scan" else 1
        for value in equation.params.values():
            inner = getattr(value, "jaxpr", value)
            total += times * products(inner) if hasattr(inner, "eqns") else 0
    return total


@pytest.mark.parametrize(
    ("backbone", "depth", "dual"),
    [*((name, 3, 0) for name in BACKBONES), ("uvit", 4, 0), ("mmdit", 4, 2), ("mmdit3", 4, 2)],
)
def test_closed_forms_are_exactly_the_products_of_the_program(backbone, depth, dual):
    """With the blocks under their scan, as they train; pictures that are not square."""
    own = {"dual_attention_layers": dual} if dual else {}
    if backbone == "mmdit3":
        own["clip_tokens"] = 5
    model = BACKBONES[backbone](depth=depth, attention="xla", **own)
    inputs = [zeros(1, 8, 12, 16), zeros(1), zeros(1, 11, 4096), zeros(1, 2048)]
    params = jax.eval_shape(model.init, jax.random.key(0), *inputs)
    closed = flops.backbone_forward(
        backbone=backbone,
        depth=depth,
        image_tokens=24,
        text_tokens=11,
        dual_attention_layers=dual,
        **SD3,
    )
    assert products(jax.make_jaxpr(model.apply)(params, *inputs).jaxpr) == closed


def test_closed_form_of_mmdit_is_within_one_percent_of_xla():
    within_one_percent(15, dual=3)


@pytest.mark.parametrize(
    ("backbone", "dual"),
    [
        ("crossdit", 0),
        ("uvit", 0),
        pytest.param("dit", 0, marks=pytest.mark.long),
        pytest.param("mmdit3", 0, marks=pytest.mark.long),
        pytest.param("mmdit3", 3, marks=pytest.mark.long),
    ],
)
def test_closed_forms_of_the_other_backbones_are_within_one_percent_of_xla(backbone, dual):
    within_one_percent(15, backbone, dual)


@pytest.mark.long
@pytest.mark.parametrize("depth", range(15, 39))
def test_closed_form_of_every_depth_is_within_one_percent_of_xla(depth):
    within_one_percent(depth)


@pytest.mark.parametrize(
    ("last", "dual"), [pytest.param(False, False, marks=pytest.mark.long), (True, True)]
)
def test_what_a_remat_policy_computes_again_is_what_xla_counts_more(last, dual):
    block = JointBlock(heads=24, qk_norm=True, last=last, dual=dual, attention="xla")
    tokens = {"text_tokens": 154, "image_tokens": 256}
    inputs = ((zeros(1, 154, 1536), zeros(1, 256, 1536)), zeros(1, 1536))
    parts = flops.block_parts(width=1536, last=last, dual=dual, **tokens)

    def squares(out):
        (c, x), _ = out
        return jnp.sum(x**2) + (0.0 if last else jnp.sum(c**2))

    computes_again(block, inputs, parts, squares)


@pytest.mark.long
@pytest.mark.parametrize("block_class", [CrossBlock, OutBlock])
def test_what_a_block_of_another_backbone_computes_again_is_what_xla_counts_more(block_class):
    """Of DiT it is what OutBlock does but for the skip."""
    block = block_class(heads=24, qk_norm=True, attention="xla")
    x, y, c = zeros(1, 256, 1536), zeros(1, 1536), zeros(1, 154, 1536)
    if block_class is CrossBlock:
        inputs = (x, y, c)
        parts = flops.cross_block_parts(image_tokens=256, text_tokens=154, width=1536)
    else:
        inputs = (x, y, x)
        parts = flops.dit_block_parts(tokens=256, width=1536, skip=True)
    computes_again(block, inputs, parts, lambda out: jnp.sum(out[0] ** 2))


def computes_again(block, inputs, parts, squares):
    """Compares, for every policy, what XLA counts in the gradients with the table."""
    params = jax.eval_shape(block.init, jax.random.key(0), *inputs)

    def of_gradients(policy):
        apply = block.apply
        if policy is not None:
            apply = nn.remat(type(block), policy=policy)(**settings(block)).apply

        def loss(params, *inputs):
            return squares(apply(params, *inputs))

        return counted(jax.grad(loss, argnums=range(len(inputs) + 1)), params, *inputs)

    assert REMAT_POLICIES.keys() == flops.RECOMPUTED.keys()
    once = of_gradients(None)
    assert once == pytest.approx(3 * sum(parts.values()), rel=0.01)
    for name, policy in REMAT_POLICIES.items():
        again = sum(parts.get(part, 0) for part in flops.RECOMPUTED[name])
        assert of_gradients(policy) == pytest.approx(once + again, rel=0.01), name


def settings(module):
    names = (field.name for field in dataclasses.fields(module))
    return {name: getattr(module, name) for name in names if name not in ("parent", "name")}


def test_hardware_flops_are_model_flops_and_what_is_computed_again():
    config = config_lib.default(depth=24)
    model_flops = flops.train_per_sample(config)
    assert flops.hardware_per_sample(config) == model_flops
    config.model.remat = "full"
    again = flops.hardware_per_sample(config) - model_flops
    outside = {"image_tokens": 256, "text_tokens": 154, **SD3}
    assert again < flops.backbone_forward(depth=24, **outside) < 1.05 * again


def test_a_scanned_last_block_costs_the_text_that_nobody_reads():
    config = config_lib.default(depth=24)
    assert flops.recomputed_per_sample(config) == 0
    # Four of six vectors a sample, the projection out of the attention and the MLP of 154 tokens.
    text = 3 * 2 * (4 + 154 * 9) * 1536**2
    assert flops.recomputed_per_sample(config, platform="tpu") == text
    config.model.last_block = "scanned"
    assert flops.recomputed_per_sample(config) == text
    # It is under the remat policy then; apart it is not.
    block = flops.block_parts(image_tokens=256, text_tokens=154, width=1536)
    assert flops.recomputed_per_sample(config, remat="dots") == text + 24 * block["logits"]
    config.model.last_block = "apart"
    assert flops.recomputed_per_sample(config, remat="dots") == 23 * block["logits"]
    assert flops.recomputed_per_sample(config, platform="tpu") == 0
    # No block before it is of its kind.
    config.model.update(last_block="scanned", dual_attention_layers=23)
    assert flops.recomputed_per_sample(config) == 0


def test_closed_forms_of_text_encoders_are_within_one_percent_of_xla():
    """Their blocks are scanned, and XLA counts one of them."""
    config = clip.CLIPTextConfig(49408, 1280, 5120, 1, 20, 77, "gelu", 2, projection_dim=1280)
    module = clip.CLIPTextEncoder(config)
    ids = jax.ShapeDtypeStruct((1, 77), jnp.int32)
    sizes = {"layers": 1, "width": 1280, "mlp_width": 5120}
    closed = flops.clip_text_forward(tokens=77, projection=1280, **sizes)
    found = counted(module.apply, {"params": clip.abstract_params(module)}, ids)
    assert closed <= found < 1.01 * closed
    sizes = {"layers": 1, "heads": 64, "head_width": 64, "width": 4096, "mlp_width": 10240}
    module = t5.T5Encoder(t5.T5Config(vocab_size=32128, **sizes))
    closed = flops.t5_forward(tokens=77, **sizes)
    found = counted(module.apply, {"params": t5.abstract_params(module)}, ids)
    assert closed <= found < 1.01 * closed
    assert flops.t5_forward(tokens=77, **sizes | {"layers": 24}) == 24 * closed


def test_closed_forms_of_the_autoencoder_are_within_one_percent_of_xla():
    """With a 1 x 1 convolution at the end of one half and without one at the start of the other."""
    channels = (128, 256, 512, 512)
    module = vae.AutoencoderKL(vae.VAEConfig(channels, 2, 16, post_quant_conv=False))
    params = {"params": vae.abstract_params(module)}
    sizes = {"channels": channels, "layers": 2, "latent_channels": 16, "height": 64, "width": 96}
    encode = functools.partial(module.apply, method="encode")
    closed = flops.vae_encode(**sizes)
    assert closed <= counted(encode, params, zeros(1, 64, 96, 3)) < 1.01 * closed
    decode = functools.partial(module.apply, method="decode")
    closed = flops.vae_decode(post_quant_conv=False, **sizes)
    assert closed <= counted(decode, params, zeros(1, 8, 12, 16)) < 1.01 * closed


@pytest.mark.parametrize(
    ("depth", "expected"),
    [(15, 1.448e11), (18, 2.474e11), (21, 3.900e11), (24, 5.79e11), (30, 1.122e12), (38, 2.266e12)],
)
def test_forward_flops_equal_the_paper_notes(depth, expected):
    """paper.md 6.3, 256 image and 154 text tokens."""
    closed = flops.backbone_forward(depth=depth, image_tokens=256, text_tokens=154, **SD3)
    assert closed == pytest.approx(expected, rel=0.01)
