"""What a run has learnt, for those who use it: sampling, evaluation, export, a warm start.

`run` makes the parts of a run from its config; here are the weights that lie in its workdir.
"""

from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from absl import logging
from jax.sharding import Mesh

from mmdit_jax import config as config_lib
from mmdit_jax import run, sharding
from mmdit_jax.config import Config
from mmdit_jax.data.manifest import Manifest, fits
from mmdit_jax.training import state as state_lib
from mmdit_jax.training import warm_start
from mmdit_jax.training import workdir as workdir_lib
from mmdit_jax.training.checkpoint import Checkpoints
from mmdit_jax.training.integrity import DamagedError


def read_config(workdir: str) -> Config:
    """The config that a run was started with."""
    return workdir_lib.read_config(workdir)


class TrainedRun(NamedTuple):
    """A run as it was left in its workdir."""

    parts: run.Parts
    manifest: Manifest
    mesh: Mesh
    params: Any
    step: int
    weights: str


def open_run(workdir: str, *, weights: str = "ema", step: int = 0) -> TrainedRun:
    """Opens the weights of a run for sampling and evaluation.

    Args:
        workdir: of `mmdit_jax.train`.
        weights: "ema" or "raw"; a run without EMA has raw ones only.
        step: of the checkpoint; 0 is the newest.

    Raises:
        FileNotFoundError: no run, or no checkpoint of that step.
        ValueError: EMA weights of a run that has none, or a manifest that is not of its config.
    """
    parts = run.build(read_config(workdir))
    manifest = Manifest.load(workdir, check_shards=False)
    if manifest.splits:  # imported weights may lack networks
        fits(manifest, run.expected_data(parts.config))
    # The mesh of training is not needed here: all devices share the batch.
    mesh = sharding.make_mesh(fsdp=1)
    params, step = restore_weights(workdir, parts.config, mesh, weights=weights, step=step)
    return TrainedRun(parts, manifest, mesh, params, step, weights)


def restore_weights(
    workdir: str, config: Config, mesh: Mesh, *, weights: str = "ema", step: int = 0
) -> tuple[Any, int]:
    """The weights of a run on a mesh, and their step; see `open_run` for arguments and errors."""
    if weights not in config_lib.WEIGHTS:
        raise ValueError(f"weights={weights!r} must be one of {', '.join(config_lib.WEIGHTS)}")
    if weights == "ema" and config.ema.decay == 0:
        raise ValueError("this run has no EMA (ema.decay=0); use --weights=raw")
    checkpoints = Checkpoints(workdir)
    known = checkpoints.steps()
    if not known or (step and step not in known):
        raise FileNotFoundError(
            f"{workdir} has no checkpoint{f' of step {step}' if step else ''}; it has "
            f"{', '.join(map(str, known)) or 'none yet'}"
        )
    boxed = state_lib.abstract_params(config)
    try:
        return checkpoints.restore_weights(
            nn.meta.unbox(boxed),
            sharding.parameter_shardings(boxed, mesh),
            [step] if step else known[::-1],
            weights,
        )
    except DamagedError as error:
        raise ValueError(f"{workdir}: {error}; put back a copy") from error


def check_init_from(config: Config, manifest: Manifest) -> list[str]:
    """Refuses an `init_from` whose model differs in what `init_adapt` does not allow.

    Args:
        config: of the run that is to start.
        manifest: of its data set.

    Returns:
        The differences that are allowed, for people.

    Raises:
        FileNotFoundError: that workdir is no run.
        ValueError: every other difference (see `warm_start.check` and `check_latents`).
    """
    allowed = warm_start.check(read_config(config.init_from), config)
    theirs = Manifest.load(config.init_from, check_shards=False).autoencoder
    return allowed + warm_start.check_latents(theirs, manifest.autoencoder, config)


def init_from(
    config: Config, state: state_lib.TrainState, plan: state_lib.StatePlan, manifest: Manifest
) -> state_lib.TrainState:
    """A fresh state with the newest EMA weights (raw, where there is no EMA) of another run.

    `manifest` is that of the run's data set.

    Raises:
        FileNotFoundError: that workdir has no checkpoint.
        ValueError: its model differs in what `init_adapt` does not allow.
    """
    source = read_config(config.init_from)
    for difference in check_init_from(config, manifest):
        logging.info("init_adapt: %s", difference)
    weights = "ema" if source.ema.decay > 0 else "raw"
    mesh = jax.tree.leaves(plan.shardings.params)[0].mesh
    params, step = restore_weights(config.init_from, source, mesh, weights=weights)
    params = jax.jit(
        lambda params: warm_start.adapt(params, plan.abstract.params, source, config),
        out_shardings=plan.shardings.params,
        donate_argnums=0,
    )(params)
    logging.info(
        "parameters start from the %s weights of %s, step %d", weights, config.init_from, step
    )
    ema_params = None if state.ema_params is None else jax.tree.map(jnp.copy, params)
    return state.replace(params=params, ema_params=ema_params)
