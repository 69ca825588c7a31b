"""One training step: from a batch of stored latents and text to the next state.

Every random number of step s comes from fold_in(fold_in(key(seed), s), purpose) and is drawn as one
array over the global batch, so a sample sees the same t, noise, dropout and latent on any mesh.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from absl import logging
from jax.sharding import Mesh

from mmdit_jax import config as config_lib
from mmdit_jax import sharding
from mmdit_jax.config import Config
from mmdit_jax.data import latents
from mmdit_jax.flow.formulation import Formulation
from mmdit_jax.training import guard as guard_lib
from mmdit_jax.training.optimizer import update_ema
from mmdit_jax.training.state import Purpose, StatePlan, TrainState, purpose_key

T_BINS = 8  # of the training loss by noise level
UNROLL_UP_TO = 6  # blocks on CPU, which gain 3 % so and compile a quarter longer

Predict = Callable[..., jax.Array]


class Conditioning(NamedTuple):
    """How text becomes a condition; made by the command, since training knows no encoders.

    Attributes:
        assemble: (text outputs, keep or None) -> (context_BTE, pooled_BV).
        drop_mask: (key, B) -> which encoder of which sample is kept.
        finite: text outputs -> (B,) bools, whether all of a sample's text is finite.
    """

    assemble: Callable[..., Any]
    drop_mask: Callable[[jax.Array, int], Mapping[str, jax.Array]]
    finite: Callable[[Mapping[str, Any]], jax.Array]


def make_predict(model: nn.Module, formulation: Formulation) -> Predict:
    """predict(params, z, t, condition) -> the network's output, its input scaled as it expects."""

    def predict(params: Any, z_BHWC: jax.Array, t_B: jax.Array, condition: Any) -> jax.Array:
        z_in = formulation.network_input(z_BHWC, t_B)
        return model.apply({"params": params}, z_in, t_B, *condition)  # pyright: ignore

    return predict


class Noised(NamedTuple):
    """What a step draws for its batch, before the network; `offset` into the position grid.

    Of a sample that is not `finite` the latent and the text are zeros, and its loss is left out.
    """

    x0: jax.Array
    eps: jax.Array
    t: jax.Array
    keep: Any
    finite: jax.Array
    offset: jax.Array | None = None


