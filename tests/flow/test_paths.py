"""Every path of the dict: derivatives, log-SNR, ends; the paper's values of each."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.stats import norm

from mmdit_jax.flow.paths import PATHS, Path, edm, edm_cos, edm_rf, float32_time, ldm_linear, rf

EVERY_PATH = pytest.mark.parametrize("name", list(PATHS))
FUNCTIONS = Path._fields[:6]


def evaluate(path, t):
    """Every function of the path at t, and the derivatives that jax finds."""
    t = jnp.asarray(t, jnp.float32)
    found = {name: function(t) for name, function in zip(FUNCTIONS[:5], path[:5], strict=True)}
    found["inverse"] = path.inverse_logsnr(found["logsnr"])
    found["logsnr_of_inverse"] = path.logsnr(found["inverse"])
    found["dlogsnr"] = path.dlogsnr(t)
    for name in ("a", "b", "logsnr"):
        found["jax_d" + name] = jax.jvp(path._asdict()[name], (t,), (jnp.ones_like(t),))[1]
    return {name: np.float64(values) for name, values in found.items()}


@functools.cache
def interior(name):
    """(t, values) inside the range; the odd offset keeps t off the knots of ldm_linear."""
    path = PATHS[name]()
    t = np.float32(np.linspace(path.t_min, path.t_max, 201)[1:-1] + 1.3e-6)
    return t, evaluate(path, t)


@functools.cache
def ends(name):
    path = PATHS[name]()
    # As long as `interior`: what is compiled for one array serves the other.
    at = evaluate(path, np.repeat([path.t_min, path.t_max], [99, 100]))
    return {function: values[[0, -1]] for function, values in at.items()}


@EVERY_PATH
def test_da_and_db_are_the_derivatives_of_a_and_b(name):
    _, at = interior(name)
    np.testing.assert_allclose(at["da"], at["jax_da"], rtol=2e-4, atol=1e-6)
    np.testing.assert_allclose(at["db"], at["jax_db"], rtol=2e-4, atol=1e-6)


@EVERY_PATH
def test_logsnr_is_the_log_of_a2_over_b2_and_falls(name):
    _, at = interior(name)
    expected = 2 * np.log(at["a"] / at["b"])
    np.testing.assert_allclose(at["logsnr"], expected, rtol=1e-4, atol=2e-4)
    assert (np.diff(at["logsnr"]) < 0).all()


@EVERY_PATH
def test_logsnr_inverts(name):
    t, at = interior(name)
    np.testing.assert_allclose(at["inverse"], t, rtol=1e-4, atol=2e-6)
    np.testing.assert_allclose(at["logsnr_of_inverse"], at["logsnr"], atol=2e-3)


@EVERY_PATH
def test_dlogsnr_is_the_derivative_of_logsnr(name):
    _, at = interior(name)
    np.testing.assert_allclose(at["dlogsnr"], at["jax_dlogsnr"], rtol=1e-3)


@EVERY_PATH
def test_path_and_derivatives_are_finite_inside_and_at_both_ends(name):
    for at in (interior(name)[1], ends(name)):
        for function in ("a", "b", "da", "db"):
            assert np.isfinite(at[function]).all()
    assert np.isfinite(interior(name)[1]["logsnr"]).all()
    assert not np.isnan(ends(name)["logsnr"]).any()


@EVERY_PATH
def test_path_runs_from_data_to_noise(name):
    a, b = ends(name)["a"], ends(name)["b"]
    assert a[0] == pytest.approx(1, abs=1e-3) and b[0] < 0.03
    assert b[1] > 10 * a[1]


@EVERY_PATH
def test_functions_keep_the_shape_and_are_float32(name):
    for function in PATHS[name]()[:6]:
        for shape in ((), (2,), (2, 3)):
            out = jax.eval_shape(function, jax.ShapeDtypeStruct(shape, jnp.float32))
            assert out.dtype == jnp.float32 and out.shape == shape


@EVERY_PATH
def test_prior_scale_is_the_spread_of_z_for_unit_variance_data(name):
    x0, eps = np.random.default_rng(0).normal(size=(2, 100_000))
    z = ends(name)["a"][1] * x0 + ends(name)["b"][1] * eps
    assert PATHS[name]().prior_scale() == pytest.approx(z.std(), rel=0.01)


def test_prior_scale_is_1_for_rf_and_b_for_edm():
    assert rf().prior_scale() == 1
    assert ldm_linear().prior_scale() == pytest.approx(1, abs=1e-6)
    assert edm(-1.2, 1.2).prior_scale() == pytest.approx(50.3, rel=0.01)  # e^(-1.2 + 1.2 * 4.265)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.int32])
def test_a_t_that_lost_its_precision_is_refused(dtype):
    with pytest.raises(ValueError, match="the rule is float32"):
        rf().a(jnp.zeros((2,), dtype))


def test_python_and_float64_times_become_float32():
    assert float32_time(1).dtype == float32_time(0.5).dtype == jnp.float32
    assert float32_time(np.linspace(0, 1, 3)).dtype == jnp.float32


@pytest.mark.parametrize("name", ["cosine", "ldm_linear"])
def test_variance_preserving_paths_lie_on_the_circle(name):
    _, at = interior(name)
    np.testing.assert_allclose(at["a"] ** 2 + at["b"] ** 2, 1, atol=1e-6)


def test_ldm_linear_takes_the_discrete_values_of_stable_diffusion():
    # The discrete product in float64: alphas_cumprod of the "scaled_linear" schedule.
    betas = np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2
    alphas_cumprod = np.cumprod(1 - betas)
    assert alphas_cumprod[-1] == pytest.approx(0.00466, abs=1e-5)  # of the released SD models
    at = evaluate(ldm_linear(0.00085, 0.012, 1000), np.concatenate([[0], np.arange(1, 1001) / 1e3]))
    assert at["a"][0] == 1 and at["b"][0] == 0
    np.testing.assert_allclose(at["a"][1:] ** 2, alphas_cumprod, rtol=2e-6)
    np.testing.assert_allclose(at["b"][1:] ** 2, 1 - alphas_cumprod, rtol=3e-4)


def test_edm_log_noise_level_is_normal_for_uniform_t():
    t = np.float32((np.arange(20_000) + 0.5) / 20_000)
    log_b = np.log(np.float64(jax.jit(edm(-0.6, 1.8).b)(t)))
    assert log_b.mean() == pytest.approx(-0.6, abs=1e-3)
    assert log_b.std() == pytest.approx(1.8, rel=1e-3)
    np.testing.assert_allclose(log_b, -0.6 + 1.8 * norm.ppf(np.float64(t)), atol=1e-4)


@pytest.mark.parametrize(("name", "of"), [("edm_rf", "rf"), ("edm_cos", "cosine")])
def test_edm_with_a_replaced_schedule_has_the_log_snr_of_its_model(name, of):
    t, at = interior(name)
    model = evaluate(PATHS[of](), t)
    np.testing.assert_allclose(at["logsnr"], model["logsnr"], atol=1e-5)
    np.testing.assert_allclose(at["b"], model["b"] / model["a"], rtol=1e-5)
    assert (at["a"] == 1).all()


def test_replaced_schedules_are_t_over_1_minus_t_and_the_tangent():
    assert edm_rf().b(0.75) == pytest.approx(3)
    assert edm_cos().b(2 / 3) == pytest.approx(3**0.5)


def test_cosine_ends_in_exactly_no_data():
    at = ends("cosine")
    assert at["a"][1] == 0 and at["b"][1] == 1 and at["logsnr"][1] == -np.inf


@pytest.mark.parametrize(
    "betas", [(0.0, 0.1, 100), (0.1, 1.5, 100), (0.2, 0.1, 100), (0.1, 0.2, 1), (1e-4, 0.9, 100)]
)
def test_impossible_betas_are_refused(betas):
    with pytest.raises(ValueError, match="0 < beta_start <= beta_end < 1|too far apart"):
        ldm_linear(*betas)


def test_edm_without_spread_is_refused():
    with pytest.raises(ValueError, match="P_std=0 must be positive"):
        edm(-1.2, 0)
