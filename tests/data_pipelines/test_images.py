import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image, ImageFile

from data_pipelines.samples import REASONS, Rejected
from data_pipelines.stages import images

# Pillow warns about damaged files on its way to the error, or about a large one.
pytestmark = pytest.mark.filterwarnings("ignore")

RNG = np.random.default_rng(0)
UPRIGHT_HWC = RNG.integers(0, 256, (6, 10, 3), np.uint8)

# EXIF orientation -> how a camera stored the upright picture.
STORED = {
    1: lambda x: x,
    2: lambda x: x[:, ::-1],
    3: lambda x: x[::-1, ::-1],
    4: lambda x: x[::-1],
    5: lambda x: x.transpose(1, 0, 2),
    6: lambda x: np.rot90(x, 1),
    7: lambda x: x[::-1, ::-1].transpose(1, 0, 2),
    8: lambda x: np.rot90(x, -1),
}


def encoded(image, kind="PNG", **options):
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def pixels(data):
    image = images.decode(data).image
    assert image.mode == "RGB"
    return np.asarray(image)


def raw_png(values_HWC, color_type, depth, transparency=b"", claimed=None):
    """A PNG of any colour type and depth; Pillow cannot write all of them."""
    height, width = claimed or values_HWC.shape[:2]
    dtype = ">u2" if depth == 16 else "u1"
    rows = b"".join(b"\0" + row.astype(dtype).tobytes() for row in values_HWC)

    def chunk(kind, data):
        checksum = struct.pack(">I", zlib.crc32(kind + data))
        return struct.pack(">I", len(data)) + kind + data + checksum

    header = struct.pack(">IIBBBBB", width, height, depth, color_type, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + (chunk(b"tRNS", transparency) if transparency else b"")
        + chunk(b"IDAT", zlib.compress(rows))
        + chunk(b"IEND", b"")
    )


