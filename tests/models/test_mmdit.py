"""The backbone: exact parameter counts, adaLN-zero, scan, shapes, and what must not happen."""

import functools
import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mmdit_jax.models import BACKBONES
from mmdit_jax.models.backbone import REMAT_POLICIES
from mmdit_jax.models.mmdit import JointBlock, MMDiT

# paper.md 3.4, MM-DiT with two weight sets, without QK-norm.
PARAMETERS = {
    12: 254_784_064,
    15: 496_066_624,
    16: 601_716_800,
    18: 856_159_552,
    20: 1_174_023_744,
    21: 1_358_950_720,
    22: 1_562_387_264,
    24: 2_028_328_000,
    30: 3_962_392_384,
    38: 8_056_617_792,
}


def shapes(backbone="mmdit", **settings):
    model = BACKBONES[backbone](**settings)
    inputs = (
        jnp.zeros((1, 32, 32, settings.get("channels", 16))),
        jnp.zeros((1,)),
        jnp.zeros((1, 154, 4096)),
        jnp.zeros((1, 2048)),
    )
    return jax.eval_shape(model.init, jax.random.key(0), *inputs)["params"]


def count(tree):
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))


@pytest.mark.parametrize("depth", PARAMETERS)
def test_parameter_count_equals_the_paper_with_and_without_qk_norm(depth):
    assert count(shapes(depth=depth, qk_norm=False)) == PARAMETERS[depth]
    assert count(shapes(depth=depth, qk_norm=True)) == PARAMETERS[depth] + 256 * depth


def test_parameter_counts_of_the_released_variants():
    assert count(shapes(depth=24, qk_norm=False)) == 2_028_328_000  # SD3-medium
    assert count(shapes(depth=38)) == 8_056_627_520  # SD3.5-large
    assert count(shapes(depth=24, dual_attention_layers=13)) == 2_243_171_520  # SD3.5-medium


def test_modulation_vectors_are_6_or_2_or_9_and_the_last_block_has_no_text_output():
    tree = nn.meta.unbox(shapes(depth=4, dual_attention_layers=2))
    vectors = {
        (block, stream): tree[block][stream]["adaLN_modulation"]["bias"].shape[-2]
        for block in ("dual_blocks", "joint_blocks", "last_block")
        for stream in ("x_block", "context_block")
    }
    assert vectors == {
        ("dual_blocks", "x_block"): 9,
        ("dual_blocks", "context_block"): 6,
        ("joint_blocks", "x_block"): 6,
        ("joint_blocks", "context_block"): 6,
        ("last_block", "x_block"): 6,
        ("last_block", "context_block"): 2,
    }
    assert set(tree["last_block"]["context_block"]) == {"adaLN_modulation", "attn"}
    assert "proj" not in tree["last_block"]["context_block"]["attn"]
    assert tree["dual_blocks"]["x_block"]["adaLN_modulation"]["bias"].shape[0] == 2


def test_every_parameter_has_a_logical_axis_for_every_dimension():
    from mmdit_jax.sharding import RULES

    boxed = jax.tree.leaves(
        shapes(depth=3, dual_attention_layers=1),
        is_leaf=lambda x: isinstance(x, nn.LogicallyPartitioned),
    )
    for leaf in boxed:
        assert isinstance(leaf, nn.LogicallyPartitioned)
        assert len(leaf.names) == len(leaf.value.shape)
        assert set(leaf.names) <= RULES.keys()


@functools.cache
def tiny(**settings):
    model = MMDiT(**{"depth": 2, "channels": 4, "pos_embed_native": 4, **settings})
    key = jax.random.key(1)
    inputs = (
        jax.random.normal(jax.random.fold_in(key, 0), (2, 8, 12, 4)),
        jnp.array([0.25, 0.75]),
        jax.random.normal(jax.random.fold_in(key, 1), (2, 5, 24)),
        jax.random.normal(jax.random.fold_in(key, 2), (2, 16)),
    )
    params = nn.meta.unbox(jax.jit(model.init)(key, *inputs)["params"])
    return model, params, inputs


def run(model, params, inputs):
    return jax.jit(model.apply)({"params": params}, *inputs)


def sowing(model):
    return jax.jit(functools.partial(model.apply, mutable=["intermediates"]))


