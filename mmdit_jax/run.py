"""The parts of one run, put together once for every command: model, mathematics, text, data.

The rooms do not know each other (the network is a function to `flow`, training knows no encoders
and no evaluators). This is where they meet.
"""

import functools
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import optax
from jax.sharding import AbstractMesh, Mesh

from mmdit_jax import config as config_lib
from mmdit_jax import sharding
from mmdit_jax.config import Config
from mmdit_jax.data import buckets
from mmdit_jax.data.loader import Loader
from mmdit_jax.data.manifest import Bucket, Manifest
from mmdit_jax.encoders import autoencoder as autoencoder_lib
from mmdit_jax.encoders import pixels
from mmdit_jax.encoders.conditioning import assemble, drop_mask, finite
from mmdit_jax.encoders.text import encode, load_text_encoders, require_recorded
from mmdit_jax.evaluation.sampling import Sampler, SampleSettings
from mmdit_jax.evaluation.validation import Validation, level_count
from mmdit_jax.flow import formulation as formulation_lib
from mmdit_jax.flow.formulation import Formulation
from mmdit_jax.training import optimizer as optimizer_lib
from mmdit_jax.training import state as state_lib
from mmdit_jax.training.step import Conditioning, Predict, make_predict, make_train_step


class Parts(NamedTuple):
    """What follows from a config alone."""

    config: Config
    model: nn.Module
    formulation: Formulation
    predict: Predict
    conditioning: Conditioning


def build(config: Config) -> Parts:
    """Checks a config and makes everything that it names.

    Raises:
        ValueError: what is wrong with the config.
    """
    config_lib.validate(config)
    level_count(config.evaluation.grid, config.evaluation.levels)
    model = state_lib.build_model(config)
    formulation = formulation_lib.make(**config.flow)
    names, context_width = tuple(config.data.text_encoders), config.model.context_width
    return Parts(
        config=config,
        model=model,
        formulation=formulation,
        predict=make_predict(model, formulation),
        conditioning=Conditioning(
            assemble=lambda text, keep: assemble(text, context_width, keep),
            drop_mask=lambda key, batch: drop_mask(
                key, batch, config.data.dropout, names, together=config.data.dropout_all
            ),
            finite=finite,
        ),
    )


def expected_data(config: Config) -> dict[str, Any]:
    """What a data set must be, for `Manifest` to fit the config."""
    return {
        "resolution": config.data.resolution,
        "autoencoder": {
            "factor": config.data.factor,
            "channels": config.model.channels,
            "kind": config.data.kind,
        },
        "text_encoders": {
            # T5 has no pooled output, and its entry does not speak of one.
            name: {key: value for key, value in encoder.items() if value}
            for name, encoder in config.data.text_encoders.items()
        },
        "text_storage": config.data.text_storage,
    }


def make_mesh(config: Config) -> Mesh:
    """The config's mesh over all devices of the job; refuses a batch that it does not divide."""
    mesh = sharding.make_mesh(**config.mesh)
    check_batch(config, mesh)
    return mesh


def check_batch(config: Config, mesh: Mesh | AbstractMesh) -> None:
    """Refuses a batch size, or a multiple of it for buckets, that the mesh does not divide."""
    sharding.check_batch(mesh, config.batch_size, config.optimizer.accumulate)
    multiple = config.data.batch_multiple
    ways = sharding.batch_ways(mesh) * config.optimizer.accumulate
    if multiple % ways:
        raise ValueError(
            f"data.batch_multiple={multiple} does not split into {ways} parts (data x fsdp x "
            f"accumulate); use a multiple of {ways} that divides batch_size={config.batch_size}"
        )


def batch_size_of(config: Config, bucket: Bucket) -> int:
    """Samples in a training batch of a bucket: its tokens are those of `batch_size` squares.

    It follows from the config alone, so that the order of samples is the same on any mesh.

    Raises:
        ValueError: a picture size that the model cannot take, or of too many tokens.
    """
    check_size(config, bucket)
    text = config_lib.text_tokens(config)
    return buckets.batch_size(
        config_lib.image_tokens(config, (bucket.height, bucket.width)) + text,
        config.batch_size * (config_lib.image_tokens(config) + text),
        config.data.batch_multiple or config.batch_size,
    )


def check_size(config: Config, size: Bucket) -> None:
    """Refuses a picture size that the config's model cannot take."""
    buckets.check_size(
        size,
        unit=config.data.factor,
        patch=config.model.patch,
        grid=config.model.pos_embed_max_size,
    )


def make_loader(
    config: Config, split: str, batch_size: int | None = None, manifest: Manifest | None = None
) -> Loader:
    """A loader of the config's data set; without a batch size, in the batches of training.

    `manifest` is the data set's, when it has been loaded already.

    Raises:
        ValueError: the data set does not fit the config, or there is none.
    """
    if not config.data.path:
        raise ValueError(
            "config.data.path is empty; give the output of data_pipelines.build, for example "
            "--config.data.path=data/shapes"
        )
    return Loader(
        config.data.path,
        split=split,
        batch_size=batch_size or functools.partial(batch_size_of, config),
        seed=config.seed,
        threads=config.data.threads,
        prefetch=config.data.prefetch,
        expected=expected_data(config),
        manifest=manifest,
    )


