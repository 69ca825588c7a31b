"""Optimizers and learning-rate schedules: AdamW as in the paper, Muon on the block matrices."""

from typing import Any

import jax
import optax

from mmdit_jax.config import Config
from mmdit_jax.models.layers import FIXED

SCANNED = ("dual_blocks", "joint_blocks", "blocks", "in_blocks", "middle_blocks", "out_blocks")
BLOCKS = (*SCANNED, "last_block")


def _names(path: Any) -> tuple[str, ...]:
    return tuple(str(getattr(key, "key", key)) for key in path)


def is_kernel(path: Any) -> bool:
    """True for matrices; biases and norm scales are not decayed."""
    return _names(path)[-1] == "kernel"


def is_block_matrix(path: Any) -> bool:
    """True for the matrices inside the blocks, which Muon trains; adaLN stays with AdamW.

    Orthogonalising its six matrices a stream is a good third of Muon's work; without it the quick
    start's step takes 16 % less time, and the loss is within 1.5 % (docs/results.md).
    """
    names = _names(path)
    return is_kernel(path) and names[0] in BLOCKS and "adaLN_modulation" not in names


def learning_rate_schedule(config: Config, peak: float) -> optax.Schedule:
    """Linear warm-up to `peak`, then constant, linear, cosine or wsd (warm-up, stable, decay)."""
    warmup, total = config.optimizer.warmup, config.steps
    final = peak * config.optimizer.final_fraction
    decay = max(1, total - warmup)
    if config.optimizer.schedule == "constant":
        after, boundaries = [optax.constant_schedule(peak)], []
    elif config.optimizer.schedule == "linear":
        after, boundaries = [optax.linear_schedule(peak, final, decay)], []
    elif config.optimizer.schedule == "cosine":
        after = [optax.cosine_decay_schedule(peak, decay, config.optimizer.final_fraction)]
        boundaries = []
    else:
        decay = max(1, min(decay, round(total * config.optimizer.decay_fraction)))
        after = [optax.constant_schedule(peak), optax.linear_schedule(peak, final, decay)]
        boundaries = [total - decay]
    if warmup == 0:
        return optax.join_schedules(after, boundaries)
    # The first step already moves: at step s the rate is peak * (s + 1) / warmup.
    warm = optax.linear_schedule(peak / warmup, peak, max(1, warmup - 1))
    return optax.join_schedules([warm, *after], [warmup, *boundaries])


def _muon_dimensions(params: Any) -> Any:
    """Each projection of each layer is a matrix of its own; all other axes are batched."""

    def dimensions(path, leaf) -> optax.contrib.MuonDimensionNumbers:
        del leaf
        first = 1 if _names(path)[0] in SCANNED else 0
        return optax.contrib.MuonDimensionNumbers(reduction_axis=first, output_axis=-1)

    return jax.tree_util.tree_map_with_path(dimensions, params)


def make_optimizer(config: Config) -> optax.GradientTransformation:
    """Gradient clipping and the optimizer that the config names."""
    settings = config.optimizer

    def decayed(params: Any) -> Any:
        return jax.tree_util.tree_map_with_path(lambda path, _: is_kernel(path), params)

    adamw = optax.adamw(
        learning_rate_schedule(config, settings.learning_rate),
        b1=settings.b1,
        b2=settings.b2,
        eps=settings.eps,
        weight_decay=settings.weight_decay,
        mask=decayed,
    )
    if settings.name == "muon":
        muon = optax.contrib.muon(
            learning_rate_schedule(config, settings.muon_learning_rate),
            beta=settings.muon_momentum,
            weight_decay=settings.weight_decay,
            muon_weight_dimension_numbers=_muon_dimensions,
        )
        optimizer = optax.partition(
            {"muon": muon, "adamw": adamw},
            lambda params: jax.tree_util.tree_map_with_path(
                lambda path, _: "muon" if is_block_matrix(path) else "adamw", params
            ),
        )
    else:
        optimizer = adamw
    if settings.clip_norm > 0:
        optimizer = optax.chain(optax.clip_by_global_norm(settings.clip_norm), optimizer)
    if config.model.pos_embed != "stored":
        return optimizer
    return optax.partition(
        {"trained": optimizer, "fixed": optax.set_to_zero()},
        lambda params: jax.tree_util.tree_map_with_path(
            lambda path, _: "fixed" if _names(path)[0] in FIXED else "trained", params
        ),
    )


def update_ema(
    ema: Any, params: Any, step: jax.Array, *, decay: float, every: int, accepted: Any = True
) -> Any:
    """`ema = decay * ema + (1 - decay) * params` after each `every`-th step (B.3: 0.99, 100).

    In all other steps neither tree is read or written.

    Args:
        ema: float32 tree.
        params: float32 tree, after the update of this step.
        step: number of finished steps, this one included.
        decay: weight of the past.
        every: steps between updates; 1 is the usual per-step average.
        accepted: () bool, False where the step was skipped.
    """

    def update(ema: Any, params: Any) -> Any:
        return jax.tree.map(lambda e, p: e + (1.0 - decay) * (p - e), ema, params)

    due = accepted & (step % every == 0)
    return jax.lax.cond(due, update, lambda ema, params: ema, ema, params)
