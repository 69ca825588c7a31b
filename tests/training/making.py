"""The smallest config and batches of the training step."""

import numpy as np

from mmdit_jax import config as config_lib

AUTOENCODER = {"kind": "moments", "shift": 0.1, "scale": 1.5}


def tiny_config(**changes):
    config = config_lib.default(depth=2, resolution=32, text_length=3)
    config.steps, config.batch_size = 10, 16
    config.data.text_encoders.clip_l.update(width=8, pooled_width=8)
    config.data.text_encoders.clip_g.update(width=8, pooled_width=8)
    config.data.text_encoders.t5.update(width=24)
    config.model.update(channels=4, context_width=24)
    config.optimizer.update(learning_rate=1e-3, warmup=0, eps=1e-8)
    config.ema.update(decay=0.9, every=1)
    config.update_from_flattened_dict(changes)
    return config


def batch(size=16, seed=0):
    rng = np.random.default_rng(seed)

    def normal(*shape):
        return rng.normal(size=shape).astype(np.float16)

    return {
        "latent": normal(size, 4, 4, 8),
        "text": {
            "clip_l": {"sequence": normal(size, 3, 8), "pooled": normal(size, 8)},
            "clip_g": {"sequence": normal(size, 3, 8), "pooled": normal(size, 8)},
            "t5": {"sequence": normal(size, 3, 24)},
        },
    }


def damaged_batch(seed=0):
    """A batch whose last five samples hold something that is not finite, each something else."""
    made = batch(seed=seed)
    made["latent"][11, 0, 3, 1] = np.nan
    made["latent"][12, 3, 0, 2] = -np.inf
    made["latent"][13, 1, 2, 7] = np.inf  # a log-variance, which would be clipped
    made["text"]["t5"]["sequence"][14, 2, 5] = np.nan
    made["text"]["clip_l"]["pooled"][15, 3] = -np.inf
    return made
