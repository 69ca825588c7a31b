"""Validation loss on fixed (sample, t, noise) triples, at the noise levels of a named grid.

Every sample is seen at each level, with noise that belongs to the sample and the level, from a key
that training never uses. So the number does not depend on the batch size or the mesh, and
validating does not change training. Losses on different grids cannot be compared.
"""

from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from mmdit_jax import sharding
from mmdit_jax.data import latents
from mmdit_jax.data.loader import Loader
from mmdit_jax.flow.formulation import Formulation

VALIDATION_KEY = 0x5A11D  # not the seed of any run: comparable between runs
STRATA_KEY = VALIDATION_KEY + 1

# Grid -> what it is, of `levels` K.
LEVELS = {
    "midpoints": "t = (i + 0.5) / K, i = 0 ... K - 1 (TorchTitan's Flux)",
    "paper": "t = k / K, k = 1 ... K - 1, without t = 1 (Sec. 5.3)",
    "mlperf": "t = k / K, k = 0 ... K - 1, with t = 0 (MLPerf's Flux)",
    "stratified": "t = (i + u) / K, i = 0 ... K - 1, u uniform, of the sample and the level",
}


def level_count(grid: str, levels: int) -> int:
    """How many noise levels each sample is seen at.

    Raises:
        ValueError: an unknown grid, or one that has no level.
    """
    if grid not in LEVELS:
        raise ValueError(f"validation grid {grid!r} is unknown; known are {', '.join(LEVELS)}")
    count = levels - (grid == "paper")
    if count < 1:
        raise ValueError(f"grid {grid!r} of {levels} levels leaves out t = 1 and has none; use 2")
    return count


def times(grid: str, levels: int, level: jax.Array, ids_B: jax.Array) -> jax.Array:
    """t of each sample at a level, float32 (B,)."""
    if grid == "stratified":
        key = jax.random.fold_in(jax.random.key(STRATA_KEY), level)
        keys = jax.vmap(lambda i: jax.random.fold_in(key, i))(ids_B)
        offset_B = jax.vmap(lambda k: jax.random.uniform(k, (), jnp.float32))(keys)
    else:
        offset = {"midpoints": 0.5, "paper": 1.0, "mlperf": 0.0}[grid]
        offset_B = jnp.full(ids_B.shape, offset, jnp.float32)
    return (level + offset_B) / levels


def first_ids(loader: Loader, samples: int) -> Iterator[np.ndarray]:
    """Of each bucket its share of `samples` samples (or of all there are), in stored order."""
    ends = np.cumsum(loader.counts)
    shares = np.diff(ends * min(samples, ends[-1]) // ends[-1], prepend=0)
    for bucket, share in enumerate(shares):
        yield loader.bucket_ids(bucket)[:share]


class ValidationLoss(NamedTuple):
    """Mean over samples and levels, its standard error over samples, and the mean per level."""

    mean: float
    standard_error: float
    per_level: tuple[float, ...]
    samples: int

    def scalars(self) -> dict[str, float]:
        """As metrics: loss, loss_stderr, loss_t0, loss_t1, ..."""
        levels = {f"loss_t{i}": loss for i, loss in enumerate(self.per_level)}
        return {"loss": self.mean, "loss_stderr": self.standard_error, **levels}


class Validation:
    """Evaluates the loss of any parameters on the first samples of the validation split."""

    def __init__(
        self,
        *,
        predict: Callable[..., jax.Array],
        assemble: Callable[..., Any],
        formulation: Formulation,
        loader: Loader,
        mesh: Mesh,
        samples: int,
        levels: int,
        batch_size: int,
        grid: str = "midpoints",
    ):
        """Prepares and compiles on first use.

        Args:
            predict: (params, z, t, condition) -> output.
            assemble: (text outputs, None) -> condition.
            formulation: of training.
            loader: of the validation split.
            mesh: the batch is spread over it; the batch size is rounded up to fit.
            samples: at most; of each bucket its share, the first ones in stored order.
            levels: K noise levels.
            batch_size: samples in one call.
            grid: of the noise levels, a name in `LEVELS`.
        """
        ways = sharding.batch_ways(mesh)
        self._batch_size = -(-min(batch_size, max(samples, 1)) // ways) * ways
        self._loader, self._mesh, self._samples = loader, mesh, samples
        self._levels = level_count(grid, levels)
        autoencoder = loader.manifest.autoencoder

        def losses(params: Any, batch: Mapping[str, Any], ids_B: jax.Array, level: jax.Array):
            x0 = latents.to_x0(batch["latent"], autoencoder)
            key = jax.random.fold_in(jax.random.key(VALIDATION_KEY), level)
            keys = jax.vmap(lambda i: jax.random.fold_in(key, i))(ids_B)
            eps = jax.vmap(lambda k: jax.random.normal(k, x0.shape[1:], jnp.float32))(keys)
            t_B = times(grid, levels, level, ids_B)
            z = formulation.noisy(x0, eps, t_B)
            output = predict(params, z, t_B, assemble(batch["text"], None))
            return formulation.loss(output, x0, eps, z, t_B)

        self._losses = jax.jit(losses, out_shardings=sharding.replicated(mesh))

    def _batches(self) -> Iterator[tuple[Any, np.ndarray, int]]:
        """(global batch, ids, number of real rows); the last batch of a bucket is filled up."""
        place = sharding.batch_sharding(self._mesh)
        for ids in first_ids(self._loader, self._samples):
            for start in range(0, len(ids), self._batch_size):
                part = ids[start : start + self._batch_size]
                real = len(part)
                part = np.concatenate([part, np.repeat(part[-1:], self._batch_size - real)])
                batch = self._loader.examples(part)
                yield jax.tree.map(lambda x: jax.device_put(x, place), batch), part, real

    def __call__(self, params: Any) -> ValidationLoss:
        """The loss of `params`; every process must call it."""
        rows = []
        with jax.set_mesh(self._mesh):
            for batch, ids, real in self._batches():
                columns = [
                    self._losses(params, batch, jnp.asarray(ids, jnp.uint32), jnp.uint32(level))
                    for level in range(self._levels)
                ]
                rows.append(np.stack([np.asarray(c, np.float64) for c in columns], 1)[:real])
        losses_SK = np.concatenate(rows)
        per_sample = losses_SK.mean(axis=1)
        spread = per_sample.std(ddof=1) if len(per_sample) > 1 else 0.0
        return ValidationLoss(
            mean=float(per_sample.mean()),
            standard_error=float(spread / np.sqrt(len(per_sample))),
            per_level=tuple(float(x) for x in losses_SK.mean(axis=0)),
            samples=len(per_sample),
        )
