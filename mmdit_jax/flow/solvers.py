"""Solvers of the sampling ODE dz = v(z, t) dt from t_max to t_min, and their time grids.

Where t_min still has noise (edm, ldm_linear) a sampler's grid goes one step further, to t = 0: that
step ends, whatever the solver, in the data that the last evaluation implies (Karras 2022, Alg. 1).
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mmdit_jax.flow.named import lookup
from mmdit_jax.flow.parameterization import combine, per_sample, to_x0_eps
from mmdit_jax.flow.paths import Path
from mmdit_jax.flow.timesteps import shift, shift_alpha, unshift

Array = jax.Array
VelocityFn = Callable[[Array, Array], Array]


class Solution(NamedTuple):
    """Where a solver ended.

    Attributes:
        z: (B, ...) float32, the state at the end of the grid: the sample.
        path_length: (B,) float32, sum over the steps of ||v dt|| (Table 6); 181.0 for a straight
            path between unit-variance latents at 256^2.
    """

    z: Array
    path_length: Array


def euler(velocity_fn: VelocityFn, path: Path | None, z: Array, t: Array, t_next: Array) -> Array:
    """First order, one evaluation a step, of Eq. 1 (the sampler of the paper's study, App. B.3)."""
    dt = per_sample(t_next - t, z)
    slope = velocity_fn(z, t)
    return _or_data(z + dt * slope, path, slope, z, t, t_next)


def heun(velocity_fn: VelocityFn, path: Path | None, z: Array, t: Array, t_next: Array) -> Array:
    """Second order, two evaluations a step (Karras 2022, Alg. 1), also in the last step.

    Where eps is predicted on a path that ends in a = 0 the first step is stiff; use `ddim` there.
    """
    dt = per_sample(t_next - t, z)
    slope = velocity_fn(z, t)
    slope_next = velocity_fn(z + dt * slope, t_next)
    return _or_data(z + dt * (slope + slope_next) / 2, path, slope, z, t, t_next)


def ddim(velocity_fn: VelocityFn, path: Path | None, z: Array, t: Array, t_next: Array) -> Array:
    """First order, exact for constant (x0, eps): z -> a(t_next) x0 + b(t_next) eps.

    It is Euler in b/a in place of t (Song 2021; Karras 2022), hence the same as `euler` on rf, and
    the one to use on edm, where b is too steep in t for a step in t.
    """
    if path is None:
        raise ValueError("solver 'ddim' has no path: pass path= to solve")
    pair = to_x0_eps(path, "velocity", velocity_fn(z, t), z, t)
    return combine((path.a(t_next), path.b(t_next)), pair.x0, pair.eps)


def _or_data(
    z_next: Array, path: Path | None, slope: Array, z: Array, t: Array, t_next: Array
) -> Array:
    """z_next; or the data that the slope at (z, t) implies, where a step leaves [t_min, t_max].

    Below t_min the slope of a path has no bound, so that no step in t could arrive.
    """
    if path is None or path.t_min == 0:
        return z_next
    data = to_x0_eps(path, "velocity", slope, z, t).x0
    return jnp.where(per_sample(t_next < path.t_min, z), data, z_next)


SOLVERS: dict[str, Callable[..., Array]] = {"euler": euler, "heun": heun, "ddim": ddim}


def solve(
    velocity_fn: VelocityFn,
    z_BHWC: Array,
    t_S1: Array,
    solver: str = "euler",
    *,
    path: Path | None = None,
) -> Solution:
    """Integrates dz/dt = velocity_fn(z, t) along a time grid, in one scan, state in float32.

    Args:
        velocity_fn: (z (B, ...), t (B,) float32) -> dz/dt (B, ...).
        z_BHWC: (B, ...) the state at t_S1[0], `path.prior_scale() * eps`.
        t_S1: (S + 1,) float32 times, falling for sampling; S steps.
        solver: a name in `SOLVERS`.
        path: the path; "ddim" needs it, and so does a last step to t = 0 where t_min is larger.

    Returns:
        The final state and the length of the way there.

    Raises:
        ValueError: unknown solver, or "ddim" without a path.
    """
    advance = lookup(SOLVERS, solver, what="solver")
    batch = z_BHWC.shape[0]

    def float32_velocity(z: Array, t: Array) -> Array:
        return velocity_fn(z, t).astype(jnp.float32)

    def step(state: Solution, times: tuple[Array, Array]) -> tuple[Solution, None]:
        t_B, t_next_B = (jnp.full((batch,), t, jnp.float32) for t in times)
        z = advance(float32_velocity, path, state.z, t_B, t_next_B)
        moved = jnp.sqrt(jnp.sum((z - state.z) ** 2, axis=tuple(range(1, z.ndim))))
        return Solution(z, state.path_length + moved), None

    start = Solution(z_BHWC.astype(jnp.float32), jnp.zeros((batch,), jnp.float32))
    t_S1 = jnp.asarray(t_S1, jnp.float32)
    return jax.lax.scan(step, start, (t_S1[:-1], t_S1[1:]))[0]


def exact(steps: int, alpha: float, t_min: float = 0.0, t_max: float = 1.0) -> np.ndarray:
    """A uniform grid shifted once (Eq. 23), from t_max to t_min, both included."""
    uniform = np.linspace(unshift(t_max, alpha), unshift(t_min, alpha), steps + 1)
    grid = shift(uniform, alpha)
    grid[0], grid[-1] = t_max, t_min  # to the last bit
    return grid


def sd3_reference(steps: int, alpha: float, t_min: float = 0.0, t_max: float = 1.0) -> np.ndarray:
    """The grid of the released SD3 pipelines, shifted twice.

    Its uniform grid ends at an already shifted 1/1000 and is then shifted again; 0 is appended. 28
    steps with shift 3 end in 0.19983, 0.11091, 0.00893, 0.

    Raises:
        ValueError: a range other than [0, 1]; this grid is defined for rf only.
    """
    if (t_min, t_max) != (0.0, 1.0):
        raise ValueError(
            f"grid 'sd3_reference' covers [0, 1], the path [{t_min}, {t_max}]: use 'exact'"
        )
    return np.append(shift(np.linspace(1.0, shift(1e-3, alpha), steps), alpha), 0.0)


GRIDS: dict[str, Callable[..., np.ndarray]] = {"exact": exact, "sd3_reference": sd3_reference}


def time_grid(
    name: str,
    steps: int,
    shift: float | str,
    *,
    t_min: float = 0.0,
    t_max: float = 1.0,
    to_data: bool = False,
) -> Array:
    """The times of a sampler, (S + 1,) float32, falling.

    Args:
        name: a name in `GRIDS`.
        steps: S, at least 1.
        shift: the sampling shift, a number or a rule of `SHIFTS`; not the training shift.
        t_min: the last time.
        t_max: the first time.
        to_data: whether the last of the steps goes from t_min on to t = 0.

    Raises:
        ValueError: unknown grid, no steps, a shift that is not positive, or a range that the grid
            does not cover.
    """
    if steps < 1:
        raise ValueError(f"steps={steps} must be at least 1: use for example 50")
    grid = lookup(GRIDS, name, what="grid")
    times = grid(max(1, steps - to_data), shift_alpha(shift), t_min, t_max)
    if to_data:
        times = np.append(times[:steps], 0.0)
    return jnp.asarray(times, jnp.float32)
