"""The 61 variants of the study: names, numbers, and what each trains and samples."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from configs import formulations
from configs.formulations import VARIANTS
from mmdit_jax import run
from mmdit_jax.flow.parameterization import to_x0_eps
from mmdit_jax.flow.solvers import solve

# Every name that the paper prints, in Tables 1 and 2.
OF_THE_PAPER = """
rf/lognorm(0.00, 1.00)|rf/lognorm(1.00, 0.60)|rf/lognorm(0.50, 0.60)|rf/mode(1.29)
rf/lognorm(0.50, 1.00)|eps/linear|rf/mode(1.75)|rf/cosmap|edm(0.00, 0.60)|rf|v/linear
edm(0.60, 1.20)|v/cos|edm/cos|edm/rf|edm(-1.20, 1.20)|rf/lognorm(-0.50, 1.00)
"""


def test_there_are_61_variants_with_the_names_of_the_paper():
    families = [re.sub(r"\(.*", "", name) for name in VARIANTS]
    counts = {family: families.count(family) for family in families}
    once = ("eps/linear", "v/linear", "eps/cos", "v/cos", "rf", "rf/cosmap", "edm/rf", "edm/cos")
    assert counts == {"rf/mode": 8, "rf/lognorm": 30, "edm": 15, **dict.fromkeys(once, 1)}
    assert len(VARIANTS) == 61
    assert set(OF_THE_PAPER.strip().replace("\n", "|").split("|")) <= VARIANTS.keys()
    assert len({tuple(flow.items()) for flow in VARIANTS.values()}) == 61


def test_grids_are_those_of_the_paper():
    def numbers(family: str) -> list[tuple[float, ...]]:
        key = {"edm": "path"}.get(family, "timesteps")
        return [
            tuple(float(x) for x in re.findall(r"-?[\d.]+", flow[key]))
            for name, flow in VARIANTS.items()
            if name.startswith(f"{family}(")
        ]

    modes = [s for (s,) in numbers("rf/mode")]
    np.testing.assert_allclose(modes, [*np.linspace(-1, 1.75, 7), 1.0], atol=1e-6)
    means, deviations = zip(*numbers("rf/lognorm"), strict=True)
    assert sorted(set(means)) == [-1, -0.5, 0, 0.5, 1]
    np.testing.assert_allclose(sorted(set(deviations)), np.linspace(0.2, 2.2, 6))
    means, deviations = zip(*numbers("edm"), strict=True)
    np.testing.assert_allclose(sorted(set(means)), np.linspace(-1.2, 1.2, 5), atol=1e-9)
    np.testing.assert_allclose(sorted(set(deviations)), np.linspace(0.6, 1.8, 3))


ONE_A_FAMILY = ("v/linear", "eps/cos", "rf/mode(1.75)", "edm(-1.20, 1.20)", "edm/rf", "edm/cos")


@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=[] if n in ONE_A_FAMILY else pytest.mark.long) for n in VARIANTS],
)
def test_a_network_that_knows_the_picture_has_no_loss_and_samples_it(name):
    """One picture: the exact prediction has loss 0, and leads the solver from noise to it."""
    config = formulations.get_config(f"variant={name},tiny")
    flow = run.build(config).formulation
    x0 = jnp.asarray(np.random.default_rng(0).normal(size=(1, 2, 2, 1)), jnp.float32)
    eps = jax.random.normal(jax.random.key(1), (64, 2, 2, 1))
    t = flow.sample_t(jax.random.key(0), (64,))
    assert float(t.min()) >= flow.t_range[0] and float(t.max()) <= flow.t_range[1]
    pictures = jnp.broadcast_to(x0, eps.shape)
    z = flow.noisy(pictures, eps, t)
    target = flow.target(pictures, eps, t)
    assert float(flow.loss(target, pictures, eps, z, t).max()) == 0
    assert float(flow.loss(target + 2, pictures, eps, z, t).mean()) == pytest.approx(4, rel=1e-4)

    def velocity(z, t):
        """Of the exact prediction for the one picture: eps follows from z."""
        a, b = (jnp.reshape(f(t), (-1, 1, 1, 1)) for f in (flow.path.a, flow.path.b))
        noise = (z - a * x0) / b
        return flow.velocity(flow.target(jnp.broadcast_to(x0, z.shape), noise, t), z, t)

    start = flow.prior(jax.random.normal(jax.random.key(2), (1, 2, 2, 1)))
    grid, solver = flow.grid(50, 1.0), run.sample_settings(config).solver
    found = jax.jit(lambda z: solve(velocity, z, grid, solver, path=flow.path).z)(start)
    np.testing.assert_allclose(found, x0, atol=1e-3)


def closed_form(name: str, t: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """What Sec. 2 and 3.1 say of a variant at t: -1/2 w_t lambda'_t, the density of t, its CDF.

    The first is the factor of ||eps_Theta - eps||^2 in L_w, but for a constant.
    """
    family, _, arguments = name.partition("(")
    numbers = [float(x) for x in re.findall(r"-?[\d.]+", arguments)]
    density, below = np.ones_like(t), t
    if family == "rf/lognorm":
        normal = scipy.stats.norm(*numbers)
        logit = np.log(t / (1 - t))
        density, below = normal.pdf(logit) / (t * (1 - t)), normal.cdf(logit)
    elif family == "rf/mode":
        s = next(s for s in MODES if abs(s - numbers[0]) < 6e-3)  # the name rounds it
        u = np.linspace(0, 1, 400_001)
        f = 1 - u - s * (np.cos(np.pi * u / 2) ** 2 - 1 + u)
        u_t = np.interp(t, f[::-1], u[::-1])
        slope = -1 - s * (1 - np.pi / 2 * np.sin(np.pi * u_t))
        density, below = 1 / np.abs(slope), 1 - u_t
    elif family == "rf/cosmap":
        density = 2 / (np.pi - 2 * np.pi * t + 2 * np.pi * t**2)
        below = 2 / np.pi * np.arctan(t / (1 - t))
    if family.startswith("rf"):
        factor = t / (1 - t) / (t * (1 - t))  # w = t/(1-t), lambda' = -2/(t (1-t))
    elif family in ("eps/cos", "v/cos"):
        logsnr, slope = -2 * np.log(np.tan(np.pi * t / 2)), -2 * np.pi / np.sin(np.pi * t)
        w = 1 / np.cosh(logsnr / 2) if family == "eps/cos" else np.exp(-logsnr / 2)
        factor = -0.5 * w * slope
    elif family in ("eps/linear", "v/linear"):  # t = k/1000 are the discrete steps
        betas = np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2
        a2 = np.cumprod(1 - betas)[np.round(t * 1000).astype(int) - 1]
        factor = 1 / a2 if family == "v/linear" else np.ones_like(t)
    elif family == "edm":
        mean, deviation = numbers
        log_b = scipy.stats.norm.ppf(t, mean, deviation)
        slope = -2 / scipy.stats.norm.pdf(log_b, mean, deviation)
        normal = scipy.stats.norm.pdf(-2 * log_b, -2 * mean, 2 * deviation)
        factor = -0.5 * normal * (np.exp(2 * log_b) + 0.25) * slope
    else:  # the schedule alone is another, the loss on F is plain
        b = t / (1 - t) if family == "edm/rf" else np.tan(np.pi * t / 2)
        factor = b**2 + 0.25
    return factor, density, below


MODES = (*np.linspace(-1, 1.75, 7), 1.0)


@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=[] if n in ONE_A_FAMILY else pytest.mark.long) for n in VARIANTS],
)
def test_loss_and_law_of_t_are_the_closed_forms_of_the_paper(name):
    flow = run.build(formulations.get_config(f"variant={name},tiny")).formulation
    t = np.arange(20, 981, 40) / 1000
    factor, density, _ = closed_form(name, t)
    x0, eps = np.float32(np.random.default_rng(0).normal(size=(2, len(t), 6)))
    at = jnp.asarray(t, jnp.float32)
    z, output = flow.noisy(x0, eps, at), flow.target(x0, eps, at) + 1
    found_eps = to_x0_eps(flow.path, flow.prediction, output, z, at).eps
    per_eps = flow.loss(output, x0, eps, z, at) / jnp.mean((found_eps - eps) ** 2, axis=1)
    ratio = np.asarray(per_eps) / factor
    np.testing.assert_allclose(ratio / ratio.mean(), 1, rtol=2e-3)

    np.testing.assert_allclose(flow.timesteps.density(at), density, rtol=1e-3, atol=1e-6)
    drawn = np.sort(np.asarray(flow.sample_t(jax.random.key(3), (20_000,))))
    grid = np.linspace(1e-4, 1 - 1e-4, 999)
    _, _, below = closed_form(name, grid)
    far = np.abs(np.searchsorted(drawn, grid) / len(drawn) - below).max()
    assert far < 0.02  # of 20,000 draws 0.0136 is exceeded once in 1,000


def test_a_variant_is_chosen_on_the_command_line_and_others_are_listed():
    config = formulations.get_config("variant=edm(-1.20, 1.20),depth=3,shapes")
    assert config.flow.path == "edm(-1.2, 1.2)" and config.flow.prediction == "F"
    assert config.model.depth == 3 and config.flow.shift == config.samples.shift == 1
    study = formulations.get_config()
    assert (study.batch_size, study.optimizer.learning_rate, study.ema.every) == (1024, 1e-4, 100)
    with pytest.raises(ValueError, match=r"variant='edm\(9\)' is none of the 61: eps/linear, "):
        formulations.get_config("variant=edm(9)")
