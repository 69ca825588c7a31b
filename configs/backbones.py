"""The five backbones of Fig. 4 of the paper (Sec. 5.2.3); settings of its study (App. B.3).

    python -m mmdit_jax.train --config=configs/backbones.py:backbone=crossdit \\
        --workdir=runs/crossdit --config.data.path=data/mine

| backbone | text and image tokens                                                                |
|----------|--------------------------------------------------------------------------------------|
| mmdit    | two sets of weights, text and image, joined in attention: what the paper goes on with |
| mmdit3   | three sets of weights: CLIP, T5, image                                               |
| dit      | one set of weights, tokens concatenated                                              |
| crossdit | image tokens alone, text in cross-attention                                          |
| uvit     | one set of weights, tokens concatenated, long skips over the blocks                  |

All with the same depth, so they have not the same number of parameters or FLOPs (docs/backbones.md,
which also says how the paper was read). The depth of Fig. 4 is not given; nor is the formulation,
which is taken as rf/lognorm(0.00, 1.00). Arguments:

    backbone=mmdit    a name of the table
    depth=24 resolution=256 text_length=77
    shapes            the quick start's data and sizes (configs/shapes.py), any depth
    tiny              two steps, for tests
"""

from mmdit_jax import config as config_lib
from mmdit_jax import presets

BACKBONES = ("mmdit", "mmdit3", "dit", "crossdit", "uvit")
SWEEPS = {"all": (f"backbone={','.join(BACKBONES)}",)}  # of mmdit_jax.sweep


def get_config(argument: str = ""):
    """Builds the config of one backbone from `backbone=uvit,depth=24,...`."""
    chosen = config_lib.parse_argument(
        argument,
        backbone="mmdit",
        depth=24,
        resolution=256,
        text_length=77,
        shapes=False,
        tiny=False,
    )
    if chosen.shapes:
        chosen.resolution, chosen.text_length = 16, 12
    config = config_lib.default(
        depth=chosen.depth, resolution=chosen.resolution, text_length=chosen.text_length
    )
    config.batch_size = 1024
    config.evaluation.grid = "midpoints" if chosen.shapes else "paper"
    config.model.backbone = chosen.backbone
    if chosen.shapes or chosen.tiny:
        presets.use_builtin_encoders(config, text_length=chosen.text_length)
    if chosen.shapes:
        presets.on_a_laptop(config)
    if chosen.tiny:
        presets.two_steps(config)
    return config
