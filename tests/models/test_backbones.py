"""All backbones: counts, the identity at first, scan and loop, what is a special case of what."""

import functools
import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mmdit_jax import config as config_lib
from mmdit_jax import mesh as mesh_lib
from mmdit_jax import run
from mmdit_jax.models import BACKBONES
from mmdit_jax.models.backbone import REMAT_POLICIES
from mmdit_jax.models.crossdit import CrossBlock
from mmdit_jax.models.dit import DiTBlock
from mmdit_jax.models.uvit import InBlock, OutBlock
from mmdit_jax.scaling import flops
from mmdit_jax.sharding import RULES
from tests.models.test_attention import compiled_gradients
from tests.models.test_mmdit import count, randomised, shapes

# paper.md 3.4, without QK-norm: one set of weights, and three.
ONE_SET = {
    12: 134_919_232,
    15: 259_009_024,
    16: 313_122_880,
    18: 443_130_688,
    20: 605_127_744,
    21: 699_228_160,
    22: 802_652_992,
    24: 1_039_245_376,
    30: 2_018_814_784,
    38: 4_086_543_168,
}
THREE_SETS = {
    12: 374_648_896,
    15: 733_124_224,
    16: 890_310_720,
    18: 1_269_188_416,
    20: 1_742_919_744,
    21: 2_018_673_280,
    22: 2_322_121_536,
    24: 3_017_410_624,
    30: 5_905_969_984,
    38: 12_026_692_416,
}
SOME = [pytest.param(d, marks=[] if d == 38 else pytest.mark.long) for d in ONE_SET]
OTHERS = ("mmdit3", "dit", "crossdit", "uvit")
EVERY_OTHER = pytest.mark.parametrize("name", OTHERS)


def make(name, **settings):
    own = {"clip_tokens": 2} if name == "mmdit3" else {}
    return BACKBONES[name](**{"depth": 2, "channels": 4, "pos_embed_native": 4, **own, **settings})


@pytest.mark.parametrize("depth", SOME)
def test_parameter_counts_are_those_of_the_paper_and_of_what_is_added(depth):
    def counted(name, qk_norm=False):
        own = {"clip_tokens": 77} if name == "mmdit3" else {}
        return count(shapes(name, depth=depth, qk_norm=qk_norm, **own))

    width = 64 * depth
    assert counted("mmdit3") == THREE_SETS[depth]
    assert counted("dit") == ONE_SET[depth]
    cross = 4 * width * width + 4 * width
    assert counted("crossdit") == ONE_SET[depth] + depth * cross
    skips = depth // 2 * (2 * width * width + width)
    assert counted("uvit") == ONE_SET[depth] + skips
    assert counted("mmdit3", True) - THREE_SETS[depth] == 3 * 128 * depth
    assert counted("dit", True) - ONE_SET[depth] == 128 * depth
    assert counted("crossdit", True) - ONE_SET[depth] - depth * cross == 2 * 128 * depth


def test_the_tables_of_all_rooms_have_the_same_backbones():
    assert BACKBONES.keys() == flops.BLOCKS.keys() == {"mmdit", *OTHERS}
    for name in BACKBONES:
        config = config_lib.default(depth=3)
        config.model.backbone = name
        assert type(run.build(config).model) is BACKBONES[name]
    config.model.backbone = "mmdit3"
    assert run.build(config).model.clip_tokens == 77


@EVERY_OTHER
def test_every_parameter_has_a_logical_axis_for_every_dimension(name):
    boxed = jax.tree.leaves(
        shapes(name, depth=3), is_leaf=lambda x: isinstance(x, nn.LogicallyPartitioned)
    )
    for leaf in boxed:
        assert len(leaf.names) == len(leaf.value.shape) and set(leaf.names) <= RULES.keys()


@functools.cache
def tiny(name, **settings):
    """Model, parameters that hide nothing behind zero gates, inputs."""
    model = make(name, **settings)
    key = jax.random.key(1)
    inputs = (
        jax.random.normal(jax.random.fold_in(key, 0), (2, 8, 12, 4)),
        jnp.array([0.25, 0.75]),
        jax.random.normal(jax.random.fold_in(key, 1), (2, 5, 24)),
        jax.random.normal(jax.random.fold_in(key, 2), (2, 16)),
    )
    abstract = nn.meta.unbox(jax.eval_shape(model.init, key, *inputs)["params"])
    return model, randomised(jax.tree.map(lambda x: jnp.zeros(x.shape), abstract)), inputs


def output(model, params, inputs):
    return jax.jit(model.apply)({"params": params}, *inputs)


