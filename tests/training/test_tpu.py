"""The training step by the compiler of TPUs: its kernel, its collectives, its memory."""

import re

import pytest

from mmdit_jax import config as config_lib
from mmdit_jax import programs, run, sharding, topologies
from mmdit_jax.scaling import chips

pytestmark = [pytest.mark.slow, pytest.mark.tpu_compiler]


@pytest.mark.parametrize(
    ("depth", "name", "mesh"),
    [
        (24, "v5e:4x4", {"fsdp": 16}),
        (38, "v5p:4x4x4", {"fsdp": 64}),
        (38, "v6e:8x8", {"fsdp": 32, "context": 2}),
    ],
)
def test_a_step_has_the_kernel_of_attention_and_gathers_kernels_whole(depth, name, mesh):
    pytest.importorskip("libtpu")
    topology = chips.topology(name)
    made = sharding.make_mesh(devices=topologies.devices(topology), **mesh)
    config = config_lib.default(depth=depth)
    config.batch_size = 8 * topology.devices
    config.model.update(dtype="bfloat16", remat="attention_out")
    compiled = programs.train(run.build(config), made).compile()
    text, memory = compiled.as_text(), compiled.memory_analysis()
    assert "tpu_custom_call" in text and "flash_fwd" in text and "flash_bwd" in text
    # No product is cut into a loop over the parts of a kernel.
    assert "windowed_dot_general" not in text
    # The state is donated; everything fits.
    assert memory.alias_size_in_bytes > 0.98 * memory.argument_size_in_bytes
    used = memory.argument_size_in_bytes + memory.temp_size_in_bytes
    assert used < topology.chip.hbm_limit
    # Kernels move as they are multiplied, in bfloat16.
    wide = re.findall(r"f32\[[0-9,]*\d{4}[0-9,]*\]\S* all-gather\(", text)
    assert not wide, wide


def test_no_iteration_of_a_loop_is_taken_out_of_it_on_two_slices():
    """The pipeliner would, to sum over slices during the next: twice the code, more memory."""
    pytest.importorskip("libtpu")
    topology = chips.topology("v5e:4x4", 2)
    made = sharding.make_mesh(devices=topologies.devices(topology), data=4, fsdp=8)
    config = config_lib.default(depth=6)
    config.batch_size = 8 * topology.devices
    config.optimizer.accumulate = 4
    config.model.update(dtype="bfloat16", remat="dots")
    text = programs.train(run.build(config), made).compile().as_text()
    # One over micro-batches, and in it two over layers.
    assert len(re.findall(r" while\(", text)) == 3
    assert "loop_peel" not in text
