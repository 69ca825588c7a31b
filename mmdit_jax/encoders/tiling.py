"""Decoding a large latent in overlapping tiles, so that memory does not grow with the picture."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np


def tile_starts(size: int, tile: int, overlap: int) -> np.ndarray:
    """Where the tiles of an axis begin: evenly spread, the last one ending at the border.

    Args:
        size: positions of the axis.
        tile: positions of a tile.
        overlap: least number of positions that neighbours share.
    """
    count = 1 + -(-max(0, size - tile) // (tile - overlap))
    return np.round(np.linspace(0, max(0, size - tile), count)).astype(np.int32)


def _window(size: int, ramp: int) -> np.ndarray:
    """Weights of a tile along an axis: 1 inside, falling linearly over `ramp` to both ends."""
    to_border = np.minimum(np.arange(size), np.arange(size)[::-1]) + 0.5
    return np.minimum(1.0, to_border / ramp)


def decode_in_tiles(
    decode: Callable[[jax.Array], jax.Array],
    latents_BHWC: jax.Array,
    *,
    factor: int,
    tile: int,
    overlap: int,
) -> jax.Array:
    """Decodes one tile after the other and blends them where they overlap.

    Every pixel is the mean of the tiles that show it, weighted by its distance from their borders.
    Where `decode` looks at its surroundings no further than a position this equals `decode` of the
    whole. An autoencoder's normalisation and attention look at all of a tile, so there it is an
    approximation: tones may differ a little from tile to tile, without a seam.

    Args:
        decode: (B, h, w, C) -> (B, h f, w f, 3), of any h and w up to `tile`.
        latents_BHWC: of any size.
        factor: f.
        tile: positions an axis that are decoded at once.
        overlap: least number of positions that neighbours share; below `tile`.

    Returns:
        (B, H f, W f, 3) float32.
    """
    B, H, W, C = latents_BHWC.shape
    height, width = min(tile, H), min(tile, W)
    ramp = overlap * factor
    window_HW = _window(height * factor, ramp)[:, None] * _window(width * factor, ramp)[None]
    corners = [(y, x) for y in tile_starts(H, tile, overlap) for x in tile_starts(W, tile, overlap)]
    total_HW = np.zeros((H * factor, W * factor))
    for y, x in corners:
        rows = slice(y * factor, (y + height) * factor)
        total_HW[rows, x * factor : (x + width) * factor] += window_HW
    window_BHWC = jnp.asarray(window_HW, jnp.float32)[None, :, :, None]

    def add(canvas_BHWC: jax.Array, corner: jax.Array) -> tuple[jax.Array, None]:
        y, x = corner
        part_BHWC = jax.lax.dynamic_slice(latents_BHWC, (0, y, x, 0), (B, height, width, C))
        shown_BHWC = decode(part_BHWC).astype(jnp.float32) * window_BHWC
        at = (0, y * factor, x * factor, 0)
        shown_BHWC += jax.lax.dynamic_slice(canvas_BHWC, at, shown_BHWC.shape)
        return jax.lax.dynamic_update_slice(canvas_BHWC, shown_BHWC, at), None

    canvas_BHWC = jnp.zeros((B, H * factor, W * factor, 3), jnp.float32)
    # A scan: one compiled tile, and nothing of a tile outlives it.
    canvas_BHWC, _ = jax.lax.scan(add, canvas_BHWC, np.array(corners, np.int32))
    return canvas_BHWC / jnp.asarray(total_HW, jnp.float32)[None, :, :, None]
