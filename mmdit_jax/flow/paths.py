"""Paths from data to noise, `z_t = a_t x0 + b_t eps` (paper Sec. 2 and 3).

t = 0 is data, t = 1 is noise, and t is continuous and float32: no integer timesteps, no table of
them. A path is a handful of pure functions of t. To add one, write a constructor and put it into
`PATHS`: the tests run over that dict.

| name              | a_t          | b_t                    | [t_min, t_max]     |
|-------------------|--------------|------------------------|--------------------|
| rf                | 1 - t        | t                      | [0, 1]             |
| cosine            | cos(pi t/2)  | sin(pi t/2)            | [0, 1]             |
| ldm_linear        | sqrt(prod(1 - beta)) | sqrt(1 - a^2)  | [1/1000, 1]        |
| edm(Pm, Ps)       | 1            | exp(Pm + Ps ndtri(t))  | [1e-5, 1 - 1e-5]   |
| edm_rf            | 1            | t/(1 - t)              | [0, 1 - 1e-3]      |
| edm_cos           | 1            | tan(pi t/2)            | [0, 1 - 1e-3]      |

On [t_min, t_max] a, b and both derivatives are finite. The log-SNR is finite wherever neither a nor
b is zero: everywhere but at t = 0 and at t = 1 of rf and cosine and at t = 0 of edm_rf and edm_cos.
At t = 0, below t_min or not, a is 1 and b is 0: there samplers end.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.scipy.special import ndtr, ndtri

Array = jax.Array
OfTime = Callable[[Array | float], Array]


class Path(NamedTuple):
    """A probability path. Every function maps t (any shape, float32) to the same shape, float32.

    Attributes:
        a: weight of the data x0.
        b: weight of the noise eps.
        da: d a / d t.
        db: d b / d t.
        logsnr: lambda_t = log(a^2 / b^2) (Sec. 2); falls strictly with t.
        inverse_logsnr: lambda -> t.
        t_min: least t at which the path is evaluated.
        t_max: largest t at which the path is evaluated.
    """

    a: OfTime
    b: OfTime
    da: OfTime
    db: OfTime
    logsnr: OfTime
    inverse_logsnr: OfTime
    t_min: float
    t_max: float

    def clip(self, t: Array) -> Array:
        """Moves t into [t_min, t_max]."""
        return jnp.clip(float32_time(t), self.t_min, self.t_max)

    def dlogsnr(self, t: Array) -> Array:
        """lambda'_t = 2 (a'/a - b'/b), negative (Sec. 2)."""
        return 2.0 * (self.da(t) / self.a(t) - self.db(t) / self.b(t))

    def prior_scale(self, t: Array | float | None = None) -> Array:
        """Standard deviation of z at the noisy end, where sampling starts.

        This is sqrt(a^2 + b^2), the spread of z for data of unit variance: 1 for rf, cosine and
        ldm_linear, close to b for edm, whose noise does not end at b = 1.

        Args:
            t: where sampling starts; t_max unless given.

        Returns:
            A float32 scalar; the first state is `prior_scale() * eps`.
        """
        t = self.t_max if t is None else t
        return jnp.hypot(self.a(t), self.b(t))


def float32_time(t: Array | float) -> Array:
    """t as float32; refuses a t that has already lost precision.

    1000 noise levels in bfloat16 are 355 distinct numbers, so a cast back would hide the damage.

    Raises:
        ValueError: t is an array of integers or of 16-bit floats.
    """
    dtype = getattr(t, "dtype", None)
    if dtype is not None and dtype not in (jnp.float32, jnp.float64):
        raise ValueError(f"t (or log-SNR) has dtype {dtype}, the rule is float32: do not cast it")
    return jnp.asarray(t, jnp.float32)


def solve_rising(
    function: Callable[[Array], Array], value: Array, low: float, high: float
) -> Array:
    """The x in [low, high] with function(x) = value, by bisection; the function rises."""

    def halve(_, bracket: tuple[Array, Array]) -> tuple[Array, Array]:
        low, high = bracket
        middle = (low + high) / 2
        beyond = function(middle) > value
        return jnp.where(beyond, low, middle), jnp.where(beyond, middle, high)

    bracket = jnp.full_like(value, low), jnp.full_like(value, high)
    low_end, high_end = jax.lax.fori_loop(0, 40, halve, bracket)
    return (low_end + high_end) / 2


def _of_time(function: Callable[[Array], Array]) -> OfTime:
    """The function on float32 t."""
    return lambda t: function(float32_time(t))