@pytest.mark.parametrize("orientation", STORED)
def test_exif_rotation_is_undone(orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored_HWC = np.ascontiguousarray(STORED[orientation](UPRIGHT_HWC))
    data = encoded(Image.fromarray(stored_HWC), exif=exif)
    np.testing.assert_array_equal(pixels(data), UPRIGHT_HWC)


def test_a_rotated_jpeg_equals_its_upright_twin():
    upright_HWC = np.zeros((32, 48, 3), np.uint8)
    upright_HWC[:16, :24] = (250, 10, 10)
    exif = Image.Exif()
    exif[0x0112] = 6
    rotated = Image.fromarray(np.ascontiguousarray(np.rot90(upright_HWC)))
    decoded_HWC = pixels(encoded(rotated, "JPEG", quality=95, subsampling=0, exif=exif))
    assert decoded_HWC.shape == upright_HWC.shape
    assert np.abs(decoded_HWC.astype(int) - upright_HWC).mean() < 4


def test_transparency_lies_over_white():
    rgba_HWC = np.zeros((1, 3, 4), np.uint8)
    rgba_HWC[0] = [(200, 0, 0, 255), (200, 0, 0, 0), (0, 0, 0, 128)]
    expected = [[(200, 0, 0), (255, 255, 255), (127, 127, 127)]]
    np.testing.assert_array_equal(pixels(encoded(Image.fromarray(rgba_HWC))), expected)
    grey_HWC = np.array([[(0, 0), (0, 255), (90, 255)]], np.uint8)
    data = encoded(Image.fromarray(grey_HWC, "LA"))
    np.testing.assert_array_equal(pixels(data)[0, :, 0], [255, 0, 90])


def test_palettes_are_expanded_with_and_without_a_transparent_entry():
    image = Image.fromarray(np.array([[0, 1, 2]], np.uint8)).convert("P")
    image.putpalette([10, 20, 30, 40, 50, 60, 70, 80, 90])
    expected = np.array([[(10, 20, 30), (40, 50, 60), (70, 80, 90)]], np.uint8)
    np.testing.assert_array_equal(pixels(encoded(image)), expected)
    expected[0, 1] = 255
    np.testing.assert_array_equal(pixels(encoded(image, transparency=1)), expected)
    np.testing.assert_array_equal(pixels(encoded(image, "GIF", transparency=1)), expected)


def test_grey_becomes_three_equal_channels():
    grey_HW = RNG.integers(0, 256, (4, 5), np.uint8)
    expected_HWC = np.repeat(grey_HW[..., None], 3, axis=-1)
    np.testing.assert_array_equal(pixels(encoded(Image.fromarray(grey_HW))), expected_HWC)
    bits = Image.fromarray(np.array([[0, 255]], np.uint8)).convert("1")
    np.testing.assert_array_equal(pixels(encoded(bits))[0, :, 0], [0, 255])


def test_sixteen_bits_are_scaled_and_not_clipped():
    grey_HWC = np.array([0, 257, 32768, 65535]).reshape(1, 4, 1)
    for data in (
        raw_png(grey_HWC, 0, 16),
        raw_png(np.repeat(grey_HWC, 3, axis=2), 2, 16),
        encoded(Image.fromarray(grey_HWC[..., 0].astype(np.uint16)), "TIFF"),
        encoded(Image.fromarray(grey_HWC[..., 0].astype(np.int32)), "TIFF"),
    ):
        np.testing.assert_array_equal(pixels(data)[0, :, 0], [0, 1, 128, 255])
    opaque_white = np.array([65535, 65535, 65535, 65535]).reshape(1, 1, 4)
    np.testing.assert_array_equal(pixels(raw_png(opaque_white, 6, 16)), [[(255, 255, 255)]])


def test_sixteen_bit_grey_keeps_its_transparent_value():
    data = raw_png(np.array([1000, 0]).reshape(1, 2, 1), 0, 16, struct.pack(">H", 1000))
    np.testing.assert_array_equal(pixels(data)[0, :, 0], [255, 0])


def test_cmyk_is_converted():
    # No ink is white, all inks are black.
    inks = {(0, 0, 0, 0): (255, 255, 255), (0, 0, 0, 255): (0, 0, 0), (0, 255, 255, 0): (255, 0, 0)}
    for ink, rgb in inks.items():
        for kind in ("JPEG", "TIFF"):
            data = encoded(Image.new("CMYK", (16, 16), ink), kind)
            np.testing.assert_allclose(pixels(data)[8, 8].astype(int), rgb, atol=2)


def test_float_pixels_need_a_known_range():
    values_HW = np.array([[0.0, 0.5, 1.0]], np.float32)
    data = encoded(Image.fromarray(values_HW), "TIFF")
    np.testing.assert_array_equal(pixels(data)[0, :, 0], [0, 128, 255])
    for bad, reason in ((np.nan, "non_finite"), (np.inf, "non_finite"), (200.0, "unsupported")):
        values_HW[0, 1] = bad
        with pytest.raises(Rejected) as caught:
            images.decode(encoded(Image.fromarray(values_HW), "TIFF"))
        assert caught.value.reason == reason


def test_wide_integers_of_unknown_range_are_refused():
    with pytest.raises(Rejected) as caught:
        images.decode(encoded(Image.fromarray(np.array([[70000]], np.int32)), "TIFF"))
    assert caught.value.reason == "unsupported"


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "GIF", "TIFF", "BMP"])
def test_a_file_that_is_cut_off_is_corrupt(kind):
    data = encoded(Image.fromarray(RNG.integers(0, 256, (64, 64, 3), np.uint8)), kind)
    images.decode(data)
    for share in (0.5, 0.9):
        with pytest.raises(Rejected) as caught:
            images.decode(data[: int(share * len(data))])
        assert caught.value.reason == "corrupt"


def test_damaged_bytes_are_kept_or_corrupt_and_never_an_error():
    rng = np.random.default_rng(1)
    picture = Image.fromarray(RNG.integers(0, 256, (24, 24, 3), np.uint8))
    for kind in ("JPEG", "PNG", "WEBP", "GIF", "TIFF", "BMP"):
        data = np.frombuffer(encoded(picture, kind), np.uint8)
        for _ in range(40):
            damaged = data.copy()
            damaged[rng.integers(0, min(len(data), 200), 4)] = rng.integers(0, 256, 4)
            try:
                assert images.decode(damaged.tobytes()).image.mode == "RGB"
            except Rejected as rejected:
                assert rejected.reason in REASONS


def test_no_image_at_all_is_corrupt():
    for data in (b"", b"not an image", b"\x89PNG\r\n\x1a\n"):
        with pytest.raises(Rejected) as caught:
            images.decode(data)
        assert caught.value.reason == "corrupt"


@pytest.mark.parametrize("side", [10_000, 100_000])
def test_a_decompression_bomb_is_refused_before_it_is_unpacked(side, monkeypatch):
    bomb = raw_png(np.zeros((1, 1, 1)), 0, 8, claimed=(side, side))
    monkeypatch.setattr(ImageFile.ImageFile, "load", None)  # a call would be a TypeError
    with pytest.raises(Rejected) as caught:
        images.decode(bomb)
    assert caught.value.reason == "too_large"