def randomised(params, scale=0.05):
    """adaLN-zero hides everything behind zero gates: give every parameter a value."""
    rng = np.random.default_rng(2)
    return jax.tree.map(lambda x: x + np.float32(scale) * rng.standard_normal(x.shape, "f"), params)


def test_output_is_zero_at_initialisation_so_the_first_loss_is_the_variance_of_the_target():
    model, params, inputs = tiny()
    output = run(model, params, inputs)
    assert output.shape == inputs[0].shape and output.dtype == jnp.float32
    assert float(jnp.abs(output).max()) == 0.0


@pytest.mark.parametrize("dual", [False, True])
def test_a_freshly_initialised_block_is_the_identity(dual):
    block = JointBlock(heads=1, qk_norm=True, dual=dual)
    c = jax.random.normal(jax.random.key(0), (2, 5, 64))
    x = jax.random.normal(jax.random.key(1), (2, 7, 64))
    y = jax.random.normal(jax.random.key(2), (2, 64))
    params = jax.jit(block.init)(jax.random.key(3), (c, x), y)
    (c_out, x_out), _ = jax.jit(block.apply)(params, (c, x), y)
    np.testing.assert_array_equal(c_out, c)
    np.testing.assert_array_equal(x_out, x)


def test_scan_over_blocks_equals_a_loop_over_blocks():
    model, params, inputs = tiny(depth=3)
    params = randomised(params)
    scanned = run(model, params, inputs)

    calls = []

    class Looped(MMDiT):
        def _scan(self, block, name, length, carry, y_BD, **settings):
            calls.append(length)
            for i in range(length):
                layer = jax.tree.map(lambda x, i=i: x[i], params[name])
                one = block(**settings, parent=None)
                carry, _ = one.apply({"params": layer}, carry, y_BD)
            return carry, None

    looped = Looped(**{f: getattr(model, f) for f in ("depth", "channels", "pos_embed_native")})
    np.testing.assert_allclose(run(looped, params, inputs), scanned, atol=1e-5, rtol=1e-5)
    assert 2 in calls


@pytest.mark.long
def test_every_remat_policy_gives_the_same_loss_and_gradients():
    results = {}
    plain, params, inputs = tiny()
    params = randomised(params)
    for policy in REMAT_POLICIES:
        model = plain.clone(remat=policy)

        def loss(p, model=model):
            return jnp.mean(model.apply({"params": p}, *inputs) ** 2)

        results[policy] = jax.jit(jax.value_and_grad(loss))(params)
    for value, grads in results.values():
        np.testing.assert_allclose(value, results["none"][0], rtol=1e-6)
        for a, b in zip(jax.tree.leaves(grads), jax.tree.leaves(results["none"][1]), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)


def test_attention_is_not_causal():
    """T25: changing the last text token and the last image token changes the first image token."""
    model, params, inputs = tiny()
    params = randomised(params)
    z, t, context, pooled = inputs
    base = run(model, params, inputs)
    late_text = run(model, params, (z, t, context.at[:, -1].add(1.0), pooled))
    late_image = run(model, params, (z.at[:, -1, -1].add(1.0), t, context, pooled))
    assert float(jnp.abs(late_text - base)[:, 0, 0].max()) > 1e-6
    assert float(jnp.abs(late_image - base)[:, 0, 0].max()) > 1e-6


def test_qk_norm_bounds_the_attention_logits():
    for qk_norm, bounded in ((True, True), (False, False)):
        model, params, inputs = tiny(qk_norm=qk_norm)
        params = jax.tree_util.tree_map_with_path(
            lambda path, x: x * 100 if "'qkv'" in str(path) else x, params
        )
        _, sown = sowing(model)({"params": params}, *inputs)
        logits = jax.tree.leaves(sown)
        # RMS 1 over 64 entries: |q . k| / 8 <= 64 / 8.
        assert (max(float(x.max()) for x in logits) <= 8.001) == bounded


def test_attention_logits_are_reported_for_every_block():
    model, params, inputs = tiny(depth=3)
    _, sown = sowing(model)({"params": params}, *inputs)
    assert sum(leaf.size for leaf in jax.tree.leaves(sown)) == 3