def rf() -> Path:
    """Rectified flow: a straight line from data to noise (Sec. 3)."""
    return Path(
        a=_of_time(lambda t: 1.0 - t),
        b=_of_time(lambda t: t),
        da=_of_time(lambda t: -jnp.ones_like(t)),
        db=_of_time(jnp.ones_like),
        logsnr=_of_time(_rf_logsnr),
        inverse_logsnr=_of_time(lambda logsnr: jax.nn.sigmoid(-logsnr / 2)),
        t_min=0.0,
        t_max=1.0,
    )


def cosine() -> Path:
    """Cosine schedule, variance preserving (Nichol & Dhariwal 2021; Sec. 3)."""
    return Path(
        a=_of_time(_cos),
        b=_of_time(_sin),
        da=_of_time(lambda t: -math.pi / 2 * _sin(t)),
        db=_of_time(lambda t: math.pi / 2 * _cos(t)),
        logsnr=_of_time(_cosine_logsnr),
        inverse_logsnr=_of_time(_cosine_inverse_logsnr),
        t_min=0.0,
        t_max=1.0,
    )


def ldm_linear(beta_start: float = 0.00085, beta_end: float = 0.012, timesteps: int = 1000) -> Path:
    """LDM-linear schedule, variance preserving, made continuous (Rombach et al. 2022; Sec. 3).

    The discrete schedule has beta_k = (sqrt(beta_0) + k/(T-1) (sqrt(beta_{T-1}) - sqrt(beta_0)))^2
    for k = 0..T-1, and a_k^2 = prod_{s <= k} (1 - beta_s). Discrete step k sits at t = (k + 1)/T,
    and t = 0 is clean data. In between log a^2 is the polynomial in t through those values: it is
    smooth, so that a second-order solver stays one, where straight pieces would make a and b turn a
    corner at each of the T values.
    The data end is t_min = 1/T, the least noise of the discrete schedule (b = 0.029): below it b
    grows as sqrt(t) and its derivative has no bound. The noisy end keeps some data, a = 0.068.

    Args:
        beta_start: beta_0.
        beta_end: beta_{T-1}.
        timesteps: T.

    Raises:
        ValueError: not 0 < beta_start <= beta_end < 1, fewer than 100 timesteps, or betas that the
            polynomial does not follow to 1e-6.
    """
    if not (0 < beta_start <= beta_end < 1 and timesteps == int(timesteps) >= 100):
        raise ValueError(
            f"ldm_linear({beta_start}, {beta_end}, {timesteps}) needs 0 < beta_start <= beta_end"
            " < 1 and at least 100 whole timesteps: use ldm_linear(0.00085, 0.012, 1000)"
        )
    timesteps = int(timesteps)
    beta_T = np.linspace(beta_start**0.5, beta_end**0.5, timesteps, dtype=np.float64) ** 2
    t_T = np.arange(1, timesteps + 1) / timesteps
    # log a^2 is t times a polynomial: without the factor t, b would not vanish at t = 0. The fit in
    # float64 leaves 1e-13 for the betas of Stable Diffusion.
    log_a2_T = np.cumsum(np.log1p(-beta_T))
    fit = np.polynomial.Polynomial.fit(t_T, log_a2_T / t_T, deg=8)
    if abs(fit(t_T) * t_T - log_a2_T).max() > 1e-6:
        raise ValueError(
            f"ldm_linear betas {beta_start}..{beta_end} are too far apart for a smooth path: use"
            " 0.00085 and 0.012"
        )
    polynomial = fit.convert() * np.polynomial.Polynomial([0.0, 1.0])
    highest_first = np.float32(polynomial.coef[::-1])
    slope_highest_first = np.float32(polynomial.deriv().coef[::-1])

    def log_a2(t: Array) -> Array:
        return jnp.polyval(jnp.asarray(highest_first), t)

    def slope(t: Array) -> Array:  # d log a^2 / dt
        return jnp.polyval(jnp.asarray(slope_highest_first), t)

    def a(t: Array) -> Array:
        return jnp.exp(log_a2(t) / 2)

    def b(t: Array) -> Array:
        return jnp.sqrt(-jnp.expm1(log_a2(t)))

    def logsnr(t: Array) -> Array:
        return log_a2(t) - jnp.log(-jnp.expm1(log_a2(t)))

    def inverse_logsnr(logsnr: Array) -> Array:
        return solve_rising(lambda t: -log_a2(t), -jax.nn.log_sigmoid(logsnr), 0.0, 1.0)

    return Path(
        a=_of_time(a),
        b=_of_time(b),
        da=_of_time(lambda t: slope(t) / 2 * a(t)),
        db=_of_time(lambda t: -slope(t) / 2 * a(t) ** 2 / b(t)),
        logsnr=_of_time(logsnr),
        inverse_logsnr=_of_time(inverse_logsnr),
        t_min=1.0 / timesteps,
        t_max=1.0,
    )


