"""Tiles cover an axis, blend without a seam, and change nothing where pixels are independent."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mmdit_jax.encoders.tiling import decode_in_tiles, tile_starts


@pytest.mark.parametrize("size", [3, 8, 9, 14, 15, 31, 64])
@pytest.mark.parametrize(("tile", "overlap"), [(8, 2), (8, 7), (6, 1)])
def test_tiles_cover_an_axis_and_share_their_borders(size, tile, overlap):
    starts = tile_starts(size, tile, overlap)
    assert starts[0] == 0 and starts[-1] == max(0, size - tile)
    assert np.all(starts[:-1] + tile - starts[1:] >= overlap)
    # Not one tile more than that needs.
    assert len(starts) == 1 or (len(starts) - 1) * (tile - overlap) < size - overlap


def pointwise(latents_BHWC):
    """A decoder of factor 2 that looks at no other position."""
    value_BHWC = jnp.sin(latents_BHWC[..., :3]) + latents_BHWC[..., 3:] ** 2
    return jnp.repeat(jnp.repeat(value_BHWC, 2, axis=1), 2, axis=2)


@pytest.mark.parametrize("size", [(5, 6), (8, 8), (9, 31), (17, 8), (30, 21)])
def test_independent_positions_decode_as_if_whole(size):
    latents_BHWC = jax.random.normal(jax.random.key(0), (2, *size, 4))
    tiled = jax.jit(lambda x: decode_in_tiles(pointwise, x, factor=2, tile=8, overlap=3))
    np.testing.assert_allclose(tiled(latents_BHWC), pointwise(latents_BHWC), atol=2e-6)


def test_a_tone_that_differs_from_tile_to_tile_changes_gradually():
    def toned(latents_BHWC):  # the whole tile takes the mean of its latents
        return jnp.broadcast_to(latents_BHWC.mean(axis=(1, 2), keepdims=True), (1, 2 * 8, 2 * 8, 3))

    ramp_BHWC = jnp.broadcast_to(jnp.arange(20.0)[:, None, None], (1, 20, 8, 3))
    tiled_BHWC = decode_in_tiles(toned, ramp_BHWC, factor=2, tile=8, overlap=4)
    steps = np.diff(np.asarray(tiled_BHWC[0, :, 0, 0]))
    # Tones 4 apart, spread over 8 pixels; side by side they would jump by 4.
    assert steps.min() >= -1e-5 and 0.4 < steps.max() < 0.6


def test_one_tile_is_in_memory_whatever_the_size():
    def needed(side):
        def decode(latents_BHWC):
            wide_BHWC = jnp.repeat(pointwise(latents_BHWC), 64, axis=3)
            return jnp.sort(wide_BHWC, axis=3).reshape(*wide_BHWC.shape[:3], 3, 64).mean(axis=4)

        tiled = jax.jit(lambda x: decode_in_tiles(decode, x, factor=2, tile=32, overlap=8))
        compiled = tiled.lower(jax.ShapeDtypeStruct((1, side, side, 4), jnp.float32)).compile()
        stats = compiled.memory_analysis()
        return stats.temp_size_in_bytes - 4 * stats.output_size_in_bytes

    assert needed(128) < 1.2 * needed(64)
