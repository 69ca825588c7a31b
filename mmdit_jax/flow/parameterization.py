"""What the network predicts, and how one prediction becomes another.

Every prediction is a linear form `c_x x0 + c_e eps`, and so is the state `z = a x0 + b eps`. The
two together are a 2x2 system for (x0, eps); once that is solved every other prediction, and the
velocity that the sampler needs, is a linear form again. With `det = a c_e - b c_x`:

    x0  = (c_e z - b output) / det
    eps = (a output - c_x z) / det

| name     | c_x        | c_e          | det         |
|----------|------------|--------------|-------------|
| velocity | a'         | b'           | a b' - a' b |
| eps      | 0          | 1            | a           |
| v        | -b         | a            | a^2 + b^2   |
| x0       | 1          | 0            | -b          |
| F        | b / (sd r) | -a sd / r    | -r / sd     |

with sd = 0.5 and r = sqrt(b^2 + a^2 sd^2). Only eps at a = 0 and x0 at b = 0 cannot be inverted.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from mmdit_jax.flow.named import lookup
from mmdit_jax.flow.paths import Path

Array = jax.Array
Coefficients = tuple[Array, Array]

SIGMA_DATA = 0.5  # of EDM (Karras 2022); the paper keeps it although its latents have unit variance
END = 1e-3  # how far inside an end that cannot be inverted a conversion is evaluated


class Pair(NamedTuple):
    """Data and noise, both (B, ...) float32."""

    x0: Array
    eps: Array


def velocity(path: Path, t: Array) -> Coefficients:
    """dz/dt at fixed (x0, eps): a' x0 + b' eps (Sec. 2); eps - x0 for rf."""
    return path.da(t), path.db(t)


def eps(path: Path, t: Array) -> Coefficients:
    """The noise."""
    a = path.a(t)
    return jnp.zeros_like(a), jnp.ones_like(a)


def v(path: Path, t: Array) -> Coefficients:
    """a eps - b x0 (Salimans & Ho 2022); on cosine, and only there, 2/pi times the velocity."""
    return -path.b(t), path.a(t)


def x0(path: Path, t: Array) -> Coefficients:
    """The data."""
    a = path.a(t)
    return jnp.ones_like(a), jnp.zeros_like(a)


def F(path: Path, t: Array) -> Coefficients:
    """The EDM network (Karras 2022, Eq. 7-8), (x0 - c_skip z/a) / c_out at noise level b/a.

    c_skip = sd^2/(s^2 + sd^2) and c_out = s sd/sqrt(s^2 + sd^2) with s = b/a; written out, the
    division by a and by s goes away, and F is regular at both ends of every path.
    """
    a, b = path.a(t), path.b(t)
    r = jnp.hypot(b, a * SIGMA_DATA)
    return b / (SIGMA_DATA * r), -a * SIGMA_DATA / r


PREDICTIONS: dict[str, Callable[[Path, Array], Coefficients]] = {
    "velocity": velocity,
    "eps": eps,
    "v": v,
    "x0": x0,
    "F": F,
}


def coefficients(path: Path, prediction: str, t: Array) -> Coefficients:
    """(c_x, c_e) of a prediction, each of the shape of t.

    Raises:
        ValueError: unknown prediction.
    """
    return lookup(PREDICTIONS, prediction, what="prediction")(path, t)


def determinant(path: Path, prediction: str, t: Array) -> Array:
    """a c_e - b c_x; zero where the prediction does not tell x0 and eps apart."""
    c_x, c_e = coefficients(path, prediction, t)
    return path.a(t) * c_e - path.b(t) * c_x


@functools.lru_cache(maxsize=128)  # so that only the first call touches a device
def t_range(path: Path, prediction: str) -> tuple[float, float]:
    """[t_min, t_max] on which the prediction can be inverted.

    The path's own range, less 1e-3 at an end where the determinant vanishes: eps at the noisy end
    of rf and cosine, x0 at the data end of rf, cosine, edm_rf and edm_cos.
    """
    t_min, t_max = path.t_min, path.t_max
    with jax.ensure_compile_time_eval():  # two numbers known now, also under jit
        ends = jnp.array([t_min, t_max], jnp.float32)
        singular = abs(determinant(path, prediction, ends)) < 1e-4
        at_min, at_max = bool(singular[0]), bool(singular[1])
    return t_min + END * at_min, t_max - END * at_max


def combine(coefficients: Coefficients, x0: Array, eps: Array) -> Array:
    """c_x x0 + c_e eps in float32, coefficients () or (B,), arrays (B, ...)."""
    c_x, c_e = (per_sample(c, x0) for c in coefficients)
    return c_x * x0.astype(jnp.float32) + c_e * eps.astype(jnp.float32)


def target(path: Path, prediction: str, x0: Array, eps: Array, t: Array) -> Array:
    """What the network should output, (B, ...) float32, for data x0 and noise eps at t (B,)."""
    return combine(coefficients(path, prediction, t), x0, eps)


def to_x0_eps(path: Path, prediction: str, output: Array, z: Array, t: Array) -> Pair:
    """Solves the 2x2 system for the data and the noise that the output implies.

    Args:
        path: the path that made z.
        prediction: what the network predicts.
        output: (B, ...) the network's output.
        z: (B, ...) the state at t.
        t: (B,) or () float32; moved into `t_range`, where the system can be solved.

    Returns:
        (x0, eps), each (B, ...) float32.
    """
    t = jnp.clip(t, *t_range(path, prediction))
    output, z = output.astype(jnp.float32), z.astype(jnp.float32)
    c_x, c_e = (per_sample(c, z) for c in coefficients(path, prediction, t))
    a, b = per_sample(path.a(t), z), per_sample(path.b(t), z)
    det = a * c_e - b * c_x
    return Pair(x0=(c_e * z - b * output) / det, eps=(a * output - c_x * z) / det)


def convert(path: Path, source: str, to: str, output: Array, z: Array, t: Array) -> Array:
    """One prediction as another, (B, ...) float32; a prediction as itself is returned untouched.

    Args:
        path: the path that made z.
        source: the prediction that `output` is.
        to: the prediction wanted.
        output: (B, ...).
        z: (B, ...) the state at t.
        t: (B,) or () float32.
    """
    if source == to:
        lookup(PREDICTIONS, to, what="prediction")
        return output.astype(jnp.float32)
    pair = to_x0_eps(path, source, output, z, t)
    return combine(coefficients(path, to, path.clip(t)), pair.x0, pair.eps)


def input_scale(path: Path, prediction: str, t: Array) -> Array:
    """Factor on z before the network: c_in of EDM for F, otherwise 1 (shape of t).

    c_in = 1/sqrt(b^2 + a^2 sd^2) (Karras 2022, Eq. 7, for any a) gives an input of unit variance
    when the data have the spread sd. EDM's c_noise is not used: the network sees t, as everywhere.
    """
    a = path.a(t)
    return 1.0 / jnp.hypot(path.b(t), a * SIGMA_DATA) if prediction == "F" else jnp.ones_like(a)


def per_sample(coefficient: Array, like: Array) -> Array:
    """Appends axes so that a () or (B,) coefficient multiplies a (B, ...) array."""
    return coefficient.reshape(coefficient.shape + (1,) * (like.ndim - coefficient.ndim))