def test_all_inputs_matter_and_bfloat16_stays_close():
    model, params, inputs = tiny()
    params = randomised(params)
    base = run(model, params, inputs)
    for i in range(4):
        changed = list(inputs)
        changed[i] = changed[i] + 0.1
        assert float(jnp.abs(run(model, params, changed) - base).max()) > 1e-5
    half = MMDiT(depth=2, channels=4, pos_embed_native=4, dtype=jnp.bfloat16)
    output = run(half, params, inputs)
    assert output.dtype == jnp.float32
    assert 0 < float(jnp.abs(output - base).max()) < 0.1 * float(jnp.abs(base).max()) + 0.02


def test_a_latent_that_is_too_large_is_refused_with_the_number():
    model, params, inputs = tiny(pos_embed_max_size=6)
    z = jnp.zeros((1, 8, 16, 4))
    with pytest.raises(ValueError, match="4 x 8 patches exceed the position grid of 6 x 6"):
        model.apply({"params": params}, z, inputs[1][:1], inputs[2][:1], inputs[3][:1])


def test_a_latent_that_is_no_multiple_of_the_patch_is_refused():
    model, params, inputs = tiny()
    with pytest.raises(ValueError, match="multiples of the patch"):
        model.apply({"params": params}, jnp.zeros((2, 7, 8, 4)), *inputs[1:])


@pytest.mark.parametrize(
    "way", [{"scan_last": True}, {"unroll_up_to": 2}], ids=["last_in_the_scan", "written_out"]
)
@pytest.mark.parametrize(
    "settings",
    [
        {"depth": 3},
        {"depth": 3, "dual_attention_layers": 1},
        {"depth": 3, "dual_attention_layers": 3},
        {"depth": 3, "clip_tokens": 4, "remat": "dots"},
        # None of its kind before it: apart in any case.
        {"depth": 3, "dual_attention_layers": 2},
        {"depth": 1},
    ],
)
def test_other_ways_to_run_the_blocks_give_the_same_outputs_logits_and_gradients(settings, way):
    apart, scanned = MMDiT(**settings), MMDiT(**settings, **way)
    keys = iter(jax.random.split(jax.random.key(3), 100))
    inputs = (
        jax.random.normal(next(keys), (2, 8, 8, 16)),
        jnp.array([0.2, 0.7]),
        jax.random.normal(next(keys), (2, 10, 32)),
        jax.random.normal(next(keys), (2, 48)),
    )
    start = nn.meta.unbox(apart.init(next(keys), *inputs)["params"])
    # Gates and the final layer start as zeros, which would hide what is behind them.
    params = jax.tree.map(lambda x: x + 0.05 * jax.random.normal(next(keys), x.shape), start)

    def run(model):
        def loss(params):
            output, sown = model.apply({"params": params}, *inputs, mutable=["intermediates"])
            return jnp.sum(output**2), jnp.concatenate(
                [jnp.ravel(x) for x in jax.tree.leaves(sown)]
            )

        return jax.jit(jax.value_and_grad(loss, has_aux=True))(params)

    (loss, logits), gradients = run(apart)
    (scanned_loss, scanned_logits), scanned_gradients = run(scanned)
    np.testing.assert_allclose(scanned_loss, loss, rtol=1e-6)
    np.testing.assert_allclose(np.sort(scanned_logits), np.sort(logits), rtol=1e-5)
    assert jax.tree.structure(scanned_gradients) == jax.tree.structure(gradients)
    for own, other in zip(
        jax.tree.leaves(scanned_gradients), jax.tree.leaves(gradients), strict=True
    ):
        np.testing.assert_allclose(own, other, rtol=1e-4, atol=1e-5 * float(jnp.abs(other).max()))
    shapes = jax.eval_shape(scanned.init, next(keys), *inputs)["params"]
    assert jax.tree.map(jnp.shape, nn.meta.unbox(shapes)) == jax.tree.map(jnp.shape, start)


@pytest.mark.parametrize("most, loops", [(0, 1), (1, 1), (2, 0)])
def test_short_stacks_are_written_out(most, loops):
    model = MMDiT(depth=3, unroll_up_to=most)
    inputs = (jnp.zeros((1, 8, 8, 16)), jnp.zeros(1), jnp.zeros((1, 4, 32)), jnp.zeros((1, 48)))
    params = jax.eval_shape(model.init, jax.random.key(0), *inputs)
    assert jax.jit(model.apply).lower(params, *inputs).as_text().count("stablehlo.while") == loops
