"""Formulations as training and sampling use them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mmdit_jax.flow import formulation
from mmdit_jax.flow.parameterization import PREDICTIONS
from mmdit_jax.flow.paths import PATHS
from mmdit_jax.flow.solvers import SOLVERS, solve

EVERY_PATH = pytest.mark.parametrize("path", list(PATHS))
X0, EPS = np.float32(np.random.default_rng(0).normal(size=(2, 4, 3, 3, 2)))


def test_defaults_are_the_choice_of_the_paper():
    flow = formulation.make()
    key = jax.random.key(0)
    z = jax.random.normal(key, (5,))
    np.testing.assert_allclose(flow.sample_t(key, (5,)), jax.nn.sigmoid(z), rtol=1e-6)
    t = jnp.array([0.0, 0.3, 0.5, 1.0])
    mixed = t[:, None, None, None]
    np.testing.assert_allclose(flow.noisy(X0, EPS, t), (1 - mixed) * X0 + mixed * EPS, rtol=1e-6)
    np.testing.assert_array_equal(flow.target(X0, EPS, t), EPS - X0)
    np.testing.assert_array_equal(flow.network_input(jnp.asarray(EPS), t), EPS)
    assert flow.train_shift == 1.0 and flow.t_range == (0.0, 1.0)


def test_no_shift_is_baked_into_training():
    """logit_normal(0, 1) has mean 0.5; 0.715 would be a hidden shift of 3."""
    draw = jax.jit(lambda key: formulation.make(shift=1.0).sample_t(key, (100_000,)))
    assert float(draw(jax.random.key(0)).mean()) == pytest.approx(0.5, abs=3e-3)
    shifted = jax.jit(lambda key: formulation.make(shift=3.0).sample_t(key, (100_000,)))
    assert float(shifted(jax.random.key(0)).mean()) == pytest.approx(0.715, abs=3e-3)


def test_training_shift_and_sampling_shift_are_separate():
    np.testing.assert_array_equal(
        formulation.make(shift=3.0).grid(10, 1.0), formulation.make(shift=1.0).grid(10, 1.0)
    )
    assert formulation.make(shift=1.0).grid(2, 3.0)[1] == 0.75
    assert formulation.make(shift="sqrt_ratio(1048576, 65536)").train_shift == 4.0


@EVERY_PATH
def test_t_for_the_network_is_bit_by_bit_the_t_of_the_noise(path):
    """float32, and noisy() takes it as it is: moved into the path's range when it is drawn."""
    flow = formulation.make(path, "v", "logit_normal(0.5, 1)", shift=3.0)
    t = flow.sample_t(jax.random.key(0), (4,))
    assert t.dtype == jnp.float32 and (t > 0).all() and (t < 1).all()
    np.testing.assert_array_equal(flow.path.clip(t), t)
    z = flow.noisy(jnp.asarray(X0, jnp.bfloat16), EPS, t)
    a, b = flow.path.a(t).reshape(4, 1, 1, 1), flow.path.b(t).reshape(4, 1, 1, 1)
    assert z.dtype == jnp.float32
    half = np.float32(jnp.asarray(X0, jnp.bfloat16))
    np.testing.assert_allclose(z, a * half + b * EPS, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("path", ["ldm_linear", "edm_rf"])
def test_t_is_drawn_inside_the_range_of_the_path(path):
    flow = formulation.make(path, "v", "logit_normal(0, 3)")
    t = flow.sample_t(jax.random.key(0), (10_000,))
    np.testing.assert_array_equal(flow.path.clip(t), t)
    assert t.min() >= flow.path.t_min and t.max() <= flow.path.t_max


def test_a_bfloat16_t_is_refused():
    with pytest.raises(ValueError, match="the rule is float32"):
        formulation.make().noisy(X0, EPS, jnp.full((4,), 0.5, jnp.bfloat16))


@EVERY_PATH
@pytest.mark.parametrize("prediction", list(PREDICTIONS))
def test_any_prediction_is_sampled_through_velocity_on_any_path(path, prediction):
    """A network that knows (x0, eps) has loss 0 and brings the noise back to the data."""
    flow = formulation.make(path, prediction, "uniform")
    t = flow.sample_t(jax.random.key(0), (4,))
    loss = flow.loss(flow.target(X0, EPS, t), X0, EPS, flow.noisy(X0, EPS, t), t)
    assert loss.shape == (4,) and (loss == 0).all()

    def velocity(z, t):
        return flow.velocity(flow.target(X0, EPS, t), z, t)

    # The step of the solver in a plain loop: 30 compilations of a scan would take half a minute.
    grid = jnp.broadcast_to(flow.grid(3, 1.5)[:, None], (4, 4))
    z = flow.noisy(X0, EPS, grid[0])
    for t, t_next in zip(grid[:-1], grid[1:], strict=True):
        z = SOLVERS["ddim"](velocity, flow.path, z, t, t_next)
    left = np.asarray(flow.path.b(grid[-1][0])) * abs(EPS).max()  # the noise left at t_min
    assert abs(z - X0).max() < left + 2e-3


def test_training_and_sampling_compile_with_the_formulation_inside():
    flow = formulation.make("cosine", "v", "uniform")

    @jax.jit
    def run(x0, eps, key):
        t = flow.sample_t(key, (4,))
        z = flow.noisy(x0, eps, t)
        loss = flow.loss(0.9 * flow.target(x0, eps, t), x0, eps, z, t)

        def velocity(z, t):
            return flow.velocity(flow.target(x0, eps, t), z, t)

        grid = flow.grid(30, 1.0)
        start = flow.noisy(x0, eps, jnp.full((4,), grid[0]))
        return loss, solve(velocity, start, grid, "heun")

    loss, solution = run(X0, EPS, jax.random.key(0))
    assert (loss > 0).all()
    np.testing.assert_allclose(solution.z, X0, atol=0.01)


@EVERY_PATH
def test_the_state_before_sampling_has_the_spread_of_the_path(path):
    flow = formulation.make(path, "eps", "uniform")
    assert flow.grid(5, 1.0)[0] == np.float32(flow.t_range[1])
    scale = flow.path.prior_scale(flow.t_range[1])
    np.testing.assert_allclose(flow.prior(jnp.asarray(EPS)), scale * EPS, rtol=1e-6)


def test_network_input_of_F_has_unit_variance_at_every_noise_level():
    flow = formulation.make("edm", "F", "uniform")
    t = jnp.array([0.1, 0.5, 0.9, 0.999])
    x0, eps = np.float32(np.random.default_rng(1).normal(size=(2, 4, 20_000)))
    z = flow.noisy(0.5 * x0, eps, t)
    np.testing.assert_allclose(np.std(flow.network_input(z, t), axis=1), 1, atol=0.02)


def test_loss_weight_is_a_switch():
    t = jnp.array([0.1, 0.3, 0.6, 0.9])
    plain = formulation.make("edm_rf", "F", "uniform")
    weighted = formulation.make("edm_rf", "F", "uniform", weight="exp_minus_half_logsnr")
    z, output = plain.noisy(X0, EPS, t), jnp.zeros_like(X0)
    before, after = (f.loss(output, X0, EPS, z, t) for f in (plain, weighted))
    np.testing.assert_allclose(before, np.mean(plain.target(X0, EPS, t) ** 2, axis=(1, 2, 3)))
    # e^(-lambda/2) = b over the implied weight -2/lambda' (r/sd)^2 with lambda' = -2/(t(1-t)).
    b = t / (1 - t)
    np.testing.assert_allclose(after / before, b / (t * (1 - t) * (b**2 + 0.25) * 4), rtol=1e-4)


@pytest.mark.parametrize(
    ("argument", "value", "known"),
    [
        ("path", "vp", "cosine, edm, edm_cos, edm_rf, ldm_linear, rf"),
        ("prediction", "flow", "F, eps, v, velocity, x0"),
        ("timesteps", "lognorm(0, 1)", "cosmap, edm, logit_normal, mode, uniform"),
        ("shift", "auto", "flux_mu, sqrt_ratio"),
        ("weight", "sigma_sqrt", "cfm, edm, exp_minus_half_logsnr, sech_half_logsnr"),
    ],
)
def test_unknown_names_list_the_known_ones(argument, value, known):
    with pytest.raises(ValueError, match=f"is unknown: choose one of {known}"):
        formulation.make(**{argument: value})
