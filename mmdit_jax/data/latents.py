"""From the latents of a record to x0: draw from the moments, normalise (on the device)."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

LOGVAR_RANGE = (-30.0, 20.0)  # of the SD autoencoders (paper.md 3.7)
KINDS = ("moments", "mean", "pixels")


def to_x0(
    stored_BHWC: jax.Array, autoencoder: Mapping[str, Any], key: jax.Array | None = None
) -> jax.Array:
    """x0 = (latent - shift) * scale, float32.

    Moments hold the mean in the first half of the channels and the log-variance in the second; with
    a key each call draws a new latent from them, without one the mean is used (validation).

    Args:
        stored_BHWC: as in the record: (B, H, W, C), or 2C channels for moments.
        autoencoder: the manifest's entry with `kind`, `shift` and `scale`.
        key: of this step, for moments.

    Raises:
        ValueError: an unknown kind of latent.
    """
    kind = autoencoder["kind"]
    if kind not in KINDS:
        raise ValueError(f"latent kind {kind!r} is unknown; known are {', '.join(KINDS)}")
    latent = stored_BHWC.astype(jnp.float32)
    if kind == "moments":
        latent, logvar = jnp.split(latent, 2, axis=-1)
        if key is not None:
            std = jnp.exp(0.5 * jnp.clip(logvar, *LOGVAR_RANGE))
            latent = latent + std * jax.random.normal(key, latent.shape, jnp.float32)
    return (latent - autoencoder["shift"]) * autoencoder["scale"]
