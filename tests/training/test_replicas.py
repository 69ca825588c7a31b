"""Copies of the state that differ are found, and the devices that hold them are named."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mmdit_jax import sharding
from mmdit_jax.training.replicas import ReplicaMismatch, compare_replicas


def with_wrong_copy(array, device: int, change) -> jax.Array:
    """The array, but what one device holds of it is changed."""
    parts = []
    for shard in array.addressable_shards:
        held = np.array(shard.data)
        changed = change(held) if shard.device.id == device else held
        parts.append(jax.device_put(changed, shard.device))
    return jax.make_array_from_single_device_arrays(array.shape, array.sharding, parts)


def flip_a_bit(held: np.ndarray) -> np.ndarray:
    held.reshape(-1).view(np.uint8)[0] ^= 1  # the lowest bit of the first element
    return held


def exchange(held: np.ndarray) -> np.ndarray:
    return held[::-1]


@pytest.fixture(scope="module")
def replicas():
    """A tree on a mesh of data 2 x fsdp 4, `split` has two copies, `whole` eight."""
    mesh = sharding.make_mesh(data=2, fsdp=4)
    shardings = {
        "split": sharding.frozen_shardings(jax.ShapeDtypeStruct((8, 3), jnp.float32), mesh),
        "half": sharding.replicated(mesh),
        "whole": {"kernel": sharding.replicated(mesh), "count": sharding.replicated(mesh)},
    }
    values = {
        "split": np.arange(24, dtype=np.float32).reshape(8, 3),
        "half": np.arange(6, dtype=np.float32).astype(jnp.bfloat16),
        "whole": {"kernel": np.array([1.0, -0.0, np.nan], np.float32), "count": np.int32(3)},
    }
    return jax.device_put(values, shardings)


def test_equal_copies_pass_also_where_they_hold_nan(replicas):
    tree = replicas
    compare_replicas(tree, 1)


@pytest.mark.parametrize(("device", "change"), [(0, flip_a_bit), (5, flip_a_bit), (5, exchange)])
def test_the_device_whose_copy_differs_from_most_is_named(replicas, device, change):
    tree = replicas
    wrong = tree["whole"] | {"kernel": with_wrong_copy(tree["whole"]["kernel"], device, change)}
    with pytest.raises(ReplicaMismatch) as raised:
        compare_replicas(tree | {"whole": wrong}, 40)
    message = str(raised.value)
    assert "step 40: 1 arrays differ" in message
    assert f"whole/kernel on {jax.devices()[device]} of process 0." in message


@pytest.mark.parametrize("name", ["half", "count"])
def test_sixteen_bits_and_counters_are_compared(replicas, name):
    tree = replicas
    if name == "half":
        wrong = tree | {"half": with_wrong_copy(tree["half"], 2, flip_a_bit)}
    else:
        count = with_wrong_copy(tree["whole"]["count"], 2, lambda held: held + 1)
        wrong = tree | {"whole": tree["whole"] | {"count": count}}
    with pytest.raises(ReplicaMismatch, match=rf"{name} on {jax.devices()[2]}"):
        compare_replicas(wrong, 1)


def test_of_two_copies_both_are_named_and_the_parts_are_not_mixed_up(replicas):
    """Devices 1 and 5 hold the same quarter; the other quarters differ from theirs rightly."""
    tree = replicas
    with pytest.raises(ReplicaMismatch) as raised:
        compare_replicas(tree | {"split": with_wrong_copy(tree["split"], 5, flip_a_bit)}, 1)
    one, two = jax.devices()[1], jax.devices()[5]
    assert f"split among {one} of process 0, {two} of process 0." in str(raised.value)
