"""The scaling study (Sec. 5.3): the loss of MM-DiT over depth, steps and compute.

    python -m mmdit_jax.sweep --config=configs/scaling.py --workdir=runs/scaling \\
        --config.data.path=data/mine --dry_run
    python -m mmdit_jax.sweep --config=configs/scaling.py:shapes --plan=shapes \\
        --workdir=runs/scaling --config.data.path=data/shapes

`SWEEPS` holds the plans; `--each=depth=12,15 --each=flops=1e19,1e20` makes another. Arguments:

    depth=24 resolution=256 text_length=77
    shapes            the quick start's data and sizes (configs/shapes.py), any depth
    tiny              two steps, for tests
"""

from mmdit_jax import config as config_lib
from mmdit_jax import presets

SWEEPS = {
    # Fig. 8: every depth on the same samples.
    "fixed_data": ("depth=15,18,21,30,38",),
    # Every depth on the same compute, as steps follow from it. Not in the paper: the budgets are of
    # a tenth, a third and the whole of d=15 there, at three forward passes a step.
    "isoflop": ("flops=1e20,3e20,9e20", "depth=12,15,18,21,24,30"),
    "shapes": ("depth=1,2,3,4,6",),
    "shapes_isoflop": ("flops=1e13,3e13,1e14", "depth=2,3,4,6"),
}


def get_config(argument: str = ""):
    """Builds the config of one run from `depth=24,resolution=256,...`."""
    chosen = config_lib.parse_argument(
        argument, depth=24, resolution=256, text_length=77, shapes=False, tiny=False
    )
    if chosen.shapes:
        chosen.resolution, chosen.text_length = 16, 12
    config = config_lib.default(
        depth=chosen.depth, resolution=chosen.resolution, text_length=chosen.text_length
    )
    config.evaluation.every = 50_000
    config.evaluation.grid = "midpoints" if chosen.shapes else "paper"
    if chosen.shapes or chosen.tiny:
        presets.use_builtin_encoders(config, text_length=chosen.text_length)
    if chosen.shapes:
        presets.on_a_laptop(config)
        config.evaluation.every = 200
    if chosen.tiny:
        presets.two_steps(config)
    return config
