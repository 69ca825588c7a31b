"""The "pixels" autoencoder: space-to-depth, nothing learned.

A picture of R x R pixels becomes a latent of R/f x R/f positions with 3 f^2 channels (for f = 8 the
same grid as a KL autoencoder's latent). It is exact in both directions, needs no weights, and lets
a small model train on pixels through the same records, loader and sampler as on real latents.

The channel order is (row in the block, column in the block, rgb). The record keeps the uint8
values; the network sees z = (latent - shift) * scale with the shift and scale of the manifest.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

KIND = "pixels"

Array = np.ndarray | jax.Array


def space_to_depth(x_BHWC: Array, factor: int) -> Array:
    """(B, H, W, C) -> (B, H/f, W/f, f*f*C), channels ordered (row, column, C). numpy or jax.

    Raises:
      ValueError: height or width is no multiple of `factor`.
    """
    B, H, W, C = x_BHWC.shape
    if H % factor or W % factor:
        raise ValueError(
            f"a picture of {H}x{W} pixels does not divide into blocks of {factor}; "
            "use a height and width that are multiples of the factor"
        )
    x = x_BHWC.reshape(B, H // factor, factor, W // factor, factor, C)
    return x.transpose(0, 1, 3, 2, 4, 5).reshape(B, H // factor, W // factor, factor * factor * C)


def depth_to_space(x_BHWC: Array, factor: int) -> Array:
    """(B, h, w, f*f*C) -> (B, h*f, w*f, C), the inverse of `space_to_depth`. numpy or jax.

    Raises:
      ValueError: the channels are no multiple of `factor` squared.
    """
    B, H, W, D = x_BHWC.shape
    if D % (factor * factor):
        raise ValueError(
            f"{D} channels do not unfold into blocks of {factor}x{factor}; "
            f"the latent needs a multiple of {factor * factor} channels"
        )
    C = D // (factor * factor)
    x = x_BHWC.reshape(B, H, W, factor, factor, C)
    return x.transpose(0, 1, 3, 2, 4, 5).reshape(B, H * factor, W * factor, C)


def to_pixels(latent_BHWC: jax.Array, factor: int) -> jax.Array:
    """Latent in pixel units (0..255, any real dtype) -> uint8 pictures (B, h*f, w*f, 3)."""
    x_BHWC = depth_to_space(jnp.asarray(latent_BHWC, jnp.float32), factor)
    return jnp.clip(jnp.round(x_BHWC), 0, 255).astype(jnp.uint8)


def decode(z_BHWC: jax.Array, autoencoder: Mapping[str, Any]) -> jax.Array:
    """What the sampler ends with -> uint8 pictures (B, h*f, w*f, 3).

    Args:
      z_BHWC: normalised latents, z = (latent - shift) * scale.
      autoencoder: the manifest's entry: "kind", "factor", "shift", "scale".

    Raises:
      ValueError: the entry describes another kind of autoencoder.
    """
    if autoencoder["kind"] != KIND:
        raise ValueError(
            f"autoencoder {autoencoder.get('id', '')!r} of kind {autoencoder['kind']!r} cannot be "
            f"decoded as {KIND!r}; use the decoder of that autoencoder"
        )
    latent_BHWC = jnp.asarray(z_BHWC, jnp.float32) / autoencoder["scale"] + autoencoder["shift"]
    return to_pixels(latent_BHWC, autoencoder["factor"])
