"""From the bytes of an image file to a uint8 RGB picture of the wanted size.

    decode          bytes -> upright RGB: EXIF rotation applied, transparency over white, palettes
                    and greys expanded, 16-bit greys scaled (not clipped), CMYK converted; a JPEG
                    much larger than needed comes 2, 4 or 8 times smaller from its decoder
    centre_crop     the largest centred box of the target's aspect ratio
    resize          crop and antialiased (Lanczos) resize in one step

Colour profiles are not applied. Of a file with several frames the first counts. Whatever is wrong
with a file is raised as `Rejected`, so that the report can name it.

A small file can ask for much: only the formats in `FORMATS` are tried (some others start programs),
pictures have at most `MAX_PIXELS` and JPEGs `MAX_SCANS`, and only a few large pictures are unpacked
at once, whatever the number of threads.
"""

import contextlib
import functools
import io
import threading
from typing import NamedTuple

import numpy as np
from PIL import ExifTags, Image, ImageFile, ImageOps, UnidentifiedImageError

from data_pipelines.samples import Rejected

# A truncated file must fail, not come back half grey.
ImageFile.LOAD_TRUNCATED_IMAGES = False

SPARE = 2  # a reduction in the decoder leaves this many pixels for one of the target, on each axis

MAX_PIXELS = 89_478_485  # as Pillow itself: more is taken for a decompression bomb

# Each scan of a progressive JPEG goes over the whole picture and may take a few bytes of the file.
# Encoders write about 10.
MAX_SCANS = 100
SCAN = b"\xff\xda"

# Unpacking a picture takes up to 16 bytes a pixel, so that those above LARGE take turns.
LARGE = 1 << 24  # pixels
LARGE_AT_ONCE = 2
_large = threading.BoundedSemaphore(LARGE_AT_ONCE)

# As Pillow calls them; HEIF is there if a plugin for it was imported.
FORMATS = ("AVIF", "BMP", "DIB", "GIF", "HEIF", "JPEG", "JPEG2000", "MPO", "PNG", "PPM")
FORMATS += ("TIFF", "WEBP")


class Box(NamedTuple):
    """A rectangle in pixels of the original (upright) picture."""

    top: int
    left: int
    height: int
    width: int


class Decoded(NamedTuple):
    """An upright picture of mode RGB.

    Attributes:
      image: the picture, `scale` times smaller than the original.
      size: (h, w) of the original.
    """

    image: Image.Image
    size: tuple[int, int]
    scale: int = 1


def decode(data: bytes, target: tuple[int, int] | None = None) -> Decoded:
    """The bytes of an image file -> an upright picture.

    Args:
      target: (h, w) that the picture is going to have. A JPEG at least `SPARE` times that large is
        reduced while it is decoded, which takes a fraction of the time.

    Raises:
      Rejected: "corrupt", "too_large", "unsupported" or "non_finite".
    """
    try:
        with Image.open(io.BytesIO(data), formats=_known_formats()) as image:
            if image.width * image.height > MAX_PIXELS:
                raise Rejected("too_large", f"{image.width}x{image.height} pixels")
            if image.format in ("JPEG", "MPO") and (scans := _scans(data)) > MAX_SCANS:
                raise Rejected("too_large", f"{scans} scans")
            stored = image.size
            scale = _reduce(image, target) if target else 1
            large = image.width * image.height > LARGE
            with _large if large else contextlib.nullcontext():
                image.load()
                turned = image.getexif().get(ExifTags.Base.Orientation, 1) in (5, 6, 7, 8)
                # After this the size, and every crop box, is that of the picture as a person sees
                # it.
                ImageOps.exif_transpose(image, in_place=True)
                return Decoded(_rgb(image), stored if turned else stored[::-1], scale)
    except Rejected:
        raise
    except Image.DecompressionBombError as error:
        raise Rejected("too_large", str(error)) from error
    except UnidentifiedImageError as error:
        # Its message holds a memory address, and reports of equal builds are equal.
        raise Rejected("corrupt", "no image format that Pillow knows") from error
    except Exception as error:
        # Damaged files make Pillow's decoders raise almost anything (OSError, SyntaxError,
        # struct.error, zlib.error, ...); one bad file must not end a build; the report names it.
        raise Rejected("corrupt", f"{type(error).__name__}: {error}") from error


