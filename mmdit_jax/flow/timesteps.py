"""Timestep densities of training (paper Sec. 3.1) and the resolution-dependent shift (Sec. 5.3.2).

t is drawn as a continuous float32 noise level, strictly inside (0, 1). There is no table and no
index: in code that looks t up in a descending table the logit-normal mean changes its sign. Here
m > 0 means noisier. A density is what its name says, without a hidden uniform part.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from mmdit_jax.flow.named import select
from mmdit_jax.flow.paths import float32_time, solve_rising

Array = jax.Array

SMALLEST = 2.0**-24  # half a step of float32 below 1: [SMALLEST, 1 - SMALLEST] is inside (0, 1)
MODE_MAX = 2 / (math.pi - 2)  # above it f_mode is not monotone


class Timesteps(NamedTuple):
    """A law of t.

    Attributes:
        sample: (key, shape) -> t of that shape, float32, strictly inside (0, 1).
        density: t in (0, 1), any shape -> its probability density, same shape, float32.
    """

    sample: Callable[[Array, tuple[int, ...]], Array]
    density: Callable[[Array], Array]


def uniform() -> Timesteps:
    """t ~ U(0, 1)."""
    return Timesteps(sample=open_uniform, density=lambda t: jnp.ones_like(float32_time(t)))


def logit_normal(m: float = 0.0, s: float = 1.0) -> Timesteps:
    """logit(t) ~ N(m, s^2) (Sec. 3.1, Eq. 19); m < 0 is biased to the data, m > 0 to the noise.

    Args:
        m: location.
        s: scale, a standard deviation.

    Raises:
        ValueError: s is not positive.
    """
    if not s > 0:
        raise ValueError(f"logit_normal scale s={s} must be positive: use for example s=1")

    def sample(key: Array, shape: tuple[int, ...]) -> Array:
        return inside(jax.nn.sigmoid(m + s * jax.random.normal(key, shape, jnp.float32)))

    def density(t: Array) -> Array:
        t = float32_time(t)
        logit = jnp.log(t) - jnp.log1p(-t)
        normal = jnp.exp(-((logit - m) ** 2) / (2 * s**2)) / (s * math.sqrt(2 * math.pi))
        return normal / (t * (1.0 - t))

    return Timesteps(sample, density)


def f_mode(u: Array, s: float) -> Array:
    """1 - u - s (cos^2(pi u/2) - 1 + u) (Sec. 3.1); falls from 1 to 0."""
    return 1.0 - u - s * (jnp.cos(math.pi / 2 * u) ** 2 - 1.0 + u)


def mode(s: float = 1.29) -> Timesteps:
    """Mode sampling with heavy tails: t = f_mode(u; s), u ~ U (Sec. 3.1).

    s > 0 favours the middle, s < 0 the ends, s = 0 is uniform. Near s = 1.7519 the density has a
    tall narrow peak at t = 0.5 (904 for s = 1.75).

    Args:
        s: scale.

    Raises:
        ValueError: s outside [-1, 2/(pi - 2)], where f_mode is not monotone and has no density.
    """
    if not -1 <= s <= MODE_MAX:
        raise ValueError(
            f"mode scale s={s} is outside [-1, {MODE_MAX:.4f}], where f_mode is monotone:"
            " choose s inside, for example 1.29"
        )
    # With w = u - 1/2 and x = pi w, f_mode is 1/2 - (slope_0 w + s/2 (x - sin x)). Around the peak
    # slope_0 is tiny, and computing it here, in float64, is what keeps the density accurate there.
    slope_0 = 1.0 + s - s * math.pi / 2

    def below_half(w: Array) -> Array:
        return slope_0 * w + s / 2 * _x_minus_sin(math.pi * w)

    def density(t: Array) -> Array:
        w = solve_rising(below_half, 0.5 - float32_time(t), -0.5, 0.5)
        return 1.0 / jnp.abs(slope_0 + s * math.pi * jnp.sin(math.pi / 2 * w) ** 2)

    def sample(key: Array, shape: tuple[int, ...]) -> Array:
        return inside(f_mode(open_uniform(key, shape), s))

    return Timesteps(sample, density)


def cosmap() -> Timesteps:
    """The t that gives rf the log-SNR of the cosine schedule at u ~ U (Sec. 3.1).

    t = 1 - 1/(tan(pi u/2) + 1), density 2/(pi - 2 pi t + 2 pi t^2). A sampling density, not a loss
    weight with uniform t.
    """

    def sample(key: Array, shape: tuple[int, ...]) -> Array:
        u = open_uniform(key, shape)
        sin, cos = jnp.sin(math.pi / 2 * u), jnp.sin(math.pi / 2 * (1.0 - u))
        return inside(sin / (sin + cos))  # the formula above without the pole of the tangent

    def density(t: Array) -> Array:
        t = float32_time(t)
        return 2.0 / (math.pi * (1.0 - 2.0 * t + 2.0 * t**2))

    return Timesteps(sample, density)


def edm(P_mean: float = -1.2, P_std: float = 1.2) -> Timesteps:
    """EDM's noise levels on the rf path: ln(b/a) = ln(t/(1-t)) ~ N(P_mean, P_std^2).

    The log noise level of rf is logit(t), so this is exactly logit_normal(P_mean, P_std), with the
    names and defaults of Karras 2022.

    Raises:
        ValueError: P_std is not positive.
    """
    if not P_std > 0:
        raise ValueError(f"edm P_std={P_std} must be positive: use for example edm(-1.2, 1.2)")
    return logit_normal(P_mean, P_std)


TIMESTEPS: dict[str, Callable[..., Timesteps]] = {
    "uniform": uniform,
    "logit_normal": logit_normal,
    "mode": mode,
    "cosmap": cosmap,
    "edm": edm,
}


def shift(t: Any, alpha: float) -> Any:
    """t_m = alpha t_n / (1 + (alpha - 1) t_n) (Sec. 5.3.2, Eq. 23).

    Keeps 0 and 1; lowers the rf log-SNR by 2 ln(alpha); alpha > 1 is noisier.
    t is a number or an array of jax or numpy, and so is the result.
    """
    return alpha * t / (alpha * t + (1.0 - t))  # this form is exact at both ends


def unshift(t: Any, alpha: float) -> Any:
    """The inverse of `shift`."""
    return t / (t + alpha * (1.0 - t))


def shifted(timesteps: Timesteps, alpha: float) -> Timesteps:
    """The law of shift(t, alpha); logit_normal(m, s) becomes logit_normal(m + ln alpha, s)."""

    def density(t: Array) -> Array:
        t = float32_time(t)
        slope = alpha / (t + alpha * (1.0 - t)) ** 2  # d unshift / dt
        return timesteps.density(unshift(t, alpha)) * slope

    def sample(key: Array, shape: tuple[int, ...]) -> Array:
        return inside(shift(timesteps.sample(key, shape), alpha))

    return Timesteps(sample, density)


def sqrt_ratio(m: float, n: float) -> float:
    """alpha = sqrt(m/n) for m pixels after n pixels (Sec. 5.3.2); the paper uses 3.0 at 1024^2."""
    if not (m > 0 and n > 0):
        raise ValueError(f"sqrt_ratio({m}, {n}) needs two positive pixel counts: give both")
    return math.sqrt(m / n)


def flux_mu(tokens: float) -> float:
    """alpha = e^mu of FLUX, mu linear in the image tokens: 256 -> 0.5, 4096 -> 1.15."""
    if not tokens > 0:
        raise ValueError(f"flux_mu({tokens}) needs a positive number of image tokens: give it")
    return math.exp(0.5 + (1.15 - 0.5) * (tokens - 256) / (4096 - 256))


# Two different rules are called "auto" elsewhere: here each has its own name.
SHIFTS: dict[str, Callable[..., float]] = {"sqrt_ratio": sqrt_ratio, "flux_mu": flux_mu}


def shift_alpha(setting: float | str) -> float:
    """The alpha of a shift setting: a number, or a rule of `SHIFTS` such as "flux_mu(4096)".

    Raises:
        ValueError: not positive, or an unknown rule.
    """
    alpha = select(SHIFTS, setting, what="shift") if isinstance(setting, str) else float(setting)
    if not (alpha > 0 and math.isfinite(alpha)):
        raise ValueError(f"shift {setting} must be positive and finite: use 1.0 for no shift")
    return alpha


def open_uniform(key: Array, shape: tuple[int, ...]) -> Array:
    """u ~ U(0, 1), float32, symmetric, never 0 and never 1: the centres of 2^23 cells."""
    cell = jax.random.bits(key, shape, jnp.uint32) >> 9
    return (cell.astype(jnp.float32) + 0.5) * 2.0**-23


def inside(t: Array) -> Array:
    """Clips to the float32 numbers inside (0, 1) by 2^-24: a sigmoid of 20 rounds to 1."""
    return jnp.clip(t, SMALLEST, 1.0 - SMALLEST)


def _x_minus_sin(x: Array) -> Array:
    """x - sin(x) for |x| <= pi/2 by its series, which does not cancel near 0."""
    total = jnp.zeros_like(x)
    for n in (15, 13, 11, 9, 7, 5, 3):
        total = (1.0 if n % 4 == 3 else -1.0) / math.factorial(n) + total * x**2
    return total * x**3
