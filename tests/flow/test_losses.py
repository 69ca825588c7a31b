"""The numeric identities of the loss weights, and the losses of a sample."""

import jax.numpy as jnp
import numpy as np
import pytest

from mmdit_jax.flow.losses import (
    MAX_FACTOR,
    WEIGHTS,
    density_weight,
    implied_weight,
    plain_loss,
    weighted_loss,
)
from mmdit_jax.flow.named import select
from mmdit_jax.flow.parameterization import PREDICTIONS, combine, target, to_x0_eps
from mmdit_jax.flow.paths import PATHS, edm
from mmdit_jax.flow.timesteps import TIMESTEPS

EVERY_PATH = pytest.mark.parametrize("name", list(PATHS))
T = jnp.asarray(np.linspace(0.0211, 0.9711, 32), jnp.float32)


def check_ratio(found, expected, rtol=1e-4):
    np.testing.assert_allclose(np.asarray(found) / np.asarray(expected), 1, rtol=rtol)


def test_rf_weight_is_t_over_1_minus_t():
    path = PATHS["rf"]()
    check_ratio(implied_weight(path, "velocity", T), T / (1 - T))
    check_ratio(select(WEIGHTS, "exp_minus_half_logsnr")(path, T), T / (1 - T))
    check_ratio(jnp.exp(-path.logsnr(T) / 2), T / (1 - T))


def test_plain_eps_loss_on_cosine_is_sech_over_pi():
    path = PATHS["cosine"]()
    weight = select(WEIGHTS, "sech_half_logsnr")(path, T)
    check_ratio(weight, 1 / np.cosh(np.float64(path.logsnr(T)) / 2))
    check_ratio(implied_weight(path, "eps", T), weight / np.pi)


def test_plain_v_loss_on_cosine_is_2_over_pi_times_the_root_of_the_noise_ratio():
    path = PATHS["cosine"]()
    weight = select(WEIGHTS, "exp_minus_half_logsnr")(path, T)
    check_ratio(implied_weight(path, "v", T), 2 / np.pi * weight)


@pytest.mark.parametrize(("P_mean", "P_std"), [(-1.2, 1.2), (0.0, 0.6), (1.2, 1.8)])
def test_plain_F_loss_on_edm_is_8_times_the_edm_weight(P_mean, P_std):
    path = edm(P_mean, P_std)
    logsnr = np.float64(path.logsnr(T))
    normal = np.exp(-((logsnr + 2 * P_mean) ** 2) / (2 * (2 * P_std) ** 2))
    expected = normal / (2 * P_std * np.sqrt(2 * np.pi)) * (np.exp(-logsnr) + 0.5**2)
    weight = select(WEIGHTS, f"edm({P_mean}, {P_std})")(path, T)
    check_ratio(weight, expected)
    check_ratio(implied_weight(path, "F", T), 8 * weight)


def test_plain_losses_on_ldm_linear_follow_the_same_algebra():
    path = PATHS["ldm_linear"]()
    check_ratio(implied_weight(path, "eps", T), -2 / path.dlogsnr(T))
    check_ratio(implied_weight(path, "v", T), -2 / (path.dlogsnr(T) * path.a(T) ** 2))


@EVERY_PATH
def test_cfm_weight_is_the_plain_velocity_loss(name):
    path = PATHS[name]()
    weight = select(WEIGHTS, "cfm")(path, T)
    check_ratio(implied_weight(path, "velocity", T), weight)
    half = path.b(T) / 2 * path.dlogsnr(T)
    check_ratio(-0.5 * weight * path.dlogsnr(T), half**2)  # (b/2 lambda')^2 of Sec. 2