def make_validation(parts: Parts, loader: Loader, mesh: Mesh) -> Validation:
    """The validation loss as the config sets it."""
    settings = parts.config.evaluation
    return Validation(
        predict=parts.predict,
        assemble=parts.conditioning.assemble,
        formulation=parts.formulation,
        loader=loader,
        mesh=mesh,
        samples=settings.samples,
        levels=settings.levels,
        grid=settings.grid,
        batch_size=settings.batch_size,
    )


def make_text_encoder(
    config: Config, manifest: Manifest, folder: str = ""
) -> Callable[[Sequence[str]], Mapping[str, Any]]:
    """captions -> text outputs, by the encoders that the data set was made with.

    Args:
        config: of the run.
        manifest: of its data set.
        folder: where the encoders lie (clip_l/, clip_g/, t5/), when not where the manifest says.

    Raises:
        ValueError: an encoder that is not the one that the data set was made with.
    """
    folders, lengths = {}, {}
    for name, about in manifest.text_encoders.items():
        path = os.path.join(folder, name) if folder else str(about["path"])
        folders[name] = ",".join(
            part if os.path.isabs(part) or folder else os.path.join(config.data.path, part)
            for part in path.split(",")
        )
        lengths[name] = int(about["length"])
    encoders = load_text_encoders(folders, lengths, mesh=sharding.local_mesh())
    require_recorded(encoders, manifest.text_encoders)
    trimmed = config.data.text_storage == "trimmed"
    return functools.partial(encode, encoders, trimmed=trimmed)


def make_decoder(
    config: Config, manifest: Manifest, mesh: Mesh, folder: str = ""
) -> Callable[[jax.Array], jax.Array]:
    """Normalised latents -> uint8 pictures, by the autoencoder that the data set was made with.

    Args:
        config: of the run.
        manifest: of its data set.
        mesh: shares every batch.
        folder: of the VAE, when neither where the config nor where the manifest says.

    Raises:
        ValueError: no VAE is known, or another one than the data set was made with.
    """
    about, folder = manifest.autoencoder, folder or config.data.autoencoder
    if about["kind"] == pixels.KIND:
        if folder:
            raise ValueError(
                f"--autoencoder={folder} is given but the data set holds {about['id']}, which "
                "needs none; leave it out"
            )
        decode = functools.partial(pixels.decode, autoencoder=about)
        return jax.jit(decode, out_shardings=sharding.replicated(mesh))
    if not folder and not about.get("path"):
        raise ValueError(
            f"the data set does not say where its autoencoder {about.get('id', '')!r} is; give "
            "its folder with --autoencoder (in training --config.data.autoencoder)"
        )
    folder = folder or os.path.join(config.data.path, str(about["path"]))
    autoencoder = autoencoder_lib.VAE(folder, mesh=mesh)
    autoencoder_lib.require_recorded(autoencoder, about)
    return functools.partial(autoencoder.decode, autoencoder=about)


def sample_settings(config: Config) -> SampleSettings:
    """The config's sampling settings."""
    values = config.samples
    return SampleSettings(
        **{name: values[name] for name in SampleSettings._fields if name != "cfg_interval"},
        cfg_interval=tuple(values.cfg_interval),
    )


def make_sampler(
    parts: Parts,
    manifest: Manifest,
    mesh: Mesh,
    settings: SampleSettings,
    *,
    encoders: str = "",
    autoencoder: str = "",
    batch_size: int = 64,
) -> Sampler:
    """Prompts to pictures, squares of the training resolution where no other size is asked for.

    `encoders` and `autoencoder` are folders, when they are not where the data set says.
    """
    side = config_lib.latent_side(parts.config)
    return Sampler(
        predict=parts.predict,
        assemble=parts.conditioning.assemble,
        encode=make_text_encoder(parts.config, manifest, encoders),
        decode=make_decoder(parts.config, manifest, mesh, autoencoder),
        formulation=parts.formulation,
        latent_shape=(side, side, parts.config.model.channels),
        mesh=mesh,
        settings=settings,
        batch_size=batch_size,
    )


def latent_size(config: Config, size: str) -> tuple[int, int]:
    """Height and width of the latent of a picture whose size is written HEIGHTxWIDTH.

    Raises:
        ValueError: not written so, or a size that the model cannot take.
    """
    bucket = buckets.parse_size(size)
    check_size(config, bucket)
    return bucket.height // config.data.factor, bucket.width // config.data.factor


def plan(parts: Parts, mesh: Mesh) -> tuple[Any, state_lib.StatePlan]:
    """The optimizer and the placement of the whole training state."""
    optimizer = optimizer_lib.make_optimizer(parts.config)
    return optimizer, state_lib.plan_state(parts.config, optimizer, mesh)


def make_step(
    parts: Parts, optimizer: optax.GradientTransformation, autoencoder: Mapping[str, Any]
) -> Callable:
    """The training step of a run; `autoencoder` is the entry of its manifest."""
    return make_train_step(
        parts.config,
        model=parts.model,
        formulation=parts.formulation,
        optimizer=optimizer,
        conditioning=parts.conditioning,
        autoencoder=autoencoder,
    )


def device_names() -> str:
    """For logs: number, kind and platform of the devices."""
    devices = jax.devices()
    return f"{len(devices)} x {devices[0].device_kind} ({devices[0].platform})"
