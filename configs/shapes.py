"""The quick start: a small MM-DiT on the built-in captioned shapes, minutes on two CPU cores.

    python -m data_pipelines.build --source=shapes --output=data/shapes --resolution=32 \\
        --count=16000 --text_length=12
    python -m mmdit_jax.train --config=configs/shapes.py --workdir=runs/shapes \\
        --config.data.path=data/shapes

Arguments:

    depth=2           d: width 64 d, d heads, d blocks
    resolution=32     pixels an axis
    text_length=12    tokens of each text encoder
    tiny              two steps of batch 8, for tests
"""

from mmdit_jax import config as config_lib

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
    chosen = config_lib.parse_argument(
        argument, depth=2, resolution=32, text_length=12, tiny=False
    )
    config = config_lib.default(
        depth=chosen.depth, resolution=chosen.resolution, text_length=chosen.text_length
    )
    config_lib.use_builtin_encoders(config, text_length=chosen.text_length)
    config.steps = 1500
    config.batch_size = 64
    config.data.dropout = 0.2
    config.optimizer.name = "muon"
    config.optimizer.learning_rate = 1e-3
    config.optimizer.b2 = 0.99
    config.optimizer.eps = 1e-8
    config.optimizer.warmup = 50
    config.optimizer.schedule = "linear"
    config.ema.update(decay=0.995, every=1)
    config.checkpoint.every = 500
    config.evaluation.update(every=500, samples=256, batch_size=128)
    config.samples.update(every=500, steps=20, cfg=3.0, prompts=PROMPTS)
    config.log.every = 50
    if chosen.tiny:
        config.steps, config.batch_size = 2, 8
        config.optimizer.warmup = 1
        config.evaluation.update(every=2, samples=8)
        config.samples.update(every=2, steps=2)
        config.log.every = 1
    return config
