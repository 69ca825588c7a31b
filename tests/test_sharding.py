"""Placement: what divides, what is refused, what would fit."""

import flax.linen as nn
import jax
import numpy as np
import pytest

from mmdit_jax import config as config_lib
from mmdit_jax import overview, run, sharding
from mmdit_jax.training import state as state_lib
from tests.testdata import make_sharding_goldens


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
    shape = jax.ShapeDtypeStruct((256, 9728, 2432), np.float32)  # the largest that divides
    boxed = {"kernel": nn.LogicallyPartitioned(shape, ("features", "stack", "embed"))}
    spec = sharding.parameter_shardings(boxed, mesh)["kernel"].spec
    assert tuple(spec) == (None, "fsdp", None)
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


@pytest.mark.parametrize(("tensor", "fits"), [(4, "1, 2"), (16, "1, 2"), (3, "1, 2")])
def test_tensor_that_cuts_a_head_is_refused_with_what_fits(tensor, fits):
    """The width 2432 divides by 4 and by 16, its 38 heads do not."""
    message = f"tensor={tensor} does not divide the 38 heads.*divide the .* devices: {fits}$"
    with pytest.raises(ValueError, match=message):
        plan(38, fsdp=8, tensor=tensor)
    plan(38, fsdp=8, tensor=19)


def test_fsdp_that_does_not_fit_is_refused_with_what_fits():
    with pytest.raises(ValueError, match=r"data x fsdp = 512 .* fsdp=128 data=4$"):
        plan(38, fsdp=256, data=2)


def compare_with_golden(depths):
    golden = make_sharding_goldens.read()
    made = dict(make_sharding_goldens.cases(depths))
    assert made == {line: layout for line, layout in golden.items() if line in made}
    return made, golden


def test_every_parameter_lies_where_the_table_says():
    """Whoever means to change the table makes it again and shows the difference."""
    compare_with_golden([15, 38])


@pytest.mark.long
def test_the_whole_table_of_depths_and_topologies():
    made, golden = compare_with_golden(make_sharding_goldens.DEPTHS)
    assert made == golden


def test_state_is_made_on_the_mesh_and_the_overview_counts_its_bytes():
    config = config_lib.default(depth=2, resolution=32, text_length=3)
    config.model.update(channels=4, context_width=64)
    for encoder in config.data.text_encoders.values():
        encoder.update(width=16, pooled_width=min(encoder.pooled_width, 16))
    mesh = sharding.make_mesh(data=1, fsdp=8)
    optimizer, made = run.plan(run.build(config), mesh)
    state = state_lib.init_state(config, optimizer, made)
    table, total = overview.table(made.abstract, made.shardings)
    held = sum(
        shard.data.nbytes
        for leaf in jax.tree.leaves(state)
        for shard in leaf.addressable_shards
        if shard.device == jax.devices()[0]
    )
    assert held == total
    assert "params/joint_blocks/x_block/attn/qkv/kernel" in table
