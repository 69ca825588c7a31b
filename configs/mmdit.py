"""MM-DiT of the SD3 paper on pre-encoded latents and text.

    python -m mmdit_jax.train --config=configs/mmdit.py:depth=24,resolution=256 \\
        --workdir=runs/d24 --config.data.path=data/mine

The settings are those of the scaling study (Sec. 5.3: batch 4096, 500k steps, 256 px) with the
optimizer of App. B.3, where the paper states them. Arguments:

    depth=24          d: width 64 d, d heads, d blocks
    resolution=256    pixels an axis
    text_length=77    tokens of each text encoder
    tiny              two steps on a laptop: depth 2, batch 8, on the output of
                      `data_pipelines.build --autoencoder=pixels` with its built-in encoders
"""

from mmdit_jax import config as config_lib
from mmdit_jax import presets


def get_config(argument: str = ""):
    """Builds the config from `depth=24,resolution=256,...`."""
    chosen = config_lib.parse_argument(
        argument, depth=24, resolution=256, text_length=77, tiny=False
    )
    config = config_lib.default(
        depth=chosen.depth, resolution=chosen.resolution, text_length=chosen.text_length
    )
    # Theory says sqrt(pixels / 256^2); 3.0 at 1024 px was preferred by people (5.3.2).
    if chosen.resolution >= 1024:
        config.flow.shift = config.samples.shift = 3.0
    if chosen.tiny:
        presets.use_builtin_encoders(config, text_length=chosen.text_length)
        presets.two_steps(config)
    return config
