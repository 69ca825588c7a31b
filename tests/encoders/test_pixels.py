import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mmdit_jax.encoders import pixels

RNG = np.random.default_rng(0)


def test_channels_are_row_column_rgb():
    picture_BHWC = RNG.integers(0, 256, (1, 4, 6, 3), np.uint8)
    latent_BHWC = pixels.space_to_depth(picture_BHWC, 2)
    assert latent_BHWC.shape == (1, 2, 3, 12)
    for row in range(2):
        for column in range(2):
            channels = slice(3 * (2 * row + column), 3 * (2 * row + column) + 3)
            expected_HWC = picture_BHWC[0, row::2, column::2]
            np.testing.assert_array_equal(latent_BHWC[0, ..., channels], expected_HWC)


@pytest.mark.parametrize("factor", [1, 2, 4, 8])
def test_depth_to_space_undoes_space_to_depth(factor):
    picture_BHWC = RNG.integers(0, 256, (2, 16, 24, 3), np.uint8)
    there_BHWC = pixels.space_to_depth(picture_BHWC, factor)
    back_BHWC = pixels.depth_to_space(there_BHWC, factor)
    assert there_BHWC.dtype == np.uint8
    np.testing.assert_array_equal(back_BHWC, picture_BHWC)


def test_numpy_and_jax_agree():
    picture_BHWC = RNG.integers(0, 256, (2, 8, 8, 3), np.uint8)
    on_device_BHWC = jax.jit(lambda x: pixels.space_to_depth(x, 4))(picture_BHWC)
    np.testing.assert_array_equal(on_device_BHWC, pixels.space_to_depth(picture_BHWC, 4))


@pytest.mark.parametrize("shift, scale", [(0.0, 1.0), (45.25, 0.01725), (127.5, 1 / 57.3)])
def test_decode_of_the_normalised_latent_is_the_picture(shift, scale):
    picture_BHWC = RNG.integers(0, 256, (2, 16, 16, 3), np.uint8)
    autoencoder = {"kind": "pixels", "factor": 2, "shift": shift, "scale": scale}
    latent_BHWC = pixels.space_to_depth(picture_BHWC, 2).astype(np.float32)
    z_BHWC = (latent_BHWC - np.float32(shift)) * np.float32(scale)
    decoded_BHWC = jax.jit(lambda z: pixels.decode(z, autoencoder))(z_BHWC)
    assert decoded_BHWC.dtype == jnp.uint8
    np.testing.assert_array_equal(decoded_BHWC, picture_BHWC)


def test_values_beyond_the_range_are_clipped_and_not_wrapped():
    latent_BHWC = jnp.array([-40.0, 255.4, 255.6, 300.0, 0.5, 1.5]).reshape(1, 1, 2, 3)
    expected = [0, 255, 255, 255, 0, 2]  # halves go to the even neighbour
    np.testing.assert_array_equal(pixels.to_pixels(latent_BHWC, 1).ravel(), expected)


def test_another_kind_of_autoencoder_is_refused():
    autoencoder = {"kind": "moments", "id": "kl", "factor": 8, "shift": 0.0, "scale": 1.0}
    with pytest.raises(ValueError, match="'moments' cannot be decoded as 'pixels'"):
        pixels.decode(jnp.zeros((1, 2, 2, 192)), autoencoder)


def test_sizes_that_do_not_divide_are_refused():
    with pytest.raises(ValueError, match="6x8 pixels does not divide into blocks of 4"):
        pixels.space_to_depth(np.zeros((1, 6, 8, 3), np.uint8), 4)
    with pytest.raises(ValueError, match="6 channels do not unfold"):
        pixels.depth_to_space(np.zeros((1, 2, 2, 6), np.uint8), 2)
