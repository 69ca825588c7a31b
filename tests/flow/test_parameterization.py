"""Every prediction on every path: targets, conversions, ends."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mmdit_jax.flow.parameterization import (
    PREDICTIONS,
    coefficients,
    combine,
    convert,
    input_scale,
    t_range,
    target,
    to_x0_eps,
)
from mmdit_jax.flow.paths import PATHS

EVERY_PATH = pytest.mark.parametrize("name", list(PATHS))
EVERY_PREDICTION = pytest.mark.parametrize("prediction", list(PREDICTIONS))
X0, EPS = np.float32(np.random.default_rng(0).normal(size=(2, 32, 4, 3)))
T = np.linspace(0.0211, 0.9711, 32, dtype=np.float32)  # on no knot of ldm_linear


@functools.cache
def everything(name):
    """All predictions, conversions and limits of one path; not jitted, which is faster here."""
    path = PATHS[name]()

    def compute(x0, eps, t, t_ends):
        def z_of(t):
            return combine((path.a(t), path.b(t)), x0, eps)

        z, dz = jax.jvp(z_of, (t,), (jnp.ones_like(t),))
        targets = {p: target(path, p, x0, eps, t) for p in PREDICTIONS}
        return {
            "z": z,
            "dz": dz,
            "b/a": path.b(t) / path.a(t),
            "targets": targets,
            "pairs": {p: to_x0_eps(path, p, out, z, t) for p, out in targets.items()},
            "converted": {
                p: {to: convert(path, p, to, out, z, t) for to in PREDICTIONS}
                for p, out in targets.items()
            },
            "scales": {p: input_scale(path, p, t) for p in PREDICTIONS},
            "at ends": {  # eps as state and x0 as output: any finite numbers will do
                p: (
                    convert(path, p, "velocity", x0, eps, t_ends),
                    *to_x0_eps(path, p, x0, eps, t_ends),
                )
                for p in PREDICTIONS
            },
        }

    t_ends = jnp.array([path.t_min, path.t_max] * (len(T) // 2), jnp.float32)
    return jax.device_get(compute(jnp.asarray(X0), jnp.asarray(EPS), jnp.asarray(T), t_ends))


@EVERY_PATH
@EVERY_PREDICTION
def test_x0_and_eps_come_back_from_every_prediction(name, prediction):
    found = everything(name)
    x0, eps = found["pairs"][prediction]
    # The one with little weight in z is known to fewer digits: rounding of z, over that weight.
    noise_level = found["b/a"][:, None, None]
    assert (abs(x0 - X0) < 3e-6 * (1 + noise_level)).all()
    assert (abs(eps - EPS) < 3e-6 * (1 + 1 / noise_level)).all()


@EVERY_PATH
@EVERY_PREDICTION
def test_every_prediction_converts_to_every_other(name, prediction):
    found = everything(name)
    for to, converted in found["converted"][prediction].items():
        # The unit of the wanted prediction: velocity on edm is in the hundreds.
        size = abs(found["targets"][to]).max(axis=(1, 2), keepdims=True)
        noise_level = found["b/a"][:, None, None]
        allowed = 3e-6 * size * (1 + noise_level + 1 / noise_level)
        assert (abs(converted - found["targets"][to]) < allowed).all(), to


@EVERY_PATH
def test_velocity_is_the_time_derivative_of_z(name):
    found = everything(name)
    np.testing.assert_allclose(found["targets"]["velocity"], found["dz"], rtol=1e-4, atol=1e-4)


@EVERY_PATH
@EVERY_PREDICTION
def test_conversion_is_finite_at_both_ends_of_the_path(name, prediction):
    for array in everything(name)["at ends"][prediction]:
        assert array.dtype == np.float32 and np.isfinite(array).all()


@EVERY_PATH
def test_only_F_scales_the_input(name):
    for prediction, scale in everything(name)["scales"].items():
        assert prediction == "F" or (scale == 1).all()


def test_rf_velocity_is_eps_minus_x0():
    np.testing.assert_array_equal(everything("rf")["targets"]["velocity"], EPS - X0)


def test_v_is_a_eps_minus_b_x0_and_on_cosine_the_velocity_over_half_pi():
    found = everything("cosine")["targets"]
    np.testing.assert_allclose(found["velocity"], np.pi / 2 * found["v"], atol=1e-6)
    b = np.sin(np.pi / 2 * T)[:, None, None]
    np.testing.assert_allclose(found["v"], np.sqrt(1 - b**2) * EPS - b * X0, atol=1e-5)


def test_F_is_the_network_of_karras_2022():
    """F = (x0 - c_skip z)/c_out and the input c_in z, from Table 1 of that paper."""
    found = everything("edm")
    s = np.float64(found["b/a"])
    c_in, c_skip, c_out = (
        1 / np.sqrt(s**2 + 0.25),
        0.25 / (s**2 + 0.25),
        s * 0.5 / np.sqrt(s**2 + 0.25),
    )
    residual = (X0 - c_skip[:, None, None] * found["z"]) / c_out[:, None, None]
    np.testing.assert_allclose(found["targets"]["F"], residual, atol=1e-4)
    np.testing.assert_allclose(found["scales"]["F"], c_in, rtol=1e-5)


@EVERY_PATH
def test_F_has_unit_variance_in_and_out_for_data_of_spread_half(name):
    path, t = PATHS[name](), jnp.asarray(T)
    c_x, c_e = (np.asarray(c) for c in coefficients(path, "F", t))
    np.testing.assert_allclose((0.5 * c_x) ** 2 + c_e**2, 1, rtol=1e-5)
    variance = (0.5 * np.asarray(path.a(t))) ** 2 + np.asarray(path.b(t)) ** 2
    np.testing.assert_allclose(variance * everything(name)["scales"]["F"] ** 2, 1, rtol=1e-5)


def test_range_is_cut_only_at_ends_that_cannot_be_inverted():
    assert t_range(PATHS["rf"](), "velocity") == (0.0, 1.0)
    assert t_range(PATHS["rf"](), "eps") == (0.0, 0.999)
    assert t_range(PATHS["rf"](), "x0") == (0.001, 1.0)
    assert t_range(PATHS["cosine"](), "v") == (0.0, 1.0)
    assert t_range(PATHS["cosine"](), "eps") == (0.0, 0.999)
    assert t_range(PATHS["ldm_linear"](), "eps") == (0.001, 1.0)  # a = 0.068 at the noisy end
    assert t_range(PATHS["edm"](), "F") == (1e-5, 1 - 1e-5)


def test_a_prediction_as_itself_is_untouched():
    for name in PATHS:
        found = everything(name)
        for prediction in PREDICTIONS:
            np.testing.assert_array_equal(
                found["converted"][prediction][prediction], found["targets"][prediction]
            )


def test_a_bfloat16_network_is_mixed_in_float32():
    path, t = PATHS["rf"](), jnp.asarray(T)
    x0, eps = (jnp.asarray(x, jnp.bfloat16) for x in (X0, EPS))
    pair = to_x0_eps(path, "v", eps, x0, t)
    assert pair.x0.dtype == pair.eps.dtype == jnp.float32
    exact = target(path, "v", np.float32(x0), np.float32(eps), t)
    np.testing.assert_array_equal(target(path, "v", x0, eps, t), exact)
    assert convert(path, "v", "v", eps, x0, t).dtype == jnp.float32


def test_an_unknown_prediction_lists_the_known_ones():
    with pytest.raises(ValueError, match="'epsilon' is unknown: choose one of F, eps, v, velocity"):
        convert(PATHS["rf"](), "epsilon", "epsilon", jnp.asarray(EPS), jnp.asarray(X0), T)


def test_conversion_compiles_with_a_path_made_inside():
    converted = jax.jit(lambda *arrays: convert(PATHS["rf"](), "eps", "x0", *arrays))(EPS, X0, T)
    t = T[:, None, None]
    np.testing.assert_allclose(converted, (X0 - t * EPS) / (1 - t), rtol=1e-4, atol=1e-4)
