"""Classifier-free guidance (Ho & Salimans 2022), on the velocity, in an interval of t."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from mmdit_jax.flow.parameterization import per_sample

Array = jax.Array


def guided(
    predict: Callable[[Array, Array, Any], Array],
    condition: Any,
    null: Any,
    *,
    scale: float,
    interval: tuple[float, float] = (0.0, 1.0),
) -> Callable[[Array, Array], Array]:
    """The guided velocity v_null + scale (v_condition - v_null).

    Both passes are one call on a batch of 2B, in the order c0, n0, c1, n1, ..: a sample and its
    null stay on the device that holds the sample. Outside the interval, and at scale 1, only the
    conditional pass runs, so scale 1 is the conditional velocity bit by bit.

    Args:
        predict: (z (B, ...), t (B,), condition) -> velocity (B, ...).
        condition: a tree of (B, ...) arrays.
        null: the null condition, a tree of the same shapes.
        scale: 1 is conditional, 0 the null condition alone.
        interval: (t_low, t_high); guidance acts where t_low <= t <= t_high.

    Returns:
        velocity_fn(z (B, ...), t (B,)) for `solvers.solve`.

    Raises:
        ValueError: the interval is not ordered in [0, 1], or condition and null differ in shape.
    """
    t_low, t_high = interval
    if not 0 <= t_low <= t_high <= 1:
        raise ValueError(
            f"guidance interval ({t_low}, {t_high}) is not ordered inside [0, 1]: t = 1 is noise,"
            " (0, 1) guides everywhere"
        )

    def conditional(z: Array, t: Array) -> Array:
        return predict(z, t, condition)

    if scale == 1:
        return conditional
    shapes = (jax.tree.map(jnp.shape, condition), jax.tree.map(jnp.shape, null))
    if shapes[0] != shapes[1]:
        raise ValueError(
            f"null condition {shapes[1]} and condition {shapes[0]} differ in shape: build both with"
            " the same function"
        )
    both = jax.tree.map(_interleave, condition, null)

    def guided_everywhere(z: Array, t: Array) -> Array:
        output = predict(_interleave(z, z), _interleave(t, t), both).astype(jnp.float32)
        v_condition, v_null = output[0::2], output[1::2]
        inside = (t >= t_low) & (t <= t_high)
        v = v_null + scale * (v_condition - v_null)
        return jnp.where(per_sample(inside, v), v, v_condition)

    if (t_low, t_high) == (0, 1):
        return guided_everywhere

    def velocity_fn(z: Array, t: Array) -> Array:
        any_inside = jnp.any((t >= t_low) & (t <= t_high))
        return jax.lax.cond(
            any_inside, guided_everywhere, lambda z, t: conditional(z, t).astype(jnp.float32), z, t
        )

    return velocity_fn


def _interleave(first: Array, second: Array) -> Array:
    """(B, ...), (B, ...) -> (2B, ...) in the order first[0], second[0], first[1], .."""
    return jnp.stack([first, second], axis=1).reshape((-1,) + first.shape[1:])