@pytest.mark.parametrize(
    "original, target, box",
    [
        ((100, 100), (32, 32), (0, 0, 100, 100)),
        ((100, 160), (32, 32), (0, 30, 100, 100)),
        ((161, 100), (32, 32), (30, 0, 100, 100)),
        ((100, 100), (32, 64), (25, 0, 50, 100)),
        ((100, 100), (64, 32), (0, 25, 100, 50)),
        ((1, 1000), (32, 32), (0, 499, 1, 1)),
    ],
)
def test_the_crop_is_the_largest_centred_box_of_the_target_shape(original, target, box):
    assert images.centre_crop(original, target) == box


def test_a_picture_of_the_right_size_keeps_its_pixels():
    picture = Image.fromarray(RNG.integers(0, 256, (16, 16, 3), np.uint8))
    kept_HWC = images.resize(picture, images.Box(0, 0, 16, 16), (16, 16))
    np.testing.assert_array_equal(kept_HWC, np.asarray(picture))


def test_reduction_averages_what_it_leaves_out():
    checker_HWC = np.indices((64, 64)).sum(0) % 2 * 255
    picture = Image.fromarray(np.repeat(checker_HWC[..., None], 3, axis=-1).astype(np.uint8))
    small_HWC = images.resize(picture, images.Box(0, 0, 64, 64), (8, 8))
    # Without antialiasing single pixels are picked: all black or all white.
    np.testing.assert_allclose(small_HWC, 127.5, atol=3)


def test_crop_and_resize_equal_resize_and_crop():
    rows, columns = np.mgrid[:40, :64]
    smooth_HWC = np.stack([4 * columns, 6 * rows, 2 * (rows + columns)], -1).astype(np.uint8)
    picture = Image.fromarray(smooth_HWC)
    box = images.centre_crop((40, 64), (20, 20))
    ours_HWC = images.resize(picture, box, (20, 20)).astype(int)
    whole_HWC = np.asarray(picture.resize((32, 20), Image.Resampling.LANCZOS)).astype(int)
    assert np.abs(ours_HWC - whole_HWC[:, 6:26]).max() <= 1


def photograph(height, width):
    """Smooth colours and some texture, as a Pillow picture."""
    rng = np.random.default_rng(height + width)
    small = Image.fromarray(rng.integers(0, 256, (9, 9, 3), np.uint8))
    values = np.asarray(small.resize((width, height), Image.Resampling.BICUBIC)).astype(int)
    return Image.fromarray((values + rng.integers(-9, 10, values.shape)).clip(0, 255).astype("u1"))


@pytest.mark.parametrize(
    "size, target, scale",
    [
        ((512, 768), (64, 64), 4),
        ((512, 768), (32, 32), 8),
        ((512, 768), (129, 129), 1),
        ((512, 768), (128, 128), 2),
        ((514, 770), (64, 64), 2),
        ((513, 767), (32, 32), 1),
    ],
)
def test_a_large_jpeg_is_reduced_by_its_decoder_and_looks_the_same(size, target, scale):
    data = encoded(photograph(*size), "JPEG", quality=90)
    whole, reduced = images.decode(data), images.decode(data, target)
    assert reduced.scale == scale and reduced.size == whole.size == size
    assert reduced.image.size == (size[1] // scale, size[0] // scale)
    crop = images.centre_crop(size, target)
    ours_HWC = images.resize(reduced.image, crop, target, reduced.scale).astype(int)
    exact_HWC = images.resize(whole.image, crop, target).astype(int)
    assert np.abs(ours_HWC - exact_HWC).mean() < 0.6
    assert np.abs(ours_HWC - exact_HWC).max() <= 8


@pytest.mark.parametrize("orientation", STORED)
def test_a_rotated_jpeg_is_reduced_in_place(orientation):
    upright = photograph(256, 512)
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored = Image.fromarray(np.ascontiguousarray(STORED[orientation](np.asarray(upright))))
    data = encoded(stored, "JPEG", quality=95, exif=exif)
    image, size, scale = images.decode(data, (32, 32))
    assert (size, scale, image.size) == ((256, 512), 4, (128, 64))
    crop = images.centre_crop(size, (32, 32))
    expected_HWC = images.resize(upright, crop, (32, 32)).astype(int)
    assert np.abs(images.resize(image, crop, (32, 32), scale) - expected_HWC).max() <= 8


def test_other_formats_are_never_reduced():
    for kind in ("PNG", "WEBP"):
        assert images.decode(encoded(photograph(64, 64), kind), (4, 4)).scale == 1


def test_a_reduced_jpeg_that_is_cut_off_is_still_found_out():
    data = encoded(photograph(256, 256), "JPEG")
    for share in (0.3, 0.9, 0.99):
        with pytest.raises(Rejected):
            images.decode(data[: int(share * len(data))], (1, 1))