def test_a_freshly_initialised_block_is_the_identity():
    x, c, skip = (jax.random.normal(jax.random.key(n), (2, 7, 64)) for n in range(3))
    y = jax.random.normal(jax.random.key(3), (2, 64))
    for block, more in ((DiTBlock, ()), (CrossBlock, (c,)), (InBlock, ()), (OutBlock, (skip,))):
        module = block(heads=1, qk_norm=True)
        (found, emitted), params = jax.jit(module.init_with_output)(jax.random.key(4), x, y, *more)
        assert all(name in params["params"] for name in ("adaLN_modulation", "attn", "mlp"))
        np.testing.assert_array_equal(found, x)
        assert (emitted is None) == (block is not InBlock)


@pytest.mark.long
@EVERY_OTHER
def test_all_inputs_matter_and_no_token_is_hidden_from_another(name):
    """T25: the last text token and the last image token change the first image token."""
    model, params, (z, t, context, pooled) = tiny(name)
    apply = jax.jit(model.apply)
    base = apply({"params": params}, z, t, context, pooled)
    assert base.shape == z.shape and base.dtype == jnp.float32
    changed = (
        (z.at[:, -1, -1].add(1.0), t, context, pooled),
        (z, t + 0.1, context, pooled),
        (z, t, context.at[:, -1].add(1.0), pooled),
        (z, t, context.at[:, 0].add(1.0), pooled),
        (z, t, context, pooled + 0.1),
    )
    for other in changed:
        found = apply({"params": params}, *other)
        assert float(jnp.abs(found - base)[:, 0, 0].max()) > 1e-6


def one_set_as_two(params):
    """Parameters of DiT as those of MM-DiT whose two sets of weights are the same."""
    params = dict(params)
    blocks = params.pop("blocks")
    last = jax.tree.map(lambda x: x[-1], blocks)
    attn = {part: last["attn"][part] for part in ("qkv", "ln_q", "ln_k")}
    modulation = last["adaLN_modulation"]
    ends = {"kernel": modulation["kernel"][:, :2], "bias": modulation["bias"][:2]}
    scanned = jax.tree.map(lambda x: x[:-1], blocks)
    return params | {
        "joint_blocks": {"context_block": scanned, "x_block": scanned},
        "last_block": {
            "context_block": {"adaLN_modulation": ends, "attn": attn},
            "x_block": last,
        },
    }


def test_dit_is_mmdit_whose_sets_of_weights_are_equal():
    model, params, inputs = tiny("dit", depth=3)
    found = output(make("mmdit", depth=3), one_set_as_two(params), inputs)
    np.testing.assert_allclose(found, output(model, params, inputs), atol=1e-5, rtol=1e-5)


@pytest.mark.long
def test_two_sets_are_three_of_which_those_of_the_text_are_equal():
    model, params, inputs = tiny("mmdit", depth=3)
    three = params | {
        name: {
            "clip_block": params[name]["context_block"],
            "t5_block": params[name]["context_block"],
            "x_block": params[name]["x_block"],
        }
        for name in ("joint_blocks", "last_block")
    }
    found = output(make("mmdit3", depth=3), three, inputs)
    np.testing.assert_allclose(found, output(model, params, inputs), atol=1e-5, rtol=1e-5)


@pytest.mark.long
def test_three_sets_are_applied_each_to_its_own_tokens():
    """With weights of zero a kind of text is not seen, whatever its tokens; the other kind is."""
    model, params, (z, t, context, pooled) = tiny("mmdit3")
    apply = jax.jit(model.apply)
    for block, own in (("clip_block", slice(0, 2)), ("t5_block", slice(2, 5))):
        silent = jax.tree.map(lambda x: x, params)
        for name in ("joint_blocks", "last_block"):
            silent[name][block] = jax.tree.map(jnp.zeros_like, silent[name][block])
        base = apply({"params": silent}, z, t, context, pooled)
        other = jnp.ones(5, bool).at[own].set(False)[None, :, None]
        hidden = apply({"params": silent}, z, t, context + ~other, pooled)
        np.testing.assert_allclose(hidden, base, atol=1e-6)
        seen = apply({"params": silent}, z, t, context + other, pooled)
        assert float(jnp.abs(seen - base).max()) > 1e-5


@pytest.mark.parametrize("depth", [pytest.param(2, marks=pytest.mark.long), 5])
def test_uvit_hands_what_enters_a_block_to_its_counterpart(depth):
    """Against a plain loop; the skips of a pair are at the same place in both halves."""
    model, params, inputs = tiny("uvit", depth=depth)
    order = []

    class Looped(BACKBONES["uvit"]):
        def _scan(self, block, name, length, carry, *shared, each=(), reverse=False, **settings):
            def one(i, carry, *more):
                own = jax.tree.map(lambda x: x[i], params[name])
                module = block(**settings, parent=None)
                order.append((name, i))
                return module.apply({"params": own}, carry, *shared, *more)[0]

            if name == "out_blocks":
                for i in range(length)[::-1]:
                    carry = one(i, carry, self.entered[i])
                return carry, None
            entered = []
            for i in range(length):
                entered.append(carry)
                carry = one(i, carry)
            if name == "in_blocks":
                object.__setattr__(self, "entered", entered)
            return carry, [None]

    looped = Looped(**{f: getattr(model, f) for f in ("depth", "channels", "pos_embed_native")})
    found = output(looped, params, inputs)
    np.testing.assert_allclose(found, output(model, params, inputs), atol=1e-5, rtol=1e-5)
    pairs = depth // 2
    names = ["in_blocks"] * pairs + ["middle_blocks"] * (depth % 2) + ["out_blocks"] * pairs
    assert [name for name, _ in order] == names
    assert [i for name, i in order if name == "out_blocks"] == list(range(pairs))[::-1]


