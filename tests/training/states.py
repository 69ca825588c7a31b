"""A small state on a mesh, to be saved and restored."""

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from mmdit_jax import sharding
from mmdit_jax.training import guard
from mmdit_jax.training.state import StatePlan, TrainState

PLACES = {
    "params": {"kernel": P(None, "fsdp"), "bias": P()},
    "opt_state": {"mu": P("fsdp"), "flags": P(), "half": P("fsdp", "tensor")},
}


def small_state(step: int = 0, devices: int = 1, **mesh: int) -> TrainState:
    """Arrays of several dtypes that depend on the step."""
    grid = sharding.make_mesh(**(mesh or {"data": -1, "fsdp": 1}), devices=jax.devices()[:devices])
    rng = np.random.default_rng(step)

    def place(x, spec: P):
        return jax.device_put(x, NamedSharding(grid, spec))

    def normal(*shape: int):
        return rng.standard_normal(shape).astype(np.float32)

    params = {
        "kernel": place(normal(3, 64, 8), P(None, "fsdp")),
        "bias": place(normal(8), P()),
    }
    opt_state = {
        "mu": place(normal(64, 8), P("fsdp")),
        "flags": place(rng.integers(0, 2, 16).astype(bool), P()),
        "half": place(jnp.asarray(normal(32, 8), jnp.bfloat16), P("fsdp", "tensor")),
        "count": place(np.int32(step), P()),
    }
    return TrainState(
        step=place(np.int32(step), P()),
        params=params,
        ema_params=jax.tree.map(lambda x: x + 1, params),
        opt_state=opt_state,
        guard=jax.tree.map(lambda x: place(x + step, P()), guard.fresh(4)),
    )


def plan_of(state: TrainState) -> StatePlan:
    """What is needed to restore such a state where this one lies."""
    return StatePlan(
        abstract=jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), state),
        shardings=jax.tree.map(lambda x: x.sharding, state),
        boxed_params=None,
    )


def assert_same(a: TrainState, b: TrainState) -> None:
    """Bit for bit, wherever the arrays lie."""
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert x.dtype == y.dtype
        np.testing.assert_array_equal(np.asarray(x), np.asarray(y))
