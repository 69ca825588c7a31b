"""Settings that go together, as the files in configs/ apply them."""

from ml_collections import ConfigDict

from mmdit_jax import config as config_lib


def pixel_factor(resolution: int) -> int:
    """Space-to-depth factor of the `pixels` latents: at most 8, 16 or more positions an axis."""
    return max(f for f in (1, 2, 4, 8) if f == 1 or resolution // f >= 16)


def use_builtin_encoders(config: config_lib.Config, *, text_length: int) -> None:
    """Expects the latents and text of a data set that was built without any published weights.

    That is `data_pipelines.build` with its defaults: `pixels` latents (space-to-depth) and the
    small text encoders with fixed random weights.
    """
    factor = pixel_factor(config.data.resolution)
    config.data.update(factor=factor, kind="pixels")
    config.data.text_encoders = ConfigDict(
        {
            "clip_l": config_lib.text_encoder(text_length, 64, 64),
            "clip_g": config_lib.text_encoder(text_length, 64, 64),
            "t5": config_lib.text_encoder(text_length, 128, 0),
        }
    )
    config.model.update(channels=3 * factor**2, context_width=128)


def on_a_laptop(config: config_lib.Config) -> None:
    """Sets what trains a depth-2 model on small pictures in minutes on two CPU cores."""
    config.steps = 1400
    config.batch_size = 32
    config.data.update(dropout=0.0, dropout_all=0.1, threads=2)
    # What a picture shows is decided at high noise: pixels of one flat colour tell the same.
    config.flow.shift = 1.8
    config.optimizer.update(
        name="muon",
        learning_rate=3e-3,
        muon_learning_rate=0.04,
        b2=0.99,
        eps=1e-8,
        warmup=50,
        schedule="linear",
    )
    config.ema.update(decay=0.995, every=1)
    config.checkpoint.every = 500
    config.evaluation.update(every=1000, samples=256, batch_size=128)
    config.samples.update(every=1000, steps=20, cfg=4.0, shift=1.8)
    config.log.every = 50


def two_steps(config: config_lib.Config) -> None:
    """Shrinks any config to two steps on a laptop: the `tiny` argument of the config files."""
    config.model.depth = min(config.model.depth, 2)
    config.steps, config.batch_size = 2, 8
    config.optimizer.warmup = 1
    config.checkpoint.every = config.log.every = 1
    config.evaluation.update(every=2, samples=8, batch_size=8)
    config.samples.update(every=2, steps=2)
