"""From the outputs of the text encoders to what a backbone receives: context and pooled vector.

One function, `assemble`, serves training, validation and sampling, so that the null condition that
is trained is the null condition that is sampled. It runs on the device, under jit: the records hold
the outputs of each encoder (SD3 paper, App. B.2 and E.1), not the 4096 wide zero-padded context.

A batch of text ("TextOutputs") is a plain dict, the sequences usually float16:

    {"clip_l": {"sequence": (B, 77, 768),  "pooled": (B, 768)},
     "clip_g": {"sequence": (B, 77, 1280), "pooled": (B, 1280)},
     "t5":     {"sequence": (B, 77, 4096)}}

A sequence of 8 bits has a "scale" (B, 77) beside it, and one of trimmed text the "length" (B,) of
its valid tokens: the padding after them is zeros to the model, in training and in sampling alike.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from mmdit_jax.encoders.storage import restore

# The order is part of the format: pooled = [clip_l, clip_g], and CLIP tokens come before T5 tokens.
ENCODER_NAMES = ("clip_l", "clip_g", "t5")
CLIP_NAMES = ("clip_l", "clip_g")

TextOutputs = Mapping[str, Mapping[str, Any]]


class Condition(NamedTuple):
    """What a backbone is conditioned on, besides t."""

    context_BTE: jax.Array
    pooled_BV: jax.Array


def _check(text: TextOutputs, context_width: int) -> None:
    """Raises ValueError where the outputs cannot be one condition of `context_width` features."""
    unknown = sorted(set(text) - set(ENCODER_NAMES))
    if unknown:
        raise ValueError(f"unknown text encoders {unknown}; known are {list(ENCODER_NAMES)}")
    clips = [name for name in CLIP_NAMES if name in text]
    if not clips:
        raise ValueError(
            f"text encoders {sorted(text)} give no pooled vector; add clip_l or clip_g"
        )
    for name, outputs in text.items():
        wanted = {"sequence", "pooled"} if name in CLIP_NAMES else {"sequence"}
        if set(outputs) - {"scale", "length"} != wanted:
            raise ValueError(f"{name} has the outputs {sorted(outputs)} but needs {sorted(wanted)}")
    batches = {f"{name}/{k}": v.shape[0] for name, out in text.items() for k, v in out.items()}
    if len(set(batches.values())) != 1:
        raise ValueError(f"text outputs differ in their batch: {batches}; all must be equal")
    lengths = {name: text[name]["sequence"].shape[1] for name in clips}
    if len(set(lengths.values())) != 1:
        raise ValueError(
            f"CLIP token lengths {lengths} differ; their channels are concatenated, so encode both "
            "with one length"
        )
    needed = {" + ".join(clips): sum(text[name]["sequence"].shape[2] for name in clips)}
    if "t5" in text:
        needed["t5"] = text["t5"]["sequence"].shape[2]
    if max(needed.values()) > context_width:
        raise ValueError(
            f"context width {context_width} is smaller than the text encoders need ({needed}); "
            f"set it to {max(needed.values())} or more"
        )


def _masked(x: jax.Array, keep_B: jax.Array | None) -> jax.Array:
    if keep_B is None:
        return x
    # A select, not a product: whatever a dropped encoder holds (NaN included) cannot leak.
    keep = keep_B.reshape(keep_B.shape + (1,) * (x.ndim - 1))
    return jnp.where(keep, x, jnp.zeros((), x.dtype))


def _widened(sequence_BTW: jax.Array, context_width: int) -> jax.Array:
    missing = context_width - sequence_BTW.shape[-1]
    return jnp.pad(sequence_BTW, ((0, 0), (0, 0), (0, missing)))


def assemble(
    text: TextOutputs,
    context_width: int,
    keep: Mapping[str, Any] | None = None,
    *,
    dtype: Any = jnp.float32,
) -> Condition:
    """Builds the context and the pooled vector (SD3 paper, App. B.2).

    The CLIP sequences are concatenated along channels and zero-padded to `context_width`; the T5
    sequence is zero-padded to it and appended along tokens. Pooled is [clip_l, clip_g]. With the
    published encoders: context (B, 154, 4096), pooled (B, 2048).

    Args:
        text: outputs by encoder name; any subset that has a CLIP. A subset changes the shapes; to
            leave an encoder out of a model that was trained with it, use `keep`.
        context_width: E, the features of the context (4096 for SD3).
        keep: per encoder a bool or (B,) bools; False replaces sequence and pooled by zeros.
            Names exactly the encoders of `text`. None keeps all.
        dtype: of both results.

    Returns:
        Condition(context_BTE, pooled_BV).

    Raises:
        ValueError: encoders, outputs or lengths that do not fit together, or a width too small.
    """
    _check(text, context_width)
    if keep is not None and set(keep) != set(text):
        raise ValueError(
            f"keep names {sorted(keep)} but the text has {sorted(text)}; name every encoder once"
        )
    batch = next(iter(text.values()))["sequence"].shape[0]

    def output(name: str, kind: str) -> jax.Array:
        keep_B = None if keep is None else jnp.broadcast_to(jnp.asarray(keep[name]), (batch,))
        if kind == "sequence":
            return _masked(restore(text[name], dtype), keep_B)
        return _masked(jnp.asarray(text[name][kind], dtype), keep_B)

    clips = [name for name in CLIP_NAMES if name in text]
    clip_BTW = jnp.concatenate([output(name, "sequence") for name in clips], axis=-1)
    context_BTE = _widened(clip_BTW, context_width)
    if "t5" in text:
        t5_BTE = _widened(output("t5", "sequence"), context_width)
        context_BTE = jnp.concatenate([context_BTE, t5_BTE], axis=1)
    pooled_BV = jnp.concatenate([output(name, "pooled") for name in clips], axis=-1)
    return Condition(context_BTE, pooled_BV)


def finite(text: TextOutputs) -> jax.Array:
    """(B,) bools: whether every state and every pooled feature of a sample is finite.

    What `restore` makes of the padding does not count.
    """
    arrays = [restore(outputs) for outputs in text.values()]
    arrays += [jnp.asarray(outputs["pooled"]) for outputs in text.values() if "pooled" in outputs]
    finite_B = jnp.ones(arrays[0].shape[0], bool)
    for array in arrays:
        finite_B &= jnp.all(jnp.isfinite(array), axis=tuple(range(1, array.ndim)))
    return finite_B


def null_condition(text: TextOutputs, context_width: int, *, dtype: Any = jnp.float32) -> Condition:
    """The condition that training sees when every encoder is dropped: zeros of `text`'s shapes."""
    return assemble(text, context_width, dict.fromkeys(text, False), dtype=dtype)


