"""Which updates are made: a step that diverges leaves the parameters as they were.

A step is accepted when its loss and its gradient are finite and, with the spike rule, when neither
is far above what the last accepted steps had. The decision falls on the device, from numbers that
are the same on all of them: no host is asked, and all hosts agree.

`step` advances whether or not the update was made, so the next step draws other samples and noise.
Nothing else does: a skipped step is none to the optimizer. Its counts stand still with its moments,
because Adam's bias correction counts the updates that the moments have seen; so a learning-rate
schedule, which counts updates too, is late by the number of skipped steps.
"""

from typing import Any

import flax
import jax
import jax.numpy as jnp


@flax.struct.dataclass
class Guard:
    """What the state remembers about faults; all hosts hold the same.

    Attributes:
        skipped: updates that were not made, of all steps; int32, as the other counters.
        skipped_in_a_row: up to the last step.
        nonfinite_samples: samples of weight 0, since their latent or text was not finite.
        substituted: samples that stood in for a damaged record.
        accepted: updates that were made. The next one is recorded at `accepted` modulo the window.
        losses: of the last accepted steps, float32 (window,), in a ring.
        grad_norms: of the same steps.
    """

    skipped: jax.Array
    skipped_in_a_row: jax.Array
    nonfinite_samples: jax.Array
    substituted: jax.Array
    accepted: jax.Array
    losses: jax.Array
    grad_norms: jax.Array


def fresh(window: int) -> Guard:
    """The guard of a run that has made no step; `window` is `faults.spike_window`."""
    counters = (jnp.zeros((), jnp.int32) for _ in range(5))
    return Guard(*counters, losses=jnp.zeros(window), grad_norms=jnp.zeros(window))


def accepts(guard: Guard, loss: jax.Array, grad_norm: jax.Array, *, sigma: float) -> jax.Array:
    """Whether the update of a step is made, a bool.

    Args:
        guard: of the state before the step.
        loss: of the step.
        grad_norm: global norm of its gradient, before clipping.
        sigma: a spike is more than this many standard deviations above the mean of the window,
            once the window is full; 0 knows no spikes.
    """
    accepted = jnp.isfinite(loss) & jnp.isfinite(grad_norm)
    if sigma > 0:
        for value, window in ((loss, guard.losses), (grad_norm, guard.grad_norms)):
            spike = value > jnp.mean(window) + sigma * jnp.std(window)
            accepted &= ~(spike & (guard.accepted >= window.size))
    return accepted


def chosen(accepted: jax.Array, new: Any, old: Any) -> Any:
    """The new tree if the step is accepted, otherwise the old one, bit for bit.

    A select, which the compiler joins with the update itself: it writes where the donated state
    lies. With `lax.cond` both branches would have to hand over whole arrays.
    """
    return jax.tree.map(lambda n, o: jnp.where(accepted, n, o), new, old)


def advance(
    guard: Guard,
    accepted: jax.Array,
    loss: jax.Array,
    grad_norm: jax.Array,
    *,
    nonfinite_samples: jax.Array,
    substituted: jax.Array,
) -> Guard:
    """The guard after a step: everything is counted, but only accepted steps enter the window."""
    place = guard.accepted % guard.losses.size

    def record(window: jax.Array, value: jax.Array) -> jax.Array:
        return jnp.where(accepted, window.at[place].set(value), window)

    made = accepted.astype(jnp.int32)
    return Guard(
        skipped=guard.skipped + (1 - made),
        skipped_in_a_row=(guard.skipped_in_a_row + 1) * (1 - made),
        nonfinite_samples=guard.nonfinite_samples + nonfinite_samples,
        substituted=guard.substituted + substituted,
        accepted=guard.accepted + made,
        losses=record(guard.losses, loss),
        grad_norms=record(guard.grad_norms, grad_norm),
    )


def metrics(guard: Guard, accepted: jax.Array) -> dict[str, jax.Array]:
    """What the loop reads of a step: whether its update was skipped, and the counters so far."""
    return {
        "skipped": 1 - accepted.astype(jnp.int32),
        "skipped_in_a_row": guard.skipped_in_a_row,
        "skipped_total": guard.skipped,
        "nonfinite_samples_total": guard.nonfinite_samples,
        "substituted_total": guard.substituted,
    }
