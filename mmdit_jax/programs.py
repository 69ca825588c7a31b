"""The programs of a run, lowered for any mesh: training, sampling, encoding.

Nothing is allocated and no device is needed: the mesh may be that of a topology which is not here.
"""

from collections.abc import Callable, Iterator
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from mmdit_jax import config as config_lib
from mmdit_jax import run, sharding
from mmdit_jax.data import fields
from mmdit_jax.encoders import autoencoder, clip, t5, vae
from mmdit_jax.evaluation.sampling import Sampler
from mmdit_jax.scaling import flops
from mmdit_jax.training import state as state_lib
from mmdit_jax.training.step import lower_train_step

# The frozen networks of SD3, as their config.json files say (paper, B.1).
SD3_VAE = vae.VAEConfig(
    channels=(128, 256, 512, 512),
    layers=2,
    latent_channels=16,
    quant_conv=False,
    post_quant_conv=False,
    scale=1.5305,
    shift=0.0609,
)
SD3_TEXT = {
    "clip_l": clip.CLIPTextConfig(49408, 768, 3072, 12, 12, 77, "quick_gelu", 49407, 768),
    "clip_g": clip.CLIPTextConfig(49408, 1280, 5120, 32, 20, 77, "gelu", 49407, 1280),
    "t5": t5.T5Config(32128, 4096, 10240, 24, 64, 64),
}


def train(parts: run.Parts, mesh: Mesh) -> jax.stages.Lowered:
    """The training step as `mmdit_jax.train` compiles it; of several buckets that of the first."""
    return next(train_buckets(parts, mesh))


def train_buckets(parts: run.Parts, mesh: Mesh) -> Iterator[jax.stages.Lowered]:
    """The training step of every bucket.

    The data set, where the config names one, says how latents are normalised and what batches look
    like; else that is a batch of squares as SD3's autoencoder and text in float16 make it.
    """
    config = parts.config
    run.check_batch(config, mesh)
    optimizer, plan = run.plan(parts, mesh)
    batches, latents = [planned_batch(config, config.batch_size)], _planned_autoencoder(config)
    if config.data.path:
        loader = run.make_loader(config, "train")
        batches = [loader.abstract_batch(bucket) for bucket in loader.filled_buckets()]
        latents = loader.manifest.autoencoder
    step = run.make_step(parts, optimizer, latents)
    for batch in batches:
        yield lower_train_step(step, plan, mesh, batch)


def sample(parts: run.Parts, mesh: Mesh) -> jax.stages.Lowered:
    """All steps of the solver with guidance, on `batch_size` prompts that have been encoded."""
    config = parts.config
    run.check_batch(config, mesh)
    side = config_lib.latent_side(config)
    sampler = Sampler(
        predict=parts.predict,
        assemble=parts.conditioning.assemble,
        encode=_is_not_called,
        decode=_is_not_called,
        formulation=parts.formulation,
        latent_shape=(side, side, config.model.channels),
        mesh=mesh,
        settings=run.sample_settings(config),
        batch_size=config.batch_size,
    )
    boxed = state_lib.abstract_params(config)
    params = _placed(nn.meta.unbox(boxed), sharding.parameter_shardings(boxed, mesh))
    # The encoders give float32, whatever a data set stores.
    text = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(
            x.shape, jnp.float32, sharding=sharding.batch_sharding(mesh)
        ),
        planned_batch(config, config.batch_size)["text"],
    )
    return sampler.lower(params, text)


def encode(parts: run.Parts, mesh: Mesh) -> jax.stages.Lowered:
    """SD3's autoencoder and its three text encoders on `batch_size` pictures with a caption each.

    The data pipeline calls the four one by one and gives the autoencoder fewer pictures at once;
    here they are one program. Text in bfloat16, the autoencoder in float32.
    """
    config = parts.config
    run.check_batch(config, mesh)
    place = sharding.batch_sharding(mesh)
    batch, side = config.batch_size, config.data.resolution
    network = vae.AutoencoderKL(SD3_VAE)
    modules = {
        name: (t5.T5Encoder if name == "t5" else clip.CLIPTextEncoder)(sizes, jnp.bfloat16)
        for name, sizes in SD3_TEXT.items()
    }

    def frozen(abstract: Any, dtype: Any) -> Any:
        shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, dtype), abstract)
        return _placed(shapes, sharding.frozen_shardings(shapes, mesh))

    params = {
        name: frozen((t5 if name == "t5" else clip).abstract_params(module), jnp.bfloat16)
        for name, module in modules.items()
    }
    params["autoencoder"] = frozen(vae.abstract_params(network), jnp.float32)
    ids = {
        name: jax.ShapeDtypeStruct(
            (batch, config.data.text_encoders[name].length), jnp.int32, sharding=place
        )
        for name in modules
    }
    pictures = jax.ShapeDtypeStruct((batch, side, side, 3), jnp.uint8, sharding=place)

    def encode_batch(params: Any, pictures_BHWC: jax.Array, ids: Any):
        texts = {
            name: module.apply({"params": params[name]}, ids[name])
            for name, module in modules.items()
        }
        return autoencoder.encode_moments(network, params["autoencoder"], pictures_BHWC), texts

    with jax.set_mesh(mesh):
        return jax.jit(encode_batch, out_shardings=place).lower(params, pictures, ids)


def encode_flops(config: config_lib.Config) -> int:
    """Of encoding one picture and its caption with the networks of SD3."""
    network, side = SD3_VAE, config.data.resolution
    total = flops.vae_encode(
        channels=network.channels,
        layers=network.layers,
        latent_channels=network.latent_channels,
        height=side,
        width=side,
        quant_conv=network.quant_conv,
        mid_attention=network.mid_attention,
    )
    for name, sizes in SD3_TEXT.items():
        settings = {
            "layers": sizes.layers,
            "width": sizes.width,
            "mlp_width": sizes.mlp_width,
            "tokens": config.data.text_encoders[name].length,
        }
        if isinstance(sizes, t5.T5Config):
            total += flops.t5_forward(heads=sizes.heads, head_width=sizes.head_width, **settings)
        else:
            total += flops.clip_text_forward(projection=sizes.projection_dim or 0, **settings)
    return total


PROGRAMS: dict[str, Callable[[run.Parts, Mesh], jax.stages.Lowered]] = {
    "train": train,
    "sample": sample,
    "encode": encode,
}


def planned_batch(config: config_lib.Config, samples: int) -> dict[str, Any]:
    """A batch of squares of a data set that was built as the config expects."""
    side = config_lib.latent_side(config)
    layout = fields.planned_layout(
        (side, side, config.model.channels),
        config.data.kind,
        config.data.text_encoders,
        config.data.text_storage,
    )
    return fields.abstract(layout, samples)


def _planned_autoencoder(config: config_lib.Config) -> dict[str, Any]:
    return autoencoder.describe_architecture(SD3_VAE) | {
        "kind": config.data.kind,
        "factor": config.data.factor,
        "channels": config.model.channels,
    }


def _placed(shapes: Any, shardings: Any) -> Any:
    return jax.tree.map(
        lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), shapes, shardings
    )


def _is_not_called(*_: Any) -> Any:
    raise AssertionError("lowering the solver encodes and decodes nothing")
