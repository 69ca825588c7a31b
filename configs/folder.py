"""A small MM-DiT on a folder of your own captioned pictures, without any published weights.

    python -m data_pipelines.build --source=folder:PICTURES --output=data/mine --resolution=32 \\
        --text_length=16
    python -m mmdit_jax.train --config=configs/folder.py:resolution=32,text_length=16 \\
        --workdir=runs/mine --config.data.path=data/mine

The latents are the pixels (space-to-depth) and the text encoders have fixed random weights, so this
shows the whole path and learns what the captions of this folder say, nothing more. Arguments:

    depth=2           d: width 64 d, d heads, d blocks
    resolution=32     pixels an axis
    text_length=16    tokens of each text encoder
    tiny              two steps of batch 8, for tests
"""

from mmdit_jax import config as config_lib
from mmdit_jax import presets


def get_config(argument: str = ""):
    """Builds the config from `depth=2,resolution=32,...`."""
    chosen = config_lib.parse_argument(argument, depth=2, resolution=32, text_length=16, tiny=False)
    config = config_lib.default(
        depth=chosen.depth, resolution=chosen.resolution, text_length=chosen.text_length
    )
    presets.use_builtin_encoders(config, text_length=chosen.text_length)
    presets.on_a_laptop(config)
    if chosen.tiny:
        presets.two_steps(config)
    return config
