"""Order of every solver on every path, the scan, path length and time grids."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mmdit_jax.flow import formulation
from mmdit_jax.flow.parameterization import combine, target
from mmdit_jax.flow.paths import PATHS
from mmdit_jax.flow.solvers import GRIDS, SOLVERS, solve, time_grid
from mmdit_jax.flow.timesteps import shift

EVERY_PATH = pytest.mark.parametrize("name", list(PATHS))
EVERY_SOLVER = pytest.mark.parametrize("solver", list(SOLVERS))
ORDER = {"euler": 1, "heun": 2, "ddim": 1}
SPREAD = 0.7  # of the Gaussian data of the test problem


def gaussian_velocity(path):
    """The exact velocity for data N(0, SPREAD^2): z keeps its quantile of N(0, var_t)."""

    def velocity(z, t):
        a, b = path.a(t), path.b(t)
        slope = SPREAD**2 * a * path.da(t) + b * path.db(t)
        return (slope / (SPREAD**2 * a**2 + b**2))[:, None] * z

    return velocity


def spread(path, t):
    return jnp.hypot(SPREAD * path.a(t), path.b(t))


@functools.cache
def errors(name, solver):
    """|z - exact| after 16 and 32 steps over the middle of the path.

    The shorter grid is padded with steps of length zero, so that one compilation does both.
    """
    path = PATHS[name]()
    grids = [np.linspace(0.75, 0.15, steps + 1) for steps in (16, 32)]
    grids = jnp.array([np.pad(g, (0, 33 - g.size), mode="edge") for g in grids], jnp.float32)

    @jax.jit
    @jax.vmap
    def error(t_S1):
        start = spread(path, t_S1[0]) * jnp.ones((1, 1))
        end = solve(gaussian_velocity(path), start, t_S1, solver, path=path).z
        return abs(end[0, 0] - spread(path, t_S1[-1]))

    return np.asarray(error(grids))


@EVERY_PATH
@EVERY_SOLVER
def test_solver_has_its_order_on_every_path(name, solver):
    coarse, fine = errors(name, solver)
    assert math.log2(coarse / fine) == pytest.approx(ORDER[solver], abs=0.2)


def test_every_solver_has_an_order_to_be_tested_for():
    assert set(ORDER) == set(SOLVERS)


@EVERY_PATH
def test_ddim_is_exact_in_one_step_for_one_data_point(name):
    path = PATHS[name]()
    x0, eps = np.float32(np.random.default_rng(0).normal(size=(2, 3, 4)))
    ends = jnp.array([path.t_max, path.t_min])

    def z_of(t):
        return combine((path.a(t), path.b(t)), x0, eps)

    def velocity(z, t):
        return target(path, "velocity", x0, eps, t)

    end = SOLVERS["ddim"](velocity, path, z_of(ends[0]), *ends)
    # x0 is z less b eps at t_max, so the rounding of z is what is left.
    np.testing.assert_allclose(end, z_of(ends[1]), atol=1e-6 * float(path.prior_scale()) + 1e-6)


def test_ddim_is_euler_on_rf():
    path, grid = PATHS["rf"](), time_grid("exact", 7, 3.0)
    start = jnp.ones((2, 3))
    ddim = solve(gaussian_velocity(path), start, grid, "ddim", path=path)
    euler = solve(gaussian_velocity(path), start, grid, "euler")
    np.testing.assert_allclose(ddim.z, euler.z, rtol=1e-5)


@EVERY_PATH
def test_ddim_samples_every_path_from_its_prior(name):
    """50 steps from prior_scale to the data: the spread of the samples is that of the data."""
    path = PATHS[name]()
    grid = time_grid("exact", 50, 1.0, t_min=path.t_min, t_max=path.t_max)
    start = path.prior_scale() * jnp.ones((1, 1))
    sample = jax.jit(lambda z: solve(gaussian_velocity(path), z, grid, "ddim", path=path).z)(start)
    assert float(sample[0, 0]) == pytest.approx(SPREAD, rel=0.12)


def posterior_mean(path, t):
    """E[x0 | z_t] / z_t of the Gaussian data."""
    return SPREAD**2 * path.a(t) / spread(path, t) ** 2


@pytest.mark.parametrize("name", ["edm(-1.2, 1.2)", "edm(1.2, 0.6)", "ldm_linear"])
def test_samples_of_gaussian_data_end_without_noise(name):
    """At t_min their spread is that of z there; the last step takes its noise away.

    For edm(1.2, 0.6), whose noise ends at b = 0.26, that leaves 0.657, and 0.747 with the noise.
    """
    flow = formulation.make(name, "v", "uniform")
    path, ends = flow.path, jnp.float32(flow.t_range)
    expected = spread(path, ends[0]) * posterior_mean(path, ends[0])
    even = path.inverse_logsnr(jnp.linspace(*path.logsnr(ends[::-1]), 400))
    grid = jnp.concatenate([even.at[-1].set(ends[0]), flow.grid(3, 1.0)[-1:]])
    start = flow.prior(jnp.ones((1, 1)))
    velocity = gaussian_velocity(path)
    sample = jax.jit(lambda z: solve(velocity, z, grid, "ddim", path=path).z)(start)
    assert float(sample[0, 0]) == pytest.approx(float(expected), rel=0.02)


@EVERY_PATH
@EVERY_SOLVER
def test_the_step_beyond_t_min_ends_in_the_data_whatever_the_solver(name, solver):
    path = PATHS[name]()
    flow = formulation.make(name, "v", "uniform")
    for steps in (1, 2):
        grid = flow.grid(steps, 3.0)
        assert grid.shape == (steps + 1,) and (grid[0], grid[-1]) == (np.float32(path.t_max), 0)
        assert (float(path.a(grid[-1])), float(path.b(grid[-1]))) == (1, 0)
        if path.t_min == 0:
            continue
        before = grid[-2:-1]
        z = jnp.full((1, 1), 2.0)
        end = SOLVERS[solver](gaussian_velocity(path), path, z, before, jnp.zeros(1))
        np.testing.assert_allclose(end, 2.0 * posterior_mean(path, before)[:, None], rtol=1e-4)
        assert steps == 1 or grid[-2] == np.float32(path.t_min)


def test_solution_equals_a_plain_loop_over_the_grid():
    path, grid = PATHS["rf"](), time_grid("exact", 5, 2.0)
    velocity = gaussian_velocity(path)
    z = start = jnp.asarray(np.random.default_rng(0).normal(size=(2, 3)), jnp.float32)
    length = np.zeros(2)
    for t, t_next in zip(grid[:-1], grid[1:], strict=True):
        dz = (t_next - t) * velocity(z, jnp.full((2,), t))
        z, length = z + dz, length + np.linalg.norm(dz, axis=1)
    solution = solve(velocity, start, grid)
    np.testing.assert_allclose(solution.z, z, rtol=1e-6)
    np.testing.assert_allclose(solution.path_length, length, rtol=1e-6)


@EVERY_SOLVER
def test_program_does_not_grow_with_the_steps(solver):
    path = PATHS["rf"]()

    def program(steps):
        grid = time_grid("exact", steps, 1.0)
        solver_of_z = functools.partial(solve, gaussian_velocity(path), solver=solver, path=path)
        return jax.make_jaxpr(lambda z: solver_of_z(z, grid))(jnp.ones((2, 3))).jaxpr

    assert len(program(4).eqns) == len(program(40).eqns)
    assert sum(equation.primitive.name == "scan" for equation in program(4).eqns) == 1


@EVERY_SOLVER
def test_state_is_float32_and_the_network_sees_the_grid_in_float32(solver):
    seen = []

    def velocity(z, t):
        assert z.dtype == t.dtype == jnp.float32 and t.shape == (2,)
        jax.debug.callback(lambda t: seen.append(t), t[0], ordered=True)
        return jnp.ones_like(z, jnp.bfloat16)

    grid = time_grid("exact", 4, 3.0)
    solution = solve(velocity, jnp.ones((2, 3), jnp.bfloat16), grid, solver, path=PATHS["rf"]())
    jax.effects_barrier()
    assert solution.z.dtype == solution.path_length.dtype == jnp.float32
    assert set(map(float, seen)) >= set(map(float, grid[:-1]))
    assert set(map(float, seen)) <= set(map(float, grid))


@EVERY_SOLVER
def test_a_straight_path_at_256_pixels_has_length_181(solver):
    """Table 6: sqrt(2 x 32 x 32 x 16) for latents of unit variance, whatever the steps."""
    x0, eps = np.float32(np.random.default_rng(0).normal(size=(2, 2, 32, 32, 16)))
    straight = np.linalg.norm((eps - x0).reshape(2, -1), axis=1)
    grid = time_grid("exact", 9, 3.0)
    solution = solve(lambda z, t: jnp.asarray(eps - x0), eps, grid, solver, path=PATHS["rf"]())
    np.testing.assert_allclose(solution.path_length, straight, rtol=1e-5)
    np.testing.assert_allclose(solution.path_length, 181.0, rtol=0.01)
    np.testing.assert_allclose(solution.z, x0, atol=1e-5)


def test_a_curved_path_is_longer_than_its_ends_are_apart():
    """A quarter turn of the plane: length pi/2, distance sqrt(2)."""

    def turn(z, t):
        return np.pi / 2 * jnp.stack([-z[:, 1], z[:, 0]], axis=1)

    solution = solve(turn, jnp.array([[1.0, 0.0]]), jnp.linspace(1, 0, 101), "heun")
    np.testing.assert_allclose(solution.z, [[0, -1]], atol=1e-3)
    assert solution.path_length[0] == pytest.approx(np.pi / 2, rel=1e-3)


# FlowMatchEulerDiscreteScheduler(shift=3.0).set_timesteps(28) of diffusers 0.42.1.
SD3_28_STEPS = [
    1.0, 0.9873806, 0.97410774, 0.9601293, 0.9453875, 0.9298179, 0.913349, 0.8959003, 0.8773819,
    0.8576923, 0.83671665, 0.8143248, 0.79036826, 0.7646771, 0.73705584, 0.7072785, 0.6750823,
    0.6401602, 0.60215056, 0.560625, 0.5150721, 0.46487603, 0.40928882, 0.34739265, 0.27804878,
    0.19982699, 0.11090573, 0.00892857, 0.0,
]  # fmt: skip


def test_sd3_reference_grid_is_the_stored_one_of_the_released_pipelines():
    grid = time_grid("sd3_reference", 28, 3.0)
    assert grid.shape == (29,) and grid.dtype == jnp.float32
    np.testing.assert_allclose(grid, SD3_28_STEPS, atol=1e-6)


@pytest.mark.parity
def test_sd3_reference_grid_is_that_of_diffusers():
    diffusers = pytest.importorskip("diffusers")

    for alpha in (1.0, 3.0):
        for steps in (1, 4, 28, 50):
            scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=alpha)
            scheduler.set_timesteps(steps)
            grid = time_grid("sd3_reference", steps, alpha)
            np.testing.assert_allclose(grid, scheduler.sigmas.numpy(), atol=1e-6)


def test_exact_grid_is_a_uniform_grid_shifted_once():
    grid = time_grid("exact", 4, 3.0)
    np.testing.assert_allclose(grid, [1, 0.9, 0.75, 0.5, 0], atol=1e-7)
    np.testing.assert_allclose(grid, shift(np.linspace(1, 0, 5), 3.0), atol=1e-7)
    np.testing.assert_allclose(time_grid("exact", 4, "sqrt_ratio(9, 1)"), grid)


@EVERY_PATH
@pytest.mark.parametrize("alpha", [0.5, 1.0, 3.0])
def test_exact_grid_falls_from_t_max_to_t_min(name, alpha):
    path = PATHS[name]()
    for steps in (1, 2, 50, 1000):
        grid = time_grid("exact", steps, alpha, t_min=path.t_min, t_max=path.t_max)
        assert grid.shape == (steps + 1,) and grid.dtype == jnp.float32
        assert grid[0] == np.float32(path.t_max) and grid[-1] == np.float32(path.t_min)
        assert (np.diff(grid) < 0).all()


def test_impossible_grids_and_solvers_are_refused():
    with pytest.raises(ValueError, match="steps=0 must be at least 1"):
        time_grid("exact", 0, 1.0)
    with pytest.raises(ValueError, match="grid 'karras' is unknown: choose one of exact, sd3"):
        time_grid("karras", 10, 1.0)
    with pytest.raises(ValueError, match=r"covers \[0, 1\].*use 'exact'"):
        time_grid("sd3_reference", 10, 1.0, t_max=0.999)
    with pytest.raises(ValueError, match="shift -1.0 must be positive"):
        time_grid("exact", 10, -1.0)
    with pytest.raises(
        ValueError, match="solver 'rk4' is unknown: choose one of ddim, euler, heun"
    ):
        solve(lambda z, t: z, jnp.ones((1, 1)), jnp.array([1.0, 0.0]), "rk4")
    with pytest.raises(ValueError, match="'ddim' has no path"):
        solve(lambda z, t: z, jnp.ones((1, 1)), jnp.array([1.0, 0.0]), "ddim")
    assert set(GRIDS) == {"exact", "sd3_reference"}
