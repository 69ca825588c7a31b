"""The quick start: a small MM-DiT on the built-in captioned shapes, minutes on two CPU cores.

    python -m data_pipelines.build --source=shapes --output=data/shapes --resolution=16 \\
        --count=16000 --text_length=12 --synthetic_fraction=0.3
    python -m mmdit_jax.train --config=configs/shapes.py --workdir=runs/shapes \\
        --config.data.path=data/shapes

Arguments:

    depth=2           d: width 64 d, d heads, d blocks
    resolution=16     pixels an axis
    text_length=12    tokens of each text encoder
    tiny              two steps of batch 8, for tests
"""

from mmdit_jax import config as config_lib
from mmdit_jax import presets

PROMPTS = (
    "a red circle",
    "a large blue square",
    "a small yellow triangle",
    "three green triangles",
    "two purple circles",
    "a red circle left of a blue square",
    "a yellow triangle above a cyan circle",
    "a green square and a purple triangle",
)


def get_config(argument: str = ""):
    """Builds the config from `depth=2,resolution=32,...`."""
    chosen = config_lib.parse_argument(argument, depth=2, resolution=16, text_length=12, tiny=False)
    config = config_lib.default(
        depth=chosen.depth, resolution=chosen.resolution, text_length=chosen.text_length
    )
    presets.use_builtin_encoders(config, text_length=chosen.text_length)
    presets.on_a_laptop(config)
    config.samples.prompts = PROMPTS
    if chosen.tiny:
        presets.two_steps(config)
    return config