@pytest.mark.long
def test_uvit_without_its_skips_is_dit():
    model, params, inputs = tiny("uvit", depth=3)
    params = jax.tree.map(lambda x: x, params)  # a copy
    for part in ("kernel", "bias"):
        params["out_blocks"]["skip_linear"][part] *= 0
    blocks = [
        {k: v for k, v in params[name].items() if k != "skip_linear"}
        for name in ("in_blocks", "middle_blocks", "out_blocks")
    ]
    plain = {k: v for k, v in params.items() if not k.endswith("_blocks")}
    plain["blocks"] = jax.tree.map(lambda *xs: jnp.concatenate(xs), *blocks)
    found = output(make("dit", depth=3), plain, inputs)
    np.testing.assert_allclose(found, output(model, params, inputs), atol=1e-5, rtol=1e-5)


@pytest.mark.long
@EVERY_OTHER
def test_program_does_not_grow_with_depth(name):
    def products(depth):
        model = make(name, depth=depth)
        inputs = (
            jax.ShapeDtypeStruct((1, 8, 8, 4), jnp.float32),
            jax.ShapeDtypeStruct((1,), jnp.float32),
            jax.ShapeDtypeStruct((1, 5, 24), jnp.float32),
            jax.ShapeDtypeStruct((1, 16), jnp.float32),
        )
        params = jax.eval_shape(model.init, jax.random.key(0), *inputs)["params"]
        program = jax.make_jaxpr(model.apply)({"params": nn.meta.unbox(params)}, *inputs)
        return str(program).count("dot_general")

    assert products(21) == products(7) > 10


@pytest.mark.long
def test_attention_logits_of_every_block_are_reported():
    for name, attentions in (("mmdit3", 3), ("dit", 3), ("crossdit", 6), ("uvit", 3)):
        model, params, inputs = tiny(name, depth=3)
        apply = functools.partial(model.apply, mutable=["intermediates"])
        _, sown = jax.eval_shape(apply, {"params": params}, *inputs)
        assert sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(sown)) == attentions, name


@pytest.mark.long
@EVERY_OTHER
def test_every_remat_policy_gives_the_same_loss_and_gradients(name):
    plain, params, inputs = tiny(name, depth=3)
    results = {}
    for policy in REMAT_POLICIES:
        model = plain.clone(remat=policy)

        def loss(p, model=model):
            return jnp.mean(model.apply({"params": p}, *inputs) ** 2)

        results[policy] = jax.jit(jax.value_and_grad(loss))(params)
    for value, grads in results.values():
        np.testing.assert_allclose(value, results["none"][0], rtol=1e-6)
        for a, b in zip(jax.tree.leaves(grads), jax.tree.leaves(results["none"][1]), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)


@pytest.mark.long
@EVERY_OTHER
def test_tokens_over_devices_give_the_same_loss_and_gradients(name):
    """5 text and 15 image tokens over 4 devices: padded, each stream or all together."""
    model, params, inputs = tiny(name, depth=3)
    inputs = (jax.random.normal(jax.random.key(5), (2, 6, 10, 4)), *inputs[1:])

    def loss(params, *inputs):
        return jnp.mean(model.apply({"params": params}, *inputs) ** 2)

    (value, grads), _ = compiled_gradients(loss, None, params, *inputs)
    mesh = mesh_lib.make_mesh(data=2, context=4)
    (found, found_grads), _ = compiled_gradients(loss, mesh, params, *inputs)
    np.testing.assert_allclose(found, value, rtol=1e-6)
    for a, b in zip(jax.tree.leaves(found_grads), jax.tree.leaves(grads), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5 * float(jnp.abs(b).max()) + 1e-8)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"backbone": "dit", "dual_attention_layers": 1},
            "dual_attention_layers=1 is for mmdit and mmdit3 alone; set it to 0 for "
            "model.backbone='dit'",
        ),
        ({"backbone": "uvit", "depth": 1}, "model.depth=1 leaves model.backbone='uvit' .*use 2"),
        ({"backbone": "unet"}, "'unet' is unknown; known are mmdit, mmdit3, dit, crossdit, uvit"),
    ],
)
def test_what_does_not_go_together_is_refused(settings, message):
    config = config_lib.default(depth=3)
    config.model.update(settings)
    with pytest.raises(ValueError, match=message):
        run.build(config)
