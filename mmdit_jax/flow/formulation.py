"""A formulation: path, prediction, law of t and shift, bound together for training and sampling."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from mmdit_jax.flow import losses, parameterization
from mmdit_jax.flow.named import lookup, select
from mmdit_jax.flow.parameterization import PREDICTIONS, per_sample
from mmdit_jax.flow.paths import PATHS, Path
from mmdit_jax.flow.solvers import time_grid
from mmdit_jax.flow.timesteps import TIMESTEPS, Timesteps, shift_alpha, shifted

Array = jax.Array


class Formulation(NamedTuple):
    """Everything the training step and the sampler need to know about the mathematics.

    Arrays are (B, ...), t is (B,) float32, results are float32.

    Attributes:
        path: the path z_t = a_t x0 + b_t eps.
        prediction: what the network predicts, a name in `PREDICTIONS`.
        timesteps: the law of t before the shift.
        train_shift: alpha of the training shift. The sampling shift is an argument of `grid`.
        weight: w_t of the loss, or None for the plain loss on the network's output.
    """

    path: Path
    prediction: str
    timesteps: Timesteps
    train_shift: float
    weight: losses.Weight | None = None

    @property
    def t_range(self) -> tuple[float, float]:
        """[t_min, t_max] where the path is finite and the prediction can be inverted."""
        return parameterization.t_range(self.path, self.prediction)

    def sample_t(self, key: Array, shape: tuple[int, ...]) -> Array:
        """Draws t of a shape, shifted, inside (0, 1) and inside the path's [t_min, t_max].

        This t, and no other, makes z and goes to the network.
        """
        return self.path.clip(shifted(self.timesteps, self.train_shift).sample(key, shape))

    def noisy(self, x0: Array, eps: Array, t: Array) -> Array:
        """z_t = a_t x0 + b_t eps."""
        t = self.path.clip(t)
        return parameterization.combine((self.path.a(t), self.path.b(t)), x0, eps)

    def network_input(self, z: Array, t: Array) -> Array:
        """z as the network sees it: scaled to unit variance for F, else z itself."""
        scale = parameterization.input_scale(self.path, self.prediction, self.path.clip(t))
        return per_sample(scale, z) * z.astype(jnp.float32)

    def target(self, x0: Array, eps: Array, t: Array) -> Array:
        """What the network should output."""
        return parameterization.target(self.path, self.prediction, x0, eps, self.path.clip(t))

    def velocity(self, output: Array, z: Array, t: Array) -> Array:
        """dz/dt of the sampling ODE, from the network's output at (z, t)."""
        return parameterization.convert(self.path, self.prediction, "velocity", output, z, t)

    def loss(self, output: Array, x0: Array, eps: Array, z: Array, t: Array) -> Array:
        """The training loss of each sample, (B,), a mean over the other axes."""
        # L_w is stated with eps_Theta(z, t); in its error against eps, z cancels.
        del z
        target = self.target(x0, eps, t)
        if self.weight is None:
            return losses.plain_loss(output, target)
        return losses.weighted_loss(
            output,
            target,
            self.path.clip(t),
            path=self.path,
            prediction=self.prediction,
            weight=self.weight,
        )

    def grid(self, steps: int, shift: float | str, name: str = "exact") -> Array:
        """The sampler's times, (S + 1,), over `t_range`; `shift` is the sampling shift.

        Where the path does not reach its data, its b being positive at t_min, the last step goes on
        to t = 0.
        """
        t_min, t_max = self.t_range
        to_data = self.path.t_min > 0
        return time_grid(name, steps, shift, t_min=t_min, t_max=t_max, to_data=to_data)

    def prior(self, eps: Array) -> Array:
        """The state at the start of `grid`, from eps ~ N(0, I)."""
        return self.path.prior_scale(self.t_range[1]) * eps.astype(jnp.float32)


def make(
    path: str = "rf",
    prediction: str = "velocity",
    timesteps: str = "logit_normal(0, 1)",
    shift: float | str = 1.0,
    weight: str = "plain",
) -> Formulation:
    """Builds a formulation from names; the defaults are rf/lognorm(0, 1), the paper's choice.

    Args:
        path: a name in `PATHS`, with numbers: "edm(-1.2, 1.2)".
        prediction: a name in `PREDICTIONS`.
        timesteps: a name in `TIMESTEPS`, with numbers: "mode(1.29)". The paper draws t uniformly on
            every path but rf.
        shift: the training shift, a number or a rule of `SHIFTS`: "sqrt_ratio(1048576, 65536)".
        weight: "plain", or a name in `WEIGHTS`, with numbers.

    Raises:
        ValueError: an unknown name (the known ones are listed) or a number outside its range.
    """
    lookup(PREDICTIONS, prediction, what="prediction")
    flow = Formulation(
        path=select(PATHS, path, what="path"),
        prediction=prediction,
        timesteps=select(TIMESTEPS, timesteps, what="timesteps"),
        train_shift=shift_alpha(shift),
        weight=None if weight == "plain" else select(losses.WEIGHTS, weight, what="loss weight"),
    )
    _ = flow.t_range  # computed here, once, and not while a training step is traced
    return flow
