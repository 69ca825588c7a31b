"""The states of the text encoders in 16 or 8 bits: written by the pipeline, restored on the device.

Eight bits come with one float32 scale per token: state = value * scale, and the largest state of a
token is the largest value there is. A token whose states are all zero stays exactly zero. What
that costs is in docs/results.md: int8 is the finer of the two where the states of a token are alike
in size, fp8 where a few channels are far larger than the others.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

FP8 = np.dtype(jnp.float8_e4m3fn)

# Precision -> type of the values in a record. The bits of fp8 travel as uint8: a record and a
# manifest then hold plain types only, which every reader of the format knows.
PRECISIONS = {
    "float16": np.dtype(np.float16),
    "int8": np.dtype(np.int8),
    "fp8": np.dtype(np.uint8),
}
LARGEST = {"int8": 127.0, "fp8": float(jnp.finfo(FP8).max)}  # 448


def store(sequence_BTW: np.ndarray, precision: str) -> dict[str, np.ndarray]:
    """The fields of a record that hold states, as `restore` takes them.

    The error of a state is at most 1/254 of the token's largest for int8; for fp8 1/16 of the
    state itself, or 2^-10 / 448 of the token's largest if that is more.

    Args:
        sequence_BTW: states, float32.
        precision: a name in PRECISIONS.

    Returns:
        "sequence" (B, T, W) and, of 8 bits, "scale" (B, T) float32. A state that is not finite, or
        too large for float16 where that is asked for, leaves one that is not finite in either.
    """
    if precision == "float16":
        with np.errstate(over="ignore"):
            return {"sequence": sequence_BTW.astype(np.float16)}
    most = LARGEST[precision]
    scale_BT = np.abs(sequence_BTW).max(-1).astype(np.float32) / np.float32(most)
    divisor_BT1 = np.where(scale_BT > 0, scale_BT, 1)[..., None]
    with np.errstate(invalid="ignore"):
        # Clipped, because the division may end a rounding above the largest value.
        values_BTW = np.clip(sequence_BTW / divisor_BT1, -most, most)
        if precision == "int8":
            stored_BTW = np.rint(values_BTW).astype(np.int8)
        else:
            stored_BTW = values_BTW.astype(FP8).view(np.uint8)
    return {"sequence": stored_BTW, "scale": scale_BT}


def restore(outputs: Mapping[str, Any], dtype: Any = jnp.float32) -> jax.Array:
    """The states (B, T, W) of one text encoder, on the device: scaled, their padding zero.

    Args:
        outputs: "sequence" (B, T, W); for int8 and fp8 (uint8) "scale" (B, T); of trimmed text
            "length" (B,), how many tokens of each caption are valid. The others become zero.
        dtype: of the result.

    Raises:
        ValueError: 8 bits without a scale, or 16 and more with one.
    """
    sequence_BTW, scale_BT = jnp.asarray(outputs["sequence"]), outputs.get("scale")
    eight_bits = sequence_BTW.dtype in (jnp.int8, jnp.uint8)
    if eight_bits != (scale_BT is not None):
        raise ValueError(
            f"text states are {sequence_BTW.dtype} {'with' if scale_BT is not None else 'without'} "
            "a scale; int8 and uint8 (fp8) need one, floats have none: rebuild the data set"
        )
    if scale_BT is not None:
        if sequence_BTW.dtype == jnp.uint8:
            sequence_BTW = jax.lax.bitcast_convert_type(sequence_BTW, FP8)
        sequence_BTW = sequence_BTW.astype(jnp.float32) * jnp.asarray(scale_BT)[..., None]
    sequence_BTW = sequence_BTW.astype(dtype)
    if "length" in outputs:
        token_1T = jnp.arange(sequence_BTW.shape[1])[None]
        valid_BT = token_1T < jnp.asarray(outputs["length"])[:, None]
        # A select, not a product: whatever a padding token holds (NaN included) cannot leak.
        sequence_BTW = jnp.where(valid_BT[..., None], sequence_BTW, jnp.zeros((), dtype))
    return sequence_BTW
