"""The 61 variants of the study: names, numbers, and what each trains and samples."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import formulations
from configs.formulations import VARIANTS
from mmdit_jax import run
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


def test_a_variant_is_chosen_on_the_command_line_and_others_are_listed():
    config = formulations.get_config("variant=edm(-1.20, 1.20),depth=3,shapes")
    assert config.flow.path == "edm(-1.2, 1.2)" and config.flow.prediction == "F"
    assert config.model.depth == 3 and config.flow.shift == config.samples.shift == 1
    study = formulations.get_config()
    assert (study.batch_size, study.optimizer.learning_rate, study.ema.every) == (1024, 1e-4, 100)
    with pytest.raises(ValueError, match=r"variant='edm\(9\)' is none of the 61: eps/linear, "):
        formulations.get_config("variant=edm(9)")