@EVERY_PATH
@pytest.mark.parametrize("prediction", list(PREDICTIONS))
def test_weighted_loss_is_its_definition_in_eps(name, prediction):
    """-1/2 w lambda' ||eps_Theta(z, t) - eps||^2, with eps_Theta solved from the output."""
    path = PATHS[name]()
    x0, eps, noise = np.float32(np.random.default_rng(0).normal(size=(3, 32, 6)))
    wanted = target(path, prediction, x0, eps, T)
    output = wanted * (1 + 0.3 * noise)
    z = combine((path.a(T), path.b(T)), x0, eps)
    found_eps = to_x0_eps(path, prediction, output, z, T).eps
    square = jnp.mean((found_eps - eps) ** 2, axis=1)
    for weight in (make() for make in WEIGHTS.values()):
        expected = -0.5 * weight(path, T) * path.dlogsnr(T) * square
        loss = weighted_loss(output, wanted, T, path=path, prediction=prediction, weight=weight)
        assert loss.shape == (32,) and loss.dtype == jnp.float32
        bounded = weight(path, T) / implied_weight(path, prediction, T) >= MAX_FACTOR
        np.testing.assert_allclose(jnp.where(bounded, 0, loss - expected) / expected, 0, atol=5e-3)


@EVERY_PATH
def test_the_weight_a_loss_already_has_changes_nothing(name):
    path = PATHS[name]()
    output, wanted = np.float32(np.random.default_rng(0).normal(size=(2, 32, 6)))
    weighted = weighted_loss(
        output, wanted, T, path=path, prediction="velocity", weight=WEIGHTS["cfm"]()
    )
    np.testing.assert_allclose(weighted, plain_loss(output, wanted), rtol=1e-4)


@pytest.mark.parametrize("setting", list(TIMESTEPS))
def test_sampling_from_a_density_is_a_weight(setting):
    """t/(1-t) pi(t) with uniform t: pi(t) times the plain loss, the same expectation."""
    path, law = PATHS["rf"](), TIMESTEPS[setting]()
    output, wanted = np.float32(np.random.default_rng(0).normal(size=(2, 32, 6)))
    weighted = weighted_loss(
        output, wanted, T, path=path, prediction="velocity", weight=density_weight(law)
    )
    np.testing.assert_allclose(weighted, law.density(T) * plain_loss(output, wanted), rtol=1e-4)


def test_weights_are_bounded_at_every_t():
    """eps on rf with e^(-lambda/2) puts 1/(1-t)^2 on the plain loss: 3e14 at the last float."""
    path = PATHS["rf"]()
    t = jnp.array([2.0**-24, 1e-3, 0.9, 0.999, 1 - 2.0**-24])
    error = jnp.ones((5, 2))
    for prediction in PREDICTIONS:
        for weight in (make() for make in WEIGHTS.values()):
            loss = weighted_loss(
                error, 0 * error, t, path=path, prediction=prediction, weight=weight
            )
            assert (loss <= MAX_FACTOR).all() and (loss >= 0).all()
    loss = weighted_loss(error, 0 * error, t, path=path, prediction="eps", weight=WEIGHTS["cfm"]())
    np.testing.assert_allclose(loss[jnp.array([2, 4])], [100, MAX_FACTOR], rtol=1e-4)


def test_plain_loss_is_a_float32_mean_per_sample():
    output = jnp.arange(12.0).reshape(2, 3, 2)
    np.testing.assert_allclose(plain_loss(output, output - output), [55 / 6, 451 / 6], rtol=1e-6)
    # 4096 x 0.01 summed in bfloat16 would stick at the first power of two it cannot pass.
    half = jnp.full((1, 4096), 0.1, jnp.bfloat16)
    loss = plain_loss(half, jnp.zeros_like(half))
    assert loss.dtype == jnp.float32
    assert loss[0] == pytest.approx(float(half[0, 0]) ** 2, rel=1e-6)


def test_a_zero_head_starts_at_loss_2_for_unit_variance_latents():
    x0, eps = np.float32(np.random.default_rng(0).normal(size=(2, 8, 32, 32, 16)))
    wanted = target(PATHS["rf"](), "velocity", x0, eps, jnp.full((8,), 0.5))
    assert float(plain_loss(0 * wanted, wanted).mean()) == pytest.approx(2.0, abs=0.02)


def test_a_weight_with_an_untruthful_name_is_not_known():
    with pytest.raises(
        ValueError, match="choose one of cfm, edm, exp_minus_half_logsnr, sech_half"
    ):
        select(WEIGHTS, "sigma_sqrt", what="loss weight")
