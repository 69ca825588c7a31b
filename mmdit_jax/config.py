"""The configuration: every setting with its default, derived sizes, and one check of it all.

A config file has `get_config(argument)`, which reads arguments of the form
`depth=24,resolution=256,tiny` with `parse_argument` and returns a tree made by `default()`.
Everything else is set on the command line: `--config.batch_size=256`.
"""

import json
import re
from collections.abc import Callable
from typing import Any

from ml_collections import ConfigDict

from mmdit_jax import ranges

# An ml_collections.ConfigDict; its keys are dynamic, which no type checker can follow.
Config = Any

HEAD_SIZE = 64
SCHEDULES = ("constant", "linear", "cosine", "wsd")
OPTIMIZERS = ("adamw", "muon")
DTYPES = ("auto", "float32", "bfloat16")
REDUCE_DTYPES = ("float32", "bfloat16")
QUANTIZATIONS = ("none", "int8", "fp8")
ATTENTIONS = ("auto", "xla", "flash", "splash", "cudnn")
LAST_BLOCKS = ("auto", "scanned", "apart")
WEIGHTS = ("ema", "raw")
TEXT_STORAGES = ("full", "trimmed")
POSITIONS = ("computed", "computed_float16", "computed_bfloat16", "stored")


def parse_argument(argument: str | None, **defaults: Any) -> Config:
    """Reads `name=value,flag` into the types of the defaults.

    A comma between parentheses belongs to a value: `variant=rf/lognorm(0.00, 1.00)`.

    Raises:
        ValueError: a name that has no default, or a value of another type.
    """
    values = dict(defaults)
    for item in filter(None, re.split(r",(?![^(]*\))", argument or "")):
        name, has_value, text = item.partition("=")
        if name not in defaults:
            raise ValueError(
                f"config argument {name!r} is unknown; known are {', '.join(sorted(defaults))}"
            )
        kind = type(defaults[name])
        if kind is bool and not has_value:
            values[name] = True
        elif kind is bool and text.lower() in ("true", "false", "1", "0"):
            values[name] = text.lower() in ("true", "1")
        else:
            try:
                values[name] = kind(text)
            except ValueError:
                raise ValueError(
                    f"config argument {item!r}: {name} is a {kind.__name__}, "
                    f"for example {name}={defaults[name]}"
                ) from None
    return ConfigDict(values)


def text_encoder(length: int, width: int, pooled_width: int, id: str = "") -> dict[str, Any]:
    """What the data must have been encoded with; an empty id or hash accepts any."""
    return {
        "id": id,
        "hash": "",
        "length": length,
        "width": width,
        "pooled_width": pooled_width,
    }


