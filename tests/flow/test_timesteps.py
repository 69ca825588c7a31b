"""Every law of t: sampler against density, ends, the paper's numbers; the resolution shift."""

import functools
import math
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from mmdit_jax.flow import timesteps
from mmdit_jax.flow.named import select
from mmdit_jax.flow.timesteps import TIMESTEPS, f_mode, shift, shift_alpha, shifted, unshift

# Every entry of the dict with its defaults, and the study's settings at the edge.
SETTINGS = [*TIMESTEPS, "logit_normal(-1, 2.2)", "mode(-1)", "mode(1.75)"]
EVERY_LAW = pytest.mark.parametrize("setting", SETTINGS)
SHIFTED = pytest.mark.parametrize("alpha", [1.0, 3.0])
SAMPLES = 200_000


def law(setting, alpha=1.0):
    return shifted(select(TIMESTEPS, setting), alpha)


@functools.cache
def compiled(setting):
    """(key, alpha, t) -> 200,000 samples and the density at t; one compilation for all shifts."""
    return jax.jit(
        lambda key, alpha, t: (
            law(setting, alpha).sample(key, (SAMPLES // 2, 2)),
            law(setting, alpha).density(t),
        )
    )


@functools.cache
def drawn_and_cumulative(setting, alpha):
    """(samples, t, F(t)) with F by the trapezoid rule, fine at the ends and in the peak of mode."""
    logit = np.linspace(-16, 16, 4000)
    beside = np.logspace(-6.5, math.log10(0.499), 3000)
    t = np.concatenate([1 / (1 + np.exp(-logit)), 0.5 - beside, 0.5 + beside])
    t = np.sort(np.float32(shift(t, alpha)))
    samples, density = compiled(setting)(jax.random.key(7), alpha, t)
    density, t = np.float64(density), np.float64(t)
    areas = np.diff(t) * (density[1:] + density[:-1]) / 2
    return np.asarray(samples), t, np.concatenate([[0], np.cumsum(areas)])


@EVERY_LAW
@SHIFTED
def test_density_integrates_to_one_and_is_not_negative(setting, alpha):
    _, _, total = drawn_and_cumulative(setting, alpha)
    assert (np.diff(total) >= 0).all()
    assert total[-1] == pytest.approx(1, abs=2e-3)


@EVERY_LAW
@SHIFTED
def test_samples_follow_the_density_with_nothing_mixed_in(setting, alpha):
    """Kolmogorov-Smirnov at the 0.1 % level; a hidden tenth of uniform t would fail it."""
    samples, t, total = drawn_and_cumulative(setting, alpha)
    expected = np.interp(np.sort(samples, axis=None), t, total / total[-1])
    steps = np.arange(SAMPLES + 1) / SAMPLES
    distance = max(abs(expected - steps[1:]).max(), abs(expected - steps[:-1]).max())
    assert distance < 1.95 / math.sqrt(SAMPLES)


@EVERY_LAW
@SHIFTED
def test_samples_are_float32_strictly_inside_0_and_1_and_from_no_table(setting, alpha):
    samples, _, _ = drawn_and_cumulative(setting, alpha)
    assert samples.shape == (SAMPLES // 2, 2) and samples.dtype == np.float32
    assert (samples > 0).all() and (samples < 1).all()
    assert np.unique(samples).size > 0.9 * SAMPLES


def test_the_extreme_uniform_numbers_stay_inside():
    """f_mode is exactly 1 at u = 0 and a shifted t rounds to 1: neither may come out."""

    @jax.jit
    def draw(bits):
        def constant(key, shape, dtype):
            return jnp.broadcast_to(bits, shape)

        with mock.patch.object(jax.random, "bits", constant):
            u = timesteps.open_uniform(jax.random.key(0), (2,))
            return u, [law(setting, 8.0).sample(jax.random.key(0), (2,)) for setting in SETTINGS]

    for bits, extreme in ((0, 2.0**-24), (2**32 - 1, 1 - 2.0**-24)):
        u, t = draw(jnp.uint32(bits))
        assert (u == extreme).all()
        assert (np.array(t) > 0).all() and (np.array(t) < 1).all()


def test_a_sigmoid_that_rounds_to_1_stays_inside():
    t = law("logit_normal(0, 50)").sample(jax.random.key(0), (10_000,))
    assert (t > 0).all() and (t < 1).all()


@pytest.mark.parametrize("m", [-1.0, 0.5, 1.0])
def test_positive_m_is_noisier(m):
    """E sigmoid(N(m, 1)) by Gauss-Hermite: 0.696 for m = +1; a mirrored table would give 0.304."""
    nodes, weights = np.polynomial.hermite_e.hermegauss(60)
    expected = float((weights / (1 + np.exp(-(m + nodes)))).sum() / weights.sum())
    t = np.asarray(law(f"logit_normal({m}, 1)").sample(jax.random.key(3), (SAMPLES // 2, 2)))
    assert t.mean() == pytest.approx(expected, abs=2e-3)
    assert np.median(t) == pytest.approx(1 / (1 + math.exp(-m)), abs=3e-3)
    if m == 1.0:
        assert expected == pytest.approx(0.696, abs=1e-3)


def test_logit_normal_density_is_the_closed_form():
    t = np.array([0.1, 0.5, 0.8])
    m, s = 0.5, 0.6
    logit = np.log(t / (1 - t))
    expected = np.exp(-((logit - m) ** 2) / (2 * s**2)) / (s * np.sqrt(2 * np.pi) * t * (1 - t))
    found = law("logit_normal(0.5, 0.6)").density(jnp.asarray(t, jnp.float32))
    np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_cosmap_follows_its_closed_form():
    """KS against the integral of 2/(pi - 2 pi t + 2 pi t^2), and t = 1 - 1/(tan(pi u/2) + 1)."""
    t = np.sort(drawn_and_cumulative("cosmap", 1.0)[0], axis=None).astype(np.float64)
    closed_form = 0.5 + 2 / np.pi * np.arctan(2 * t - 1)
    assert abs(closed_form - (np.arange(SAMPLES) + 0.5) / SAMPLES).max() < 1.95 / math.sqrt(SAMPLES)
    u = np.float64(timesteps.open_uniform(jax.random.key(9), (1000,)))
    formula = 1 - 1 / (np.tan(np.pi * u / 2) + 1)
    np.testing.assert_allclose(law("cosmap").sample(jax.random.key(9), (1000,)), formula, atol=1e-6)
    density = law("cosmap").density(jnp.float32(0.3))
    assert density == pytest.approx(2 / (np.pi - 0.6 * np.pi + 0.18 * np.pi))


def test_edm_law_is_a_normal_log_noise_level():
    t = np.float64(drawn_and_cumulative("edm", 1.0)[0])
    log_level = np.log(t / (1 - t))
    assert log_level.mean() == pytest.approx(-1.2, abs=0.01)
    assert log_level.std() == pytest.approx(1.2, abs=0.01)


@pytest.mark.parametrize(
    ("s", "middle", "end"), [(-0.54, 0.76, 2.17), (0.81, 1.86, 0.55), (1.29, 3.79, 0.44)]
)
def test_mode_density_has_the_paper_values(s, middle, end):
    density = law(f"mode({s})").density(jnp.array([0.5, 1e-5, 1 - 1e-5]))
    np.testing.assert_allclose(density, [middle, end, end], atol=6e-3)


def test_mode_density_is_accurate_in_its_near_singular_peak():
    """Along t = f_mode(u) in float64 the density is 1/|f_mode'(u)|."""
    u = 0.5 + np.concatenate([np.linspace(-0.4, 0.4, 41), np.linspace(-0.02, 0.02, 41)])
    for s in (1.75, 1.29, -0.9):
        f = 1 - u - s * (np.cos(np.pi * u / 2) ** 2 - 1 + u)
        expected = 1 / abs(1 + s * (1 - np.pi / 2 * np.sin(np.pi * u)))
        found = jax.jit(law(f"mode({s})").density)(jnp.asarray(f, jnp.float32))
        np.testing.assert_allclose(found, expected, rtol=2e-3)
    peak = law("mode(1.75)").density(jnp.float32(0.5))
    assert peak == pytest.approx(904, rel=2e-3)


def test_mode_is_monotone_up_to_its_limits_and_not_beyond():
    u = jnp.linspace(0, 1, 101)  # steps well above the rounding of float32
    for s in (-1.0, 0.0, 1.7519):
        assert (jnp.diff(f_mode(u, s)) < 0).all()
    assert (jnp.diff(f_mode(jnp.linspace(0.49, 0.51, 21), 1.7619)) > 0).any()
    assert timesteps.MODE_MAX == pytest.approx(1.7519, abs=1e-4)
    timesteps.mode(timesteps.MODE_MAX)
    assert f_mode(jnp.float32(0), 1.29) == 1 and abs(f_mode(jnp.float32(1), 1.29)) < 1e-6


@pytest.mark.parametrize("s", [-1.01, 1.7619, math.nan])
def test_mode_outside_its_monotone_range_is_refused(s):
    with pytest.raises(ValueError, match=rf"s={s} is outside \[-1, 1.7519\].*choose s inside"):
        timesteps.mode(s)


@pytest.mark.parametrize("name", ["logit_normal", "edm"])
def test_a_scale_of_zero_is_refused(name):
    with pytest.raises(ValueError, match="must be positive"):
        TIMESTEPS[name](0.0, 0.0)


@pytest.mark.parametrize("name", ["lognorm", "mix", "sigma_sqrt", "logit_normal_mix"])
def test_ambiguous_names_are_not_known(name):
    with pytest.raises(ValueError, match="choose one of cosmap, edm, logit_normal, mode, uniform"):
        select(TIMESTEPS, name, what="timesteps")


def test_shift_has_the_paper_values():
    assert shift(0.5, 3.0) == 0.75
    for alpha in (0.3, 1.0, 3.0):
        assert shift(0.0, alpha) == 0 and shift(1.0, alpha) == 1
    t = jnp.linspace(0.001, 0.999, 999)
    np.testing.assert_allclose(unshift(shift(t, 3.0), 3.0), t, atol=1e-6)
    lowered = 2 * jnp.log((1 - shift(t, 3.0)) / shift(t, 3.0)) - 2 * jnp.log((1 - t) / t)
    np.testing.assert_allclose(lowered, -2 * math.log(3), atol=2e-4)  # lambda - 2 log alpha


def test_shifting_logit_normal_moves_its_mean_by_log_alpha():
    t = jnp.linspace(0.01, 0.99, 99)
    by_mean = law(f"logit_normal({0.2 + math.log(3)}, 0.7)")
    by_shift = law("logit_normal(0.2, 0.7)", 3.0)
    np.testing.assert_allclose(by_shift.density(t), by_mean.density(t), rtol=1e-4, atol=1e-6)
    key = jax.random.key(0)
    np.testing.assert_allclose(
        by_shift.sample(key, (1000,)), by_mean.sample(key, (1000,)), atol=1e-6
    )


def test_the_two_resolution_rules_at_256_512_1024_pixels():
    sides = (256, 512, 1024)
    paper = [shift_alpha(f"sqrt_ratio({side**2}, {256**2})") for side in sides]
    np.testing.assert_allclose(paper, [1.0, 2.0, 4.0])
    flux = [shift_alpha(f"flux_mu({(side // 16) ** 2})") for side in sides]
    np.testing.assert_allclose(flux, [math.exp(0.5), math.exp(0.63), math.exp(1.15)])
    t = 0.3  # the form of FLUX, e^mu/(e^mu + 1/t - 1), is the same shift
    assert shift(t, flux[2]) == pytest.approx(flux[2] / (flux[2] + 1 / t - 1))


@pytest.mark.parametrize("setting", [0, -1.0, math.inf, math.nan, "auto", "sqrt_ratio(0, 1)"])
def test_impossible_shifts_are_refused(setting):
    with pytest.raises(ValueError, match="shift|sqrt_ratio"):
        shift_alpha(setting)


def test_t_of_a_sample_does_not_depend_on_the_devices():
    """One global draw: split over 8 devices every sample keeps its t, and none repeats."""
    mesh = Mesh(np.array(jax.devices()[:8]), ("data",))
    split = NamedSharding(mesh, PartitionSpec("data"))

    def draw(key):
        return {setting: law(setting).sample(key, (64,)) for setting in TIMESTEPS}

    key = jax.random.fold_in(jax.random.key(0), 12)
    on_eight, on_one = jax.jit(draw, out_shardings=split)(key), jax.jit(draw)(key)
    for setting in TIMESTEPS:
        assert len(on_eight[setting].sharding.device_set) == 8
        np.testing.assert_array_equal(on_eight[setting], on_one[setting])
        assert np.unique(on_eight[setting]).size == 64