@functools.cache
def _known_formats() -> tuple[str, ...]:
    """Those of `FORMATS` that this Pillow was built with; it refuses other names."""
    Image.init()
    return tuple(name for name in FORMATS if name in Image.OPEN)


def _scans(data: bytes) -> int:
    """How many scans of a JPEG begin; several times faster than `bytes.count`."""
    values = np.frombuffer(data, np.uint8)
    return np.count_nonzero((values[:-1] == SCAN[0]) & (values[1:] == SCAN[1]))


def _reduce(image: Image.Image, target: tuple[int, int]) -> int:
    """Tells the decoder of a JPEG to reduce by the factor that is returned."""
    if image.format not in ("JPEG", "MPO"):
        return 1
    for scale in (8, 4, 2):
        width, height = image.size
        # A side that does not divide ends in part of a pixel, which a rotation would move to the
        # front; and turned or not, the target fits into the shorter side.
        whole = width % scale == height % scale == 0
        if whole and min(image.size) >= SPARE * scale * max(target):
            drafted = image.draft(None, (width // scale, height // scale))
            assert drafted and image.size == (width // scale, height // scale), image.size
            return scale
    return 1


_EIGHT_BITS = ((np.arange(65536) * 255 + 32767) // 65535).astype(np.uint8)


def _rgb(image: Image.Image) -> Image.Image:
    """Any mode Pillow opens -> RGB, transparency over white."""
    transparency = image.info.get("transparency")
    if image.mode.startswith("I;16") or image.mode == "I":
        # Pillow's own conversion to 8 bits clips at 255: every 16-bit picture would come out white.
        values_HW = np.asarray(image)
        if values_HW.min() < 0 or values_HW.max() > 65535:
            raise Rejected("unsupported", "integer pixels outside 0..65535")
        # By a table: the arithmetic would need three arrays of 8 bytes a pixel.
        image = Image.fromarray(_EIGHT_BITS[values_HW])
        if isinstance(transparency, int):
            image.putalpha(Image.fromarray((values_HW != transparency).astype(np.uint8) * 255))
    elif image.mode == "F":
        values_HW = np.asarray(image)
        if not np.isfinite(values_HW).all():
            raise Rejected("non_finite", "float pixels with NaN or infinity")
        if values_HW.min() < 0 or values_HW.max() > 1:
            raise Rejected("unsupported", "float pixels outside [0, 1]")
        image = Image.fromarray(np.round(values_HW * 255).astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, (255, 255, 255, 255))
        image = Image.alpha_composite(white, image)
    return image if image.mode == "RGB" else image.convert("RGB")


def centre_crop(original: tuple[int, int], target: tuple[int, int]) -> Box:
    """The largest centred box of an `original` (h, w) with the aspect ratio of `target` (h, w).

    Resizing this box is the same picture as resizing the shorter side and cropping then, and the
    box is exact in pixels of the original, which is what the record keeps.
    """
    H, W = original
    target_height, target_width = target
    height, width = H, W
    if H * target_width > W * target_height:
        height = max(1, round(W * target_height / target_width))
    else:
        width = max(1, round(H * target_width / target_height))
    return Box((H - height) // 2, (W - width) // 2, height, width)


def resize(image: Image.Image, crop: Box, target: tuple[int, int], scale: int = 1) -> np.ndarray:
    """The box `crop` of an RGB picture, resampled to `target` (h, w); uint8 (h, w, 3).

    `scale` is how many times smaller than the original, which the box counts in, the picture is.

    Lanczos with its support scaled to the reduction (antialiased); a box that has the target's size
    already keeps its pixels untouched.
    """
    box = (crop.left, crop.top, crop.left + crop.width, crop.top + crop.height)
    if scale == 1 and (crop.height, crop.width) == tuple(target):
        return np.asarray(image.crop(box))
    height, width = target
    box = tuple(side / scale for side in box)
    return np.asarray(image.resize((width, height), Image.Resampling.LANCZOS, box=box))