def draw(
    batch: Mapping[str, Any],
    step: jax.Array,
    *,
    seed: int,
    formulation: Formulation,
    conditioning: Conditioning,
    autoencoder: Mapping[str, Any],
    grid: tuple[int, int] | None = None,
) -> Noised:
    """x0, noise, t and kept encoders of every sample of the global batch of `step`.

    With `grid` (patches an axis that the position grid holds, side of a patch) also where in the
    grid each picture lies, every place with equal probability.
    """

    def key(purpose: int) -> jax.Array:
        return purpose_key(seed, step, purpose)

    batch_size = batch["latent"].shape[0]
    finite = jnp.all(jnp.isfinite(batch["latent"]), axis=(1, 2, 3))
    finite = sharding.constrain(finite & conditioning.finite(batch["text"]), "batch")
    # Here and not in the loss: a NaN that reaches the network is in every gradient, whatever the
    # weight of its sample (0 * NaN is NaN).
    stored = jnp.where(finite[:, None, None, None], batch["latent"], 0)
    x0 = latents.to_x0(stored, autoencoder, key(Purpose.LATENT))
    eps = jax.random.normal(key(Purpose.NOISE), x0.shape, jnp.float32)
    keep = conditioning.drop_mask(key(Purpose.TEXT_DROPOUT), batch_size)
    offset = None
    if grid is not None:
        free = jnp.array([grid[0] - side // grid[1] for side in x0.shape[1:3]])
        offset = jax.random.randint(key(Purpose.POSITION), (batch_size, 2), 0, free[None] + 1)
        offset = sharding.constrain(offset, "batch", None)
    return Noised(
        x0=sharding.constrain(x0, "batch", None, None, None),
        eps=sharding.constrain(eps, "batch", None, None, None),
        t=sharding.constrain(formulation.sample_t(key(Purpose.TIMESTEP), (batch_size,)), "batch"),
        keep=jax.tree.map(lambda keep_B: sharding.constrain(keep_B & finite, "batch"), keep),
        finite=finite,
        offset=offset,
    )


def make_train_step(
    config: Config,
    *,
    model: nn.Module,
    formulation: Formulation,
    optimizer: optax.GradientTransformation,
    conditioning: Conditioning,
    autoencoder: Mapping[str, Any],
) -> Callable[[TrainState, Mapping[str, Any]], tuple[TrainState, dict[str, jax.Array]]]:
    """The pure function (state, batch) -> (state, metrics); `compile_train_step` compiles it."""
    accumulate = config.optimizer.accumulate
    log_logits = config.log.attention_logits
    grid = None
    if config.model.pos_embed_random_crop:
        grid = (config.model.pos_embed_max_size, config.model.patch)

    def loss_fn(params: Any, text: Any, noised: Noised, scale: jax.Array):
        condition = conditioning.assemble(text, noised.keep)
        z = formulation.noisy(noised.x0, noised.eps, noised.t)
        network, platform = model, sharding.platform()
        if config_lib.last_block(config, platform) == "scanned":
            network = model.clone(scan_last=True)
        if platform == "cpu":
            network = network.clone(unroll_up_to=UNROLL_UP_TO)
        output, sown = network.apply(  # pyright: ignore
            {"params": params},
            formulation.network_input(z, noised.t),
            noised.t,
            *condition,
            *([] if noised.offset is None else [noised.offset]),
            mutable=["intermediates"] if log_logits else [],
        )
        loss_B = formulation.loss(output, noised.x0, noised.eps, z, noised.t)
        loss_B = jnp.where(noised.finite, loss_B, 0.0)
        bin_B = jnp.clip((noised.t * T_BINS).astype(jnp.int32), 0, T_BINS - 1)
        in_bin = jax.nn.one_hot(bin_B, T_BINS) * noised.finite[:, None]
        metrics = {
            "loss": jnp.mean(loss_B) * scale,
            "bin_loss": jnp.sum(in_bin * loss_B[:, None], axis=0),
            "bin_count": jnp.sum(in_bin, axis=0),
        }
        if log_logits:
            metrics["max_attention_logit"] = jnp.max(
                jnp.stack([jnp.max(x) for x in jax.tree.leaves(sown)])
            )
        return metrics["loss"], metrics

    grad_fn = jax.value_and_grad(loss_fn, has_aux=True)

    def micro_batches(tree: Any) -> Any:
        # Micro-batch a takes the samples a, a + A, ...: each device splits what it already holds.
        def split(x: jax.Array) -> jax.Array:
            parts = x.reshape(x.shape[0] // accumulate, accumulate, *x.shape[1:])
            return jnp.moveaxis(parts, 1, 0)

        return jax.tree.map(split, tree)

    def gradients(params: Any, text: Any, noised: Noised):
        # The loss is a mean over the finite samples of the whole batch, in however many parts it
        # comes: the factor is exactly 1 where all are, and infinite (0 * inf is NaN, and the update
        # is skipped) where none is.
        scale = noised.finite.size / jnp.sum(noised.finite, dtype=jnp.float32)
        if accumulate == 1:
            (_, metrics), grads = grad_fn(params, text, noised, scale)
            return grads, metrics

        def add(total: Any, micro: Any):
            (_, metrics), grads = grad_fn(params, *micro, scale)
            return jax.tree.map(jnp.add, total, grads), metrics

        zeros = jax.tree.map(jnp.zeros_like, params)
        total, stacked = jax.lax.scan(add, zeros, micro_batches((text, noised)))
        metrics = {
            name: jnp.max(x)
            if name == "max_attention_logit"
            else jnp.mean(x)
            if name == "loss"
            else jnp.sum(x, axis=0)
            for name, x in stacked.items()
        }
        return jax.tree.map(lambda g: g / accumulate, total), metrics

    def train_step(state: TrainState, batch: Mapping[str, Any]):
        noised = draw(
            batch,
            state.step,
            seed=config.seed,
            formulation=formulation,
            conditioning=conditioning,
            autoencoder=autoencoder,
            grid=grid,
        )
        grads, metrics = gradients(state.params, batch["text"], noised)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        step = state.step + 1
        loss, grad_norm = metrics["loss"], optax.tree.norm(grads)
        accepted = guard_lib.accepts(state.guard, loss, grad_norm, sigma=config.faults.spike_sigma)
        params, opt_state = guard_lib.chosen(
            accepted, (params, opt_state), (state.params, state.opt_state)
        )
        ema_params = state.ema_params
        if ema_params is not None:
            ema_params = update_ema(
                ema_params,
                params,
                step,
                decay=config.ema.decay,
                every=config.ema.every,
                accepted=accepted,
            )
        faulty = {
            "nonfinite_samples": jnp.sum(~noised.finite, dtype=jnp.int32),
            "substituted": jnp.sum(jnp.asarray(batch.get("substituted", 0)), dtype=jnp.int32),
        }
        guard = guard_lib.advance(state.guard, accepted, loss, grad_norm, **faulty)
        metrics |= {
            "grad_norm": grad_norm,
            "param_norm": optax.tree.norm(params),
            "update_norm": optax.tree.norm(updates),
            "finite": noised.finite,
            **faulty,
            **guard_lib.metrics(guard, accepted),
        }
        return TrainState(step, params, ema_params, opt_state, guard), metrics

    return train_step


def lower_train_step(
    train_step: Callable, plan: StatePlan, mesh: Mesh, batch: Mapping[str, Any]
) -> jax.stages.Lowered:
    """Lowers the step for the mesh: the state is donated and stays where it lies.

    Nothing is left out of the program's arguments, used or not: who runs the executable without
    jax's own bookkeeping (`executable`) passes the leaves of state and batch, in their order.

    Args:
        train_step: of `make_train_step`.
        plan: of the state.
        mesh: of the run; its devices may be those of a topology that is not here.
        batch: shapes and dtypes of the global batch.
    """
    jitted = jax.jit(
        train_step,
        in_shardings=(plan.shardings, sharding.batch_sharding(mesh)),
        out_shardings=(plan.shardings, sharding.replicated(mesh)),
        donate_argnums=0,
        keep_unused=True,
        compiler_options=compiler_options(mesh),
    )
    with jax.set_mesh(mesh):
        return jitted.lower(plan.abstract, batch)


def compiler_options(mesh: Mesh) -> dict[str, bool]:
    """Settings of the compiler that the step needs on this mesh."""
    devices = list(mesh.devices.flat)
    slices = {sharding.slice_of(device) for device in devices}
    if devices[0].platform == "cpu":
        # Else parameters and moments are copied before they are updated where they lie.
        return {"xla_cpu_copy_insertion_use_region_analysis": True}
    if devices[0].platform == "tpu" and len(slices) > 1:
        # To sum the gradients of one layer and micro-batch over slices during the next, the
        # pipeliner takes an iteration out of every loop: twice the code, and a third more memory.
        return {"xla_tpu_enable_collective_pipeliner": False}
    return {}


def compiled(lowered: jax.stages.Lowered) -> Callable:
    """What a lowered step is compiled to."""
    return lowered.compile()


def compile_train_step(
    train_step: Callable,
    plan: StatePlan,
    mesh: Mesh,
    batches: Sequence[Mapping[str, Any]],
    *,
    progress: Callable[[str], None] = lambda what: None,
    make: Callable[[jax.stages.Lowered], Callable] = compiled,
) -> Callable:
    """Compiles the step for every batch that will come.

    Args:
        train_step, plan, mesh: see `lower_train_step`.
        batches: shapes and dtypes of every batch that will come, one for each bucket. All are
            compiled now, so that no step of the run waits for the compiler.
        progress: is told what is compiled next.
        make: compiles a lowered step, or finds what it was compiled to before.

    Returns:
        (state, batch) -> (state, metrics); refuses a batch of another shape.
    """
    steps = {}
    for batch in batches:
        shape = batch["latent"].shape
        progress(f"compiling the step for latents {shape}")
        start = time.monotonic()
        lowered = lower_train_step(train_step, plan, mesh, batch)
        with jax.set_mesh(mesh):
            steps[shape] = make(lowered)
        seconds = time.monotonic() - start
        logging.info("compiled the step for latents %s in %.1f s", shape, seconds)
    logging.info("%d compiled steps for %d shapes of batches", len(steps), len(batches))

    def step(state: TrainState, batch: Mapping[str, Any]):
        return steps[batch["latent"].shape](state, batch)

    return step
