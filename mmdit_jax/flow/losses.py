"""Losses per sample (paper Sec. 2 and 3).

The training loss of every formulation is the plain squared error of the network's own output. The
weighted form puts all of them on one scale,

    L_w = -1/2 E[w_t lambda'_t ||eps_Theta(z_t, t) - eps||^2],

so that a formulation is a choice of w_t. Squared norms are means over the non-batch axes.
"""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp

from mmdit_jax.flow.parameterization import SIGMA_DATA, determinant
from mmdit_jax.flow.paths import Path
from mmdit_jax.flow.timesteps import Timesteps

Array = jax.Array
Weight = Callable[[Path, Array], Array]

MAX_FACTOR = 1e4  # bound on the factor a weight puts on the plain loss of a sample


def plain_loss(output: Array, target: Array) -> Array:
    """Mean squared error over the non-batch axes, (B, ...) -> (B,) float32."""
    error = output.astype(jnp.float32) - target.astype(jnp.float32)
    return jnp.mean(error**2, axis=tuple(range(1, error.ndim)))


def implied_weight(path: Path, prediction: str, t: Array) -> Array:
    """The w_t for which L_w is the plain loss on this prediction, shape of t.

    At fixed z an error e of eps is an error e det/a of the prediction, so w = -2/lambda' (det/a)^2.
    """
    return -2.0 / path.dlogsnr(t) * (determinant(path, prediction, t) / path.a(t)) ** 2


def weighted_loss(
    output: Array, target: Array, t: Array, *, path: Path, prediction: str, weight: Weight
) -> Array:
    """L_w of each sample: -1/2 w_t lambda'_t times the mean squared error of eps.

    Computed as the plain loss times w_t / implied_weight. That is the same number, since an error
    of the output and the error of eps differ by a factor; and where w_t is the weight of the plain
    loss itself the two singularities cancel. What is left of the factor is bounded by 1e4.

    Args:
        output: (B, ...) the network's output.
        target: (B, ...) what it should be.
        t: (B,) float32, inside (0, 1).
        path: the path of z_t.
        prediction: what the network predicts.
        weight: w_t, from `WEIGHTS` or `density_weight`.

    Returns:
        (B,) float32.
    """
    factor = weight(path, t) / implied_weight(path, prediction, t)
    return jnp.minimum(factor, MAX_FACTOR) * plain_loss(output, target)


def cfm() -> Weight:
    """-1/2 lambda' b^2: conditional flow matching, the plain loss on the velocity (Sec. 2)."""
    return lambda path, t: -0.5 * path.dlogsnr(t) * path.b(t) ** 2


def exp_minus_half_logsnr() -> Weight:
    """e^(-lambda/2) = b/a: t/(1-t) of rf, and v/cos (Sec. 3)."""
    return lambda path, t: path.b(t) / path.a(t)


def sech_half_logsnr() -> Weight:
    """sech(lambda/2): eps/cos (Sec. 3)."""
    return lambda path, t: 1.0 / jnp.cosh(path.logsnr(t) / 2)


def edm_weight(P_mean: float = -1.2, P_std: float = 1.2) -> Weight:
    """N(lambda; -2 P_mean, (2 P_std)^2) (e^-lambda + 0.5^2): the F loss of edm (Sec. 3)."""
    if not P_std > 0:
        raise ValueError(f"edm P_std={P_std} must be positive: use for example edm(-1.2, 1.2)")

    def weight(path: Path, t: Array) -> Array:
        logsnr = path.logsnr(t)
        normal = jnp.exp(-((logsnr + 2 * P_mean) ** 2) / (8 * P_std**2))
        normal = normal / (2 * P_std * math.sqrt(2 * math.pi))
        return normal * (jnp.exp(-logsnr) + SIGMA_DATA**2)

    return weight


# Each name is its formula: a weight called "sigma_sqrt" elsewhere is in truth sigma^-2.
WEIGHTS: dict[str, Callable[..., Weight]] = {
    "cfm": cfm,
    "exp_minus_half_logsnr": exp_minus_half_logsnr,
    "sech_half_logsnr": sech_half_logsnr,
    "edm": edm_weight,
}


def density_weight(timesteps: Timesteps) -> Weight:
    """t/(1-t) pi(t): on rf with t ~ U the expectation of the plain loss with t ~ pi (Sec. 3.1)."""
    return lambda path, t: path.b(t) / path.a(t) * timesteps.density(t)