def zero_outputs(encoders: Mapping[str, Mapping[str, Any]], batch: int) -> dict[str, dict]:
    """TextOutputs of zeros for the text encoders of a manifest (`text.describe` of each).

    Gives the shapes of a batch without data: to initialise a model, or for `null_condition`.
    """
    outputs = {}
    for name, about in encoders.items():
        sequence_shape = (batch, about["length"], about["width"])
        outputs[name] = {"sequence": jnp.zeros(sequence_shape, jnp.float32)}
        if about.get("pooled_width"):
            outputs[name]["pooled"] = jnp.zeros((batch, about["pooled_width"]), jnp.float32)
    return outputs


def drop_mask(
    key: jax.Array,
    batch: int,
    rate: float,
    names: Sequence[str] = ENCODER_NAMES,
    *,
    together: float = 0.0,
) -> dict[str, jax.Array]:
    """Which encoder outputs training keeps: one coin per sample and encoder (SD3 paper, App. B.2).

    Args:
        key: a key that belongs to the step; the coins of a batch are one global array.
        batch: B, the global batch.
        rate: probability of dropping one encoder; 0.464 of three drops all in 10 % of the samples.
        names: the encoders. An encoder's coins do not depend on which others there are.
        together: probability of dropping all encoders of a sample at once, by a coin of its own:
            unconditional samples without ones that lack a single encoder.

    Returns:
        name -> keep_B bools, as `assemble` takes them.

    Raises:
        ValueError: a rate outside [0, 1] or an unknown encoder.
    """
    for value in (rate, together):
        if not 0.0 <= value <= 1.0:
            raise ValueError(f"text dropout rate {value} is no probability; choose one from 0 to 1")
    unknown = sorted(set(names) - set(ENCODER_NAMES))
    if unknown:
        raise ValueError(f"unknown text encoders {unknown}; known are {list(ENCODER_NAMES)}")

    def kept(coin: int, dropped: float) -> jax.Array:
        return jax.random.bernoulli(jax.random.fold_in(key, coin), 1.0 - dropped, (batch,))

    any_B = kept(len(ENCODER_NAMES), together)
    return {name: any_B & kept(ENCODER_NAMES.index(name), rate) for name in names}