def default(*, depth: int = 24, resolution: int = 256, text_length: int = 77) -> Config:
    """SD3 of `depth` at `resolution` px, with the settings of the paper where it states them."""
    return ConfigDict(
        {
            "seed": 0,
            "steps": 500_000,  # of the scaling study
            "batch_size": 4096,  # global, of square pictures
            "model": {
                "backbone": "mmdit",  # of Fig. 4: mmdit | mmdit3 | dit | crossdit | uvit
                "depth": depth,
                "channels": 16,
                "patch": 2,
                "context_width": 4096,
                "qk_norm": True,
                "dual_attention_layers": 0,
                "pos_embed_max_size": 192,
                "pos_embed_native": 0,  # patches an axis that reach from 0 to 16; 0: of resolution
                # Of that grid: computed (and rounded, as in released weights), or stored: a table
                # that came with the weights and is not trained.
                "pos_embed": "computed",
                "pos_embed_random_crop": False,  # of the grid, in training, per sample (SD3.5-M)
                "remat": "none",  # full | attention_out | offload | qkv_attention | dots | none
                "attention": "auto",  # by platform; xla | flash | splash | cudnn
                # Of MM-DiT, in training: scanned with the others (a third less to compile, 1 % more
                # to compute) or apart; auto: scanned on TPU.
                "last_block": "auto",
                "dtype": "auto",  # bfloat16 on accelerators, float32 on CPU
                # Of the products with weights inside of the blocks; int8 | fp8 need qwix.
                "quantization": "none",
            },
            "data": {
                "path": "",
                "resolution": resolution,
                # A batch of any bucket has the tokens of batch_size squares, at most, and is a
                # multiple of this; 0: of batch_size.
                "batch_multiple": 0,
                "factor": 8,  # pixels per latent pixel, an axis
                "kind": "moments",  # moments | mean | pixels
                "autoencoder": "",  # folder of the VAE that decodes; empty: where the data says
                "text_encoders": {
                    "clip_l": text_encoder(text_length, 768, 768),
                    "clip_g": text_encoder(text_length, 1280, 1280),
                    "t5": text_encoder(text_length, 4096, 0),
                },
                "text_storage": "full",  # trimmed: the padding of a caption is zeros, not states
                "dropout": 0.464,  # of each encoder, independently (B.3): 10 % unconditional
                "dropout_all": 0.0,  # of all encoders of a sample at once, besides
                "threads": 8,
                "prefetch": 4,  # batches
            },
            "flow": {
                "path": "rf",
                "prediction": "velocity",
                "timesteps": "logit_normal(0.0, 1.0)",
                "shift": 1.0,  # of the training timesteps; sampling has its own
                "weight": "plain",  # of the loss at t; plain: the mean square of the prediction
            },
            "optimizer": {
                "name": "adamw",
                "learning_rate": 1e-4,
                "warmup": 1000,  # steps
                "schedule": "constant",
                "decay_fraction": 0.2,  # wsd: share of the run that decays
                "final_fraction": 0.0,  # learning rate at the end / at the peak
                "b1": 0.9,
                "b2": 0.999,
                "eps": 1e-15,  # with bf16 and QK-norm (5.3.2)
                "weight_decay": 0.0,
                "clip_norm": 1.0,  # of the global gradient; 0 is off
                "muon_learning_rate": 0.02,
                "muon_momentum": 0.95,
                "accumulate": 1,  # micro-batches a step
                "reduce_dtype": "float32",  # of gradients when summed over devices; or bfloat16
            },
            "ema": {"decay": 0.99, "every": 100},  # B.3; decay 0 is off
            "mesh": {
                "data": -1,
                "fsdp": 1,
                "tensor": 1,
                "context": 1,
                "slices": 0,  # that the data axis crosses; 0: as many as the devices say
            },
            "checkpoint": {
                "every": 5000,  # steps
                "keep": 3,
                "max_failures": 10,  # saves in a row, then training ends
            },
            "faults": {
                "max_substituted": 1e-3,  # share of damaged records in what a process has read
                "max_skipped": 10,  # updates in a row that diverge; then the run ends
                "max_nonfinite_samples": 0.001,  # share of all samples; 16 are always allowed
                # Standard deviations above the mean of the last spike_window accepted steps, from
                # which a loss or a gradient norm is a spike, whose update is skipped; 0 is off.
                "spike_sigma": 0.0,
                "spike_window": 128,
                "replica_check_every": 0,  # steps; compares the copies of the state; 0 is off
                # A process in which nothing new begins for so long ends, with exit code 75. Must be
                # longer than any one compilation, restore, hook or save; 0 is off.
                "watchdog_s": 600.0,
            },
            "evaluation": {
                "every": 10_000,  # steps
                "samples": 4096,
                "levels": 8,
                "grid": "midpoints",  # of t: midpoints | paper | mlperf | stratified
                "batch_size": 256,
                "pictures": 0,  # sampled each time for FID and CLIP score; 0 is off
                "inception": "",  # file of FID's network, for fid (docs/evaluation.md)
                "clip": "",  # folder of a CLIP, for clip_fid and clip_score
            },
            "samples": sampling(),
            "log": {"every": 100, "attention_logits": False},
            "init_from": "",  # workdir of a run, or what `mmdit_jax.weights import` wrote
            # What may differ from that model; what is not allowed here is refused.
            "init_adapt": {
                "qk_norm": False,  # added to a model without
                "position_grid": False,  # another size or another native resolution
                "channels": False,  # more, the new ones zero
                "autoencoder": False,  # latents of another one, or of another scale or shift
            },
        }
    )


def sampling() -> dict[str, Any]:
    """How pictures are sampled, in training and as the defaults of the sample command."""
    return {
        "every": 10_000,  # steps between grids in training; 0 is off
        "sizes": (),  # a grid each, for example ("768x1344",), height first; empty: the square
        "prompts": (),  # empty: captions of the validation split
        "steps": 28,
        "solver": "euler",
        "grid": "exact",
        "shift": 1.0,
        "cfg": 5.0,
        "cfg_interval": (0.0, 1.0),
        "weights": "ema",
        "seed": 0,
    }


def width(config: Config) -> int:
    """D: 64 x depth."""
    return HEAD_SIZE * config.model.depth


def latent_side(config: Config) -> int:
    """Latent pixels an axis at the training resolution."""
    return config.data.resolution // config.data.factor


def native_patches(config: Config) -> int:
    """Patches an axis at the training resolution."""
    return latent_side(config) // config.model.patch


def position_native(config: Config) -> int:
    """Patches an axis at the resolution that the position grid is made for."""
    return config.model.pos_embed_native or native_patches(config)


