"""What every setting may be: of the type of its default, and a number between two bounds.

Also what a backbone does not go with.

The bounds are no advice. They are what no run on any machine needs, so that a slip of the keyboard
or a damaged config.json ends with one line instead of an allocation that takes the machine down.
"""

import math
import reprlib
from collections.abc import Iterator, Mapping
from typing import Any

INT32 = (1 << 31) - 1  # steps and seeds are int32 on the device
_COUNT = (0, INT32)
_FROM_ONE = (1, INT32)
_BATCH = (1, 1 << 24)
_FEATURES = (1, 1 << 20)
_SHIFT = (1e-3, 1e3)
_AXIS = (-1, 1 << 24)

# Setting -> smallest and largest value. Text encoders are all alike and stand here once.
RANGES: dict[str, tuple[float, float]] = {
    "seed": (-INT32, INT32),
    "steps": _FROM_ONE,
    "batch_size": _BATCH,
    "model.depth": (1, 1024),
    "model.channels": (1, 4096),
    "model.patch": (1, 64),
    "model.context_width": _FEATURES,
    "model.pos_embed_max_size": (1, 4096),
    "data.resolution": (1, 1 << 16),
    "data.factor": (1, 256),
    "data.text_encoders.length": (1, 1 << 16),
    "data.text_encoders.width": _FEATURES,
    "data.text_encoders.pooled_width": (0, 1 << 20),
    "data.threads": (1, 1024),
    "data.prefetch": (0, 1024),
    "flow.shift": _SHIFT,
    "optimizer.learning_rate": (1e-30, 1e3),
    "optimizer.warmup": _COUNT,
    "optimizer.decay_fraction": (0.0, 1.0),
    "optimizer.final_fraction": (0.0, 1e3),
    "optimizer.eps": (0.0, 1e3),
    "optimizer.weight_decay": (0.0, 1e3),
    "optimizer.clip_norm": (0.0, 1e9),
    "optimizer.muon_learning_rate": (0.0, 1e3),
    "optimizer.accumulate": (1, 1 << 16),
    "ema.every": _FROM_ONE,
    "mesh.data": _AXIS,
    "mesh.fsdp": _AXIS,
    "mesh.tensor": _AXIS,
    "mesh.context": _AXIS,
    "mesh.slices": (0, 1 << 16),
    "checkpoint.every": _FROM_ONE,
    "checkpoint.keep": (1, 1 << 20),
    "checkpoint.max_failures": _FROM_ONE,
    "faults.max_substituted": (0.0, 1.0),
    "faults.max_skipped": _FROM_ONE,
    "faults.max_nonfinite_samples": (0.0, 1.0),
    "faults.watchdog_s": (0.0, 1e6),
    "faults.spike_sigma": (0.0, 1e6),
    "faults.spike_window": (2, 1 << 20),
    "faults.replica_check_every": _COUNT,
    "evaluation.every": _COUNT,
    "evaluation.samples": _FROM_ONE,
    "evaluation.levels": (1, 4096),
    "evaluation.batch_size": _BATCH,
    "evaluation.pictures": _COUNT,
    "samples.every": _COUNT,
    "samples.steps": (1, 1 << 16),
    "samples.shift": _SHIFT,
    "samples.cfg": (-1e4, 1e4),
    "samples.seed": (-INT32, INT32),
    "log.every": _FROM_ONE,
}
# Of which 1 is no value: with it nothing would be left, or nothing would ever change.
SHARES = (
    "data.dropout",
    "data.dropout_all",
    "optimizer.b1",
    "optimizer.b2",
    "optimizer.muon_momentum",
    "ema.decay",
)
MMDITS = ("mmdit", "mmdit3")  # backbones whose image tokens have weights of their own
MOST_CHARACTERS = 4096  # of a text
MOST_ITEMS = 4096  # of a list


def type_problems(config: Any, default: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    """Names that are unknown or missing, and values of another type than the default's.

    Args:
        config: nested maps; lists stand for tuples, as in JSON.
        default: every setting there is.
        prefix: of the names.
    """
    for name in sorted(set(config) - set(default), key=str):
        known = ", ".join(sorted(default))
        yield f"{prefix}{_shown(name)} is unknown; the known settings are {known}"
    for name, value in default.items():
        full = f"{prefix}{name}"
        if name not in config:
            yield f"{full} is missing"
        elif not hasattr(value, "keys"):
            if rule := _broken_rule(config[name], value):
                yield f"{full}={_shown(config[name])} must be {rule}"
        elif hasattr(config[name], "keys"):
            yield from type_problems(config[name], value, full + ".")
        else:
            yield f"{full}={_shown(config[name])} must be a group of settings"


def _broken_rule(value: Any, default: Any) -> str:
    """What a value of this default has to be, or "" if it is that."""
    if isinstance(default, tuple | list):
        kinds = (int, float) if default else (str,)
        holds = isinstance(value, tuple | list) and all(type(item) in kinds for item in value)
        if default:
            return "" if holds and len(value) == len(default) else f"{len(default)} numbers"
        return "" if holds and len(value) <= MOST_ITEMS else f"at most {MOST_ITEMS} texts"
    if isinstance(default, str):
        holds = isinstance(value, str) and len(value) <= MOST_CHARACTERS
        return "" if holds else f"a text of at most {MOST_CHARACTERS} characters"
    if isinstance(default, bool):
        return "" if isinstance(value, bool) else "True or False"
    if isinstance(default, int):
        return "" if type(value) is int else "a whole number"
    return "" if type(value) in (int, float) else "a number"


def range_problems(config: Any, prefix: str = "") -> Iterator[str]:
    """Numbers that are not finite or beyond their bounds, of a config whose types are right."""
    for name, value in config.items():
        full = f"{prefix}{name}"
        if hasattr(value, "keys"):
            yield from range_problems(value, full + ".")
        elif isinstance(value, tuple | list):
            if not all(isinstance(item, str) or abs(item) < math.inf for item in value):
                yield f"{full}={_shown(value)} must be finite"
        elif isinstance(value, str | bool):
            continue
        elif not abs(value) < math.inf:  # compared only: a huge whole number is no float
            yield f"{full}={_shown(value)} must be finite"
        elif full in SHARES:
            if not 0 <= value < 1:
                yield f"{full}={_shown(value)} must be in [0, 1)"
        else:
            low, high = RANGES.get(_without_encoder(full), (-math.inf, math.inf))
            if value < low:
                yield f"{full}={_shown(value)} must be at least {low}"
            if value > high:
                yield f"{full}={_shown(value)} must be at most {high}"


def backbone_problems(model: Any) -> Iterator[str]:
    """Settings of a model that its backbone has no use for, of a config whose types are right."""
    name, dual = model["backbone"], model["dual_attention_layers"]
    if name not in MMDITS and dual > 0:
        yield (
            f"model.dual_attention_layers={dual} is for {' and '.join(MMDITS)} alone; set it to 0 "
            f"for model.backbone={_shown(name)}"
        )
    if name == "uvit" and model["depth"] == 1:
        yield (
            "model.depth=1 leaves model.backbone='uvit' no two blocks to join by a skip; use 2 or "
            "more, or model.backbone=dit"
        )


def _shown(value: Any) -> str:
    return reprlib.repr(value)


def _without_encoder(name: str) -> str:
    """`data.text_encoders.t5.length` -> `data.text_encoders.length`."""
    start, group, rest = name.partition("text_encoders.")
    return start + group + rest.partition(".")[2] if group else name
