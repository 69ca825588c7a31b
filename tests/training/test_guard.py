"""The decision whether an update is made, and what is remembered of it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mmdit_jax.training import guard as guard_lib


def advance(guard, loss, grad_norm, *, sigma=0.0, nonfinite=0, substituted=0):
    loss, grad_norm = jnp.float32(loss), jnp.float32(grad_norm)
    accepted = guard_lib.accepts(guard, loss, grad_norm, sigma=sigma)
    return guard_lib.advance(
        guard,
        accepted,
        loss,
        grad_norm,
        nonfinite_samples=jnp.int32(nonfinite),
        substituted=jnp.int32(substituted),
    ), bool(accepted)


@pytest.mark.parametrize("sigma", [0.0, 6.0])
@pytest.mark.parametrize("loss", [1.0, np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("grad_norm", [1.0, np.nan, np.inf])
def test_only_a_finite_loss_with_a_finite_gradient_is_accepted(loss, grad_norm, sigma):
    _, accepted = advance(guard_lib.fresh(4), loss, grad_norm, sigma=sigma)
    assert accepted == (loss == 1.0 and grad_norm == 1.0)


def test_counters_are_exact_and_the_row_ends_with_an_accepted_step():
    guard, rows = guard_lib.fresh(4), []
    for loss in (1.0, np.nan, np.nan, 2.0, np.nan):
        guard, accepted = advance(guard, loss, 0.5, nonfinite=2, substituted=3)
        rows.append(jax.device_get(guard_lib.metrics(guard, jnp.bool_(accepted))))
    assert [int(row["skipped"]) for row in rows] == [0, 1, 1, 0, 1]
    assert [int(row["skipped_in_a_row"]) for row in rows] == [0, 1, 2, 0, 1]
    assert [int(row["skipped_total"]) for row in rows] == [0, 1, 2, 2, 3]
    assert [int(row["nonfinite_samples_total"]) for row in rows] == [2, 4, 6, 8, 10]
    assert [int(row["substituted_total"]) for row in rows] == [3, 6, 9, 12, 15]
    assert int(guard.accepted) == 2


def test_the_window_is_a_ring_of_accepted_steps():
    guard = guard_lib.fresh(3)
    for loss in (1.0, 2.0, np.nan, 3.0, 4.0):
        guard, _ = advance(guard, loss, 10 * loss)
    np.testing.assert_array_equal(guard.losses, [4, 2, 3])
    np.testing.assert_array_equal(guard.grad_norms, [40, 20, 30])


@pytest.mark.parametrize("spiking", ["loss", "grad_norm"])
def test_a_spike_is_six_deviations_above_the_mean_of_a_full_window(spiking):
    values = [1.0, 2.0, 1.0, 2.0]  # mean 1.5, deviation 0.5: the limit is 4.5
    guard = guard_lib.fresh(4)
    for number, value in enumerate(values):
        pair = {"loss": 1.0, "grad_norm": 1.0, spiking: 100.0}
        assert advance(guard, **pair, sigma=6.0)[1], f"window of {number} is not full"
        guard, _ = advance(guard, value, value, sigma=6.0)
    for value, accepted in ((4.49, True), (4.51, False), (-100.0, True)):
        pair = {"loss": 1.0, "grad_norm": 1.0, spiking: value}
        after, found = advance(guard, **pair, sigma=6.0)
        assert found == accepted
        assert advance(guard, **pair, sigma=0.0)[1], "the rule is off by default"
        recorded = after.losses if spiking == "loss" else after.grad_norms
        assert (value in np.asarray(recorded, np.float64).round(2)) == accepted


def test_what_is_not_accepted_leaves_every_bit():
    old = {"weights": jnp.array([1.0, -0.0, 1e-45, np.inf]), "count": jnp.int32(7)}
    new = {"weights": jnp.full(4, np.nan), "count": jnp.int32(8)}
    kept = guard_lib.chosen(jnp.bool_(False), new, old)
    assert jax.tree.map(lambda x: np.asarray(x).tobytes(), kept) == jax.tree.map(
        lambda x: np.asarray(x).tobytes(), old
    )
    taken = guard_lib.chosen(jnp.bool_(True), new, old)
    assert int(taken["count"]) == 8 and np.isnan(taken["weights"]).all()