def image_tokens(config: Config, size: tuple[int, int] | None = None) -> int:
    """I, for a picture of `size` (height, width) in pixels; None: of the training resolution."""
    height, width = size or (config.data.resolution, config.data.resolution)
    unit = config.data.factor * config.model.patch
    return (height // unit) * (width // unit)


def clip_tokens(config: Config) -> int:
    """Tokens of the CLIP encoders, which share them, by channels; they stand before those of T5."""
    encoders = config.data.text_encoders
    return max(encoders.clip_l.length, encoders.clip_g.length)


def text_tokens(config: Config) -> int:
    """T: the CLIP tokens and the T5 tokens."""
    return clip_tokens(config) + config.data.text_encoders.t5.length


def pooled_width(config: Config) -> int:
    """V: the pooled outputs of the encoders side by side."""
    return sum(encoder.pooled_width for encoder in config.data.text_encoders.values())


def model_settings(config: Config) -> dict[str, Any]:
    """Arguments of the backbone's constructor, all but the compute dtype."""
    own: dict[str, Any] = {}
    if config.model.backbone in ranges.MMDITS:
        own["dual_attention_layers"] = config.model.dual_attention_layers
    if config.model.backbone == "mmdit3":
        own["clip_tokens"] = clip_tokens(config)
    return own | {
        "depth": config.model.depth,
        "channels": config.model.channels,
        "patch": config.model.patch,
        "qk_norm": config.model.qk_norm,
        "pos_embed_max_size": config.model.pos_embed_max_size,
        "pos_embed_native": position_native(config),
        "pos_embed": config.model.pos_embed,
        "remat": config.model.remat,
        "attention": config.model.attention,
        "quantization": config.model.quantization,
        "reduce_dtype": config.optimizer.reduce_dtype,
    }


def last_block(config: Config, platform: str = "") -> str:
    """How training runs the last block: `apart`, `scanned` with the others, or `equal` to them.

    Only that of MM-DiT differs from the others. For the scan, those just before it must be of its
    kind, with a second attention or without.
    """
    model = config.model
    if model.backbone not in ranges.MMDITS:
        return "equal"
    if model.depth == 1 or model.dual_attention_layers == model.depth - 1:
        return "apart"
    by_platform = "scanned" if platform == "tpu" else "apart"
    return by_platform if model.last_block == "auto" else model.last_block


def to_json(config: Config) -> dict[str, Any]:
    """The plain tree, as it is stored in `workdir/config.json`."""
    return json.loads(config.to_json_best_effort())


def _check_resolution(config: Config, need: Callable[[bool, str], None]) -> None:
    model, data = config.model, config.data
    unit = max(16, data.factor * model.patch)
    below = max(unit, data.resolution - data.resolution % unit)
    need(
        data.resolution >= unit and data.resolution % unit == 0,
        f"resolution={data.resolution} must be a multiple of {unit}; use {below} or {below + unit}",
    )
    need(
        native_patches(config) <= model.pos_embed_max_size,
        f"resolution={data.resolution} is {native_patches(config)} patches an axis, the "
        f"position grid holds {model.pos_embed_max_size}; raise model.pos_embed_max_size",
    )


def validate(config: Config) -> None:
    """Checks every number of a config.

    Raises:
        ValueError: all problems at once, each with the value, the rule and the remedy.
    """
    if problems := list(ranges.type_problems(config, default())):
        raise ValueError("; ".join(problems))  # what follows compares and multiplies
    problems = [*ranges.range_problems(config), *ranges.backbone_problems(config.model)]

    def need(holds: bool, message: str) -> None:
        if not holds:
            problems.append(message)

    model, data, optimizer = config.model, config.data, config.optimizer
    need(
        0 <= model.dual_attention_layers <= model.depth,
        f"model.dual_attention_layers={model.dual_attention_layers} must be between 0 and the "
        f"depth ({model.depth})",
    )
    for name, value, known in (
        ("model.dtype", model.dtype, DTYPES),
        ("model.pos_embed", model.pos_embed, POSITIONS),
        ("model.attention", model.attention, ATTENTIONS),
        ("model.last_block", model.last_block, LAST_BLOCKS),
        ("model.quantization", model.quantization, QUANTIZATIONS),
        ("optimizer.reduce_dtype", optimizer.reduce_dtype, REDUCE_DTYPES),
        ("samples.weights", config.samples.weights, WEIGHTS),
        ("optimizer.name", optimizer.name, OPTIMIZERS),
        ("optimizer.schedule", optimizer.schedule, SCHEDULES),
        ("data.text_storage", data.text_storage, TEXT_STORAGES),
    ):
        need(value in known, f"{name}={value!r} must be one of {', '.join(known)}")

    if data.factor >= 1 and model.patch >= 1:
        _check_resolution(config, need)
    need(
        0 <= model.pos_embed_native <= model.pos_embed_max_size,
        f"model.pos_embed_native={model.pos_embed_native} must be between 1 and "
        f"model.pos_embed_max_size ({model.pos_embed_max_size}), or 0 for the resolution's",
    )
    need(
        data.batch_multiple >= 0 and config.batch_size % (data.batch_multiple or 1) == 0,
        f"data.batch_multiple={data.batch_multiple} must divide batch_size={config.batch_size}, or "
        "be 0",
    )
    encoders = data.text_encoders
    need(
        encoders.clip_l.length == encoders.clip_g.length,
        f"data.text_encoders: clip_l.length={encoders.clip_l.length} and clip_g.length="
        f"{encoders.clip_g.length} share their tokens; make them equal",
    )
    needed = max(encoders.clip_l.width + encoders.clip_g.width, encoders.t5.width)
    need(
        model.context_width >= needed,
        f"model.context_width={model.context_width} is less than the text features ({needed}); "
        f"set it to {needed} or more",
    )

    if problems:
        raise ValueError("; ".join(problems))
