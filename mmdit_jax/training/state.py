"""The training state and how it is made: on the mesh from the start, never whole on one device."""

from typing import Any, NamedTuple

import flax
import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from mmdit_jax import config as config_lib
from mmdit_jax import sharding
from mmdit_jax.config import Config
from mmdit_jax.models import BACKBONES
from mmdit_jax.models.backbone import REMAT_POLICIES
from mmdit_jax.models.layers import FIXED
from mmdit_jax.models.product import load_qwix
from mmdit_jax.training import guard as guard_lib
from mmdit_jax.training.guard import Guard


@flax.struct.dataclass
class TrainState:
    """Everything that a checkpoint holds; all float32 but the counters.

    Attributes:
        step: finished steps, int32.
        params: the model.
        ema_params: their moving average, or None when `ema.decay` is 0.
        opt_state: of the optimizer.
        guard: counts faults and remembers the last accepted steps.
    """

    step: jax.Array
    params: Any
    ema_params: Any
    opt_state: Any
    guard: Guard


class Purpose:
    """What a random number is for: folded into the key after the step, one number each."""

    LATENT = 0
    TIMESTEP = 1
    NOISE = 2
    TEXT_DROPOUT = 3
    INIT = 4
    POSITION = 5


def purpose_key(seed: jax.Array | int, step: jax.Array | int, purpose: int) -> jax.Array:
    """The one rule for randomness: fold_in(fold_in(key(seed), step), purpose)."""
    return jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), step), purpose)


def compute_dtype(config: Config) -> Any:
    """bfloat16 on accelerators and float32 on CPU, unless the config names one."""
    if config.model.dtype == "auto":
        return jnp.float32 if jax.default_backend() == "cpu" else jnp.bfloat16
    return jnp.dtype(config.model.dtype)


def build_model(config: Config) -> nn.Module:
    """The backbone that the config names.

    Raises:
        ValueError: an unknown backbone or remat policy, or no qwix to quantise with.
    """
    for what, name, known in (
        ("model.backbone", config.model.backbone, BACKBONES),
        ("model.remat", config.model.remat, REMAT_POLICIES),
    ):
        if name not in known:
            raise ValueError(f"{what}={name!r} is unknown; known are {', '.join(known)}")
    if config.model.quantization != "none":
        load_qwix()
    return BACKBONES[config.model.backbone](
        **config_lib.model_settings(config), dtype=compute_dtype(config)
    )


def abstract_params(config: Config) -> Any:
    """Shapes of the parameters, boxed with their logical axis names; allocates nothing."""
    side = config_lib.latent_side(config)
    inputs = (
        jax.ShapeDtypeStruct((1, side, side, config.model.channels), jnp.float32),
        jax.ShapeDtypeStruct((1,), jnp.float32),
        jax.ShapeDtypeStruct(
            (1, config_lib.text_tokens(config), config.model.context_width), jnp.float32
        ),
        jax.ShapeDtypeStruct((1, config_lib.pooled_width(config)), jnp.float32),
    )
    return jax.eval_shape(build_model(config).init, jax.random.key(0), *inputs)["params"]


class StatePlan(NamedTuple):
    """Shapes and placement of a training state, before anything is allocated."""

    abstract: TrainState
    shardings: TrainState
    boxed_params: Any


def plan_state(config: Config, optimizer: optax.GradientTransformation, mesh: Mesh):
    """Shapes of the whole state and where on the mesh each of its arrays lies.

    Raises:
        ValueError: the mesh does not suit the model (see `sharding.parameter_shardings`).
    """
    boxed = abstract_params(config)
    params = nn.meta.unbox(boxed)
    abstract = TrainState(
        step=jax.ShapeDtypeStruct((), jnp.int32),
        params=params,
        ema_params=params if config.ema.decay > 0 else None,
        opt_state=jax.eval_shape(optimizer.init, params),
        guard=jax.eval_shape(lambda: guard_lib.fresh(config.faults.spike_window)),
    )
    placed = sharding.parameter_shardings(boxed, mesh)
    shardings = sharding.state_shardings(abstract, placed, mesh)
    return StatePlan(abstract, shardings, boxed)


def init_state(
    config: Config, optimizer: optax.GradientTransformation, plan: StatePlan
) -> TrainState:
    """A fresh state, each array made on the devices that hold it."""
    model = build_model(config)
    side = config_lib.latent_side(config)

    def init(seed: jax.Array) -> TrainState:
        key = purpose_key(seed, 0, Purpose.INIT)
        inputs = (
            jnp.zeros((1, side, side, config.model.channels)),
            jnp.zeros((1,)),
            jnp.zeros((1, config_lib.text_tokens(config), config.model.context_width)),
            jnp.zeros((1, config_lib.pooled_width(config))),
        )
        params = nn.meta.unbox(model.init(key, *inputs)["params"])
        return TrainState(
            step=jnp.zeros((), jnp.int32),
            params=params,
            ema_params=jax.tree.map(jnp.copy, params) if config.ema.decay > 0 else None,
            opt_state=optimizer.init(params),
            guard=guard_lib.fresh(config.faults.spike_window),
        )

    return jax.jit(init, out_shardings=plan.shardings)(config.seed)


def count_parameters(tree: Any) -> int:
    """Number of elements of a tree of arrays or shapes, without those of `layers.FIXED`."""
    leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
    return sum(
        leaf.size for path, leaf in leaves if sharding.path_name(path).split("/")[0] not in FIXED
    )