def edm(P_mean: float = -1.2, P_std: float = 1.2) -> Path:
    """EDM: for t ~ U(0, 1) the log noise level is N(P_mean, P_std^2) (Karras 2022; Sec. 3).

    a = 1 and b_t = exp(F^-1(t)) with F^-1 the normal quantile function, which is infinite at both
    ends; [1e-5, 1 - 1e-5] is 4.26 standard deviations to each side. The slope of b is steep there:
    sample with the solver "ddim", which steps in b and not in t.

    Args:
        P_mean: mean of ln b.
        P_std: standard deviation of ln b.

    Raises:
        ValueError: P_std is not positive.
    """
    if not P_std > 0:
        raise ValueError(f"edm P_std={P_std} must be positive: use for example edm(-1.2, 1.2)")

    def b(t: Array) -> Array:
        return jnp.exp(P_mean + P_std * ndtri(t))

    def db(t: Array) -> Array:
        return b(t) * P_std * math.sqrt(2 * math.pi) * jnp.exp(ndtri(t) ** 2 / 2)

    return _variance_exploding(
        b=b,
        db=db,
        logsnr=lambda t: -2.0 * (P_mean + P_std * ndtri(t)),
        inverse_logsnr=lambda logsnr: ndtr((-logsnr / 2 - P_mean) / P_std),
        t_min=1e-5,
        t_max=1.0 - 1e-5,
    )


def edm_rf() -> Path:
    """EDM with the log-SNR of rf: b = t/(1-t) (edm/rf of Sec. 5.1).

    The paper says only that the schedule matches the log-SNR weighting of rf; this is our reading.
    """
    return _variance_exploding(
        b=lambda t: t / (1.0 - t),
        db=lambda t: 1.0 / (1.0 - t) ** 2,
        logsnr=_rf_logsnr,
        inverse_logsnr=lambda logsnr: jax.nn.sigmoid(-logsnr / 2),
        t_min=0.0,
        t_max=1.0 - 1e-3,
    )


def edm_cos() -> Path:
    """EDM with the log-SNR of cosine: b = tan(pi t/2) (edm/cos of Sec. 5.1).

    As for edm_rf, the paper does not define it further.
    """
    return _variance_exploding(
        b=lambda t: _sin(t) / _cos(t),
        db=lambda t: math.pi / 2 / _cos(t) ** 2,
        logsnr=_cosine_logsnr,
        inverse_logsnr=_cosine_inverse_logsnr,
        t_min=0.0,
        t_max=1.0 - 1e-3,
    )


def _variance_exploding(b, db, logsnr, inverse_logsnr, t_min: float, t_max: float) -> Path:
    """A path with a = 1."""
    return Path(
        a=_of_time(jnp.ones_like),
        b=_of_time(b),
        da=_of_time(jnp.zeros_like),
        db=_of_time(db),
        logsnr=_of_time(logsnr),
        inverse_logsnr=_of_time(inverse_logsnr),
        t_min=t_min,
        t_max=t_max,
    )


def _rf_logsnr(t: Array) -> Array:
    return 2.0 * (jnp.log1p(-t) - jnp.log(t))


def _sin(t: Array) -> Array:
    return jnp.sin(math.pi / 2 * t)


def _cos(t: Array) -> Array:
    # float32 cos(pi/2) is -4e-8, whose logarithm is NaN; this form is exactly 0 at t = 1.
    return jnp.sin(math.pi / 2 * (1.0 - t))


def _cosine_logsnr(t: Array) -> Array:
    return 2.0 * (jnp.log(_cos(t)) - jnp.log(_sin(t)))


def _cosine_inverse_logsnr(logsnr: Array) -> Array:
    return 2 / math.pi * jnp.arctan(jnp.exp(-logsnr / 2))


PATHS: dict[str, Callable[..., Path]] = {
    "rf": rf,
    "cosine": cosine,
    "ldm_linear": ldm_linear,
    "edm": edm,
    "edm_rf": edm_rf,
    "edm_cos": edm_cos,
}
