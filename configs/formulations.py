"""The 61 formulations of the paper's study (Sec. 5.1), by its names; settings of App. B.3.

    python -m mmdit_jax.train --config="configs/formulations.py:variant=rf/lognorm(0.00, 1.00)" \\
        --workdir=runs/lognorm --config.data.path=data/mine
    python -m mmdit_jax.sweep --config=configs/formulations.py --workdir=runs/study \\
        --config.data.path=data/mine

| family         | variants | name                                                           |
|----------------|----------|----------------------------------------------------------------|
| LDM-linear, VP | 2        | eps/linear, v/linear                                           |
| cosine         | 2        | eps/cos, v/cos                                                 |
| rf, mode       | 9        | rf/mode(s), s from -1 to 1.75 in seven steps, and 1; s = 0: rf |
| rf, lognormal  | 30       | rf/lognorm(m, s), m of five from -1 to 1, s of six from 0.2    |
| rf, CosMap     | 1        | rf/cosmap                                                      |
| EDM            | 15       | edm(Pm, Ps), Pm of five from -1.2 to 1.2, s of 0.6, 1.2, 1.8   |
| EDM, schedules | 2        | edm/rf, edm/cos                                                |

Each is the plain mean square error of what its network predicts; t is uniform except on rf.

What the paper leaves open, and how to set the other reading:

- edm/rf, edm/cos are "EDM with a schedule such that it matches the log-SNR weighting" of rf and of
  v/cos. Taken here as the schedule alone: b = t/(1-t) and b = tan(pi t/2), F prediction, unit loss.
  Reweighted to that of rf: --config.flow.weight="exp_minus_half_logsnr".
- linear is Stable Diffusion's schedule of 1,000 betas (0.00085 to 0.012), made continuous in t.
- "Euler" of the EDM variants is taken as Euler in b (Karras et al. 2022), which is the solver ddim;
  on rf the two are the same. In t it goes astray: db/dt has no bound at the end of the path.
- Depth, resolution and steps of the study are not given: 24 and 256 px, 500k steps as in Fig. 4.

Arguments:

    variant=rf/lognorm(0.00, 1.00)   a name of `VARIANTS`
    depth=24 resolution=256 text_length=77
    shapes                           the quick start's data and sizes (configs/shapes.py), any depth
    tiny                             two steps, for tests
"""

from mmdit_jax import config as config_lib
from mmdit_jax import presets


def _variants() -> dict[str, dict[str, str]]:
    """Name -> what it sets in `config.flow`."""

    def flow(path: str, prediction: str, timesteps: str = "uniform") -> dict[str, str]:
        return {"path": path, "prediction": prediction, "timesteps": timesteps}

    found = {
        "eps/linear": flow("ldm_linear", "eps"),
        "v/linear": flow("ldm_linear", "v"),
        "eps/cos": flow("cosine", "eps"),
        "v/cos": flow("cosine", "v"),
        "rf": flow("rf", "velocity"),  # = rf/mode(0.00)
    }
    for s in (*(round(-1 + 2.75 * k / 6, 6) for k in range(7)), 1.0):
        found[f"rf/mode({s:.2f})"] = flow("rf", "velocity", f"mode({s})")
    for m in (-1.0, -0.5, 0.0, 0.5, 1.0):
        for s in (0.2, 0.6, 1.0, 1.4, 1.8, 2.2):
            found[f"rf/lognorm({m:.2f}, {s:.2f})"] = flow(
                "rf", "velocity", f"logit_normal({m}, {s})"
            )
    found["rf/cosmap"] = flow("rf", "velocity", "cosmap")
    for mean in (-1.2, -0.6, 0.0, 0.6, 1.2):
        for deviation in (0.6, 1.2, 1.8):
            found[f"edm({mean:.2f}, {deviation:.2f})"] = flow(f"edm({mean}, {deviation})", "F")
    found["edm/rf"] = flow("edm_rf", "F")
    found["edm/cos"] = flow("edm_cos", "F")
    return found


VARIANTS = _variants()
SWEEPS = {"all": (f"variant={','.join(VARIANTS)}",)}  # of mmdit_jax.sweep


def get_config(argument: str = ""):
    """Builds the config of one variant from `variant=rf/cosmap,depth=24,...`."""
    chosen = config_lib.parse_argument(
        argument,
        variant="rf/lognorm(0.00, 1.00)",
        depth=24,
        resolution=256,
        text_length=77,
        shapes=False,
        tiny=False,
    )
    if chosen.variant not in VARIANTS:
        raise ValueError(
            f"variant={chosen.variant!r} is none of the {len(VARIANTS)}: {', '.join(VARIANTS)}"
        )
    if chosen.shapes:
        chosen.resolution, chosen.text_length = 16, 12
    config = config_lib.default(
        depth=chosen.depth, resolution=chosen.resolution, text_length=chosen.text_length
    )
    config.batch_size = 1024
    config.evaluation.grid = "midpoints" if chosen.shapes else "paper"
    if chosen.shapes or chosen.tiny:
        presets.use_builtin_encoders(config, text_length=chosen.text_length)
    if chosen.shapes:
        presets.on_a_laptop(config)
        config.flow.shift = config.samples.shift = 1.0  # the law of t is what is compared
    if chosen.tiny:
        presets.two_steps(config)
    config.flow.update(VARIANTS[chosen.variant])
    if config.flow.path.startswith("edm"):
        config.samples.solver = "ddim"
    return config
