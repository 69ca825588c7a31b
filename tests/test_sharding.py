"""Meshes and placement: what divides, what is refused, what would fit."""

import flax.linen as nn
import jax
import numpy as np
import pytest

from mmdit_jax import config as config_lib
from mmdit_jax import run, sharding
from mmdit_jax.training import state as state_lib


def plan(depth: int, **mesh):
    config = config_lib.default(depth=depth)
    made = sharding.abstract_mesh(**{"data": 1, "fsdp": 1, "tensor": 1, "context": 1, **mesh})
    return run.plan(run.build(config), made)[1], made


@pytest.mark.parametrize(("depth", "fsdp"), [(15, 64), (21, 64), (24, 256), (38, 128), (38, 64)])
def test_every_large_parameter_and_its_moments_are_split(depth, fsdp):
    made, _ = plan(depth, fsdp=fsdp)
    leaves = zip(jax.tree.leaves(made.abstract), jax.tree.leaves(made.shardings), strict=True)
    whole = 0
    for leaf, placed in leaves:
        local = int(np.prod(placed.shard_shape(leaf.shape)))
        whole += leaf.size if local == leaf.size else 0
        if leaf.size > sharding.LARGE_PARAMETER:
            assert local * fsdp == leaf.size
    # Biases and norm scales stay whole: next to nothing.
    assert whole < 2e-3 * sum(leaf.size for leaf in jax.tree.leaves(made.abstract))


def test_depth_38_is_refused_where_nothing_divides():
    with pytest.raises(ValueError, match="fsdp=7 divides no dimension.*choose an fsdp size"):
        plan(38, fsdp=7)


def test_a_dimension_that_does_not_divide_gives_its_axis_to_another():
    """Width 2432 = 128 x 19 does not divide by 256, the 4096 text features do."""
    mesh = sharding.abstract_mesh(data=1, fsdp=256, tensor=1, context=1)
    shape = jax.ShapeDtypeStruct((4096, 2432), np.float32)
    boxed = {"kernel": nn.LogicallyPartitioned(shape, ("features", "embed"))}
    spec = sharding.parameter_shardings(boxed, mesh)["kernel"].spec
    assert tuple(spec) == ("fsdp", None)
    small = {"bias": nn.LogicallyPartitioned(jax.ShapeDtypeStruct((38,), np.float32), ("embed",))}
    assert tuple(sharding.parameter_shardings(small, mesh)["bias"].spec) == (None,)


def test_optimizer_moments_and_ema_lie_where_their_parameter_lies():
    for name in config_lib.OPTIMIZERS:
        config = config_lib.default(depth=4)
        config.optimizer.name = name
        mesh = sharding.abstract_mesh(data=1, fsdp=8, tensor=2, context=1)
        made = run.plan(run.build(config), mesh)[1]
        specs = {
            jax.tree_util.keystr(path): placed.spec
            for path, placed in jax.tree_util.tree_leaves_with_path(made.shardings)
        }
        qkv = "['joint_blocks']['x_block']['attn']['qkv']['kernel']"
        found = {key: spec for key, spec in specs.items() if key.endswith(qkv)}
        assert len(found) >= 3  # params, EMA, at least one moment
        assert len(set(map(str, found.values()))) == 1
        assert "fsdp" in str(specs[".params" + qkv]) and "tensor" in str(specs[".params" + qkv])


def test_minus_one_takes_what_is_left():
    mesh = sharding.make_mesh(fsdp=2, tensor=2)
    assert dict(mesh.shape) == {"data": 2, "fsdp": 2, "tensor": 2, "context": 1}


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"data": -1, "fsdp": -1}, "at most one may be -1"),
        ({"data": 3}, "needs 3 devices, 8 are here"),
        ({"data": -1, "fsdp": 3}, "needs a multiple of 3 devices, 8 are here"),
        ({"data": 0}, "1 or more"),
    ],
)
def test_meshes_that_cannot_be_are_refused(sizes, message):
    with pytest.raises(ValueError, match=message):
        sharding.make_mesh(**sizes)


def test_a_batch_that_does_not_divide_is_refused_with_sizes_that_do():
    mesh = sharding.make_mesh(fsdp=4)
    with pytest.raises(ValueError, match="batch_size=20.*8 parts.*use 16 or 24"):
        sharding.check_batch(mesh, 20)
    with pytest.raises(ValueError, match="use 16"):
        sharding.check_batch(mesh, 8, accumulate=2)
    sharding.check_batch(mesh, 16, accumulate=2)


def test_state_is_made_on_the_mesh_and_the_overview_counts_its_bytes():
    config = config_lib.default(depth=2, resolution=32, text_length=3)
    config.model.update(channels=4, context_width=64)
    for encoder in config.data.text_encoders.values():
        encoder.update(width=16, pooled_width=min(encoder.pooled_width, 16))
    mesh = sharding.make_mesh(data=1, fsdp=8)
    optimizer, made = run.plan(run.build(config), mesh)
    state = state_lib.init_state(config, optimizer, made)
    table, total = sharding.overview(made.abstract, made.shardings)
    held = sum(
        shard.data.nbytes
        for leaf in jax.tree.leaves(state)
        for shard in leaf.addressable_shards
        if shard.device == jax.devices()[0]
    )
    assert held == total
    assert "params/joint_blocks/x_block/attn/qkv/kernel" in table
