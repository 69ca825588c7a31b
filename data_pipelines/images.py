"""From the bytes of an image file to a uint8 RGB picture of the wanted size.

    decode          bytes -> upright RGB: EXIF rotation applied, transparency over white, palettes
                    and greys expanded, 16-bit greys scaled (not clipped), CMYK converted
    centre_crop     the largest centred box of the target's aspect ratio
    resize          crop and antialiased (Lanczos) resize in one step

Colour profiles are not applied. Of a file with several frames the first counts. Whatever is wrong
with a file is raised as `Rejected`, so that the report can name it.
"""

import io
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageFile, ImageOps, UnidentifiedImageError

from data_pipelines.samples import Rejected

# A truncated file must fail, not come back half grey.
ImageFile.LOAD_TRUNCATED_IMAGES = False

MAX_PIXELS = 89_478_485  # as Pillow itself: more is taken for a decompression bomb


class Box(NamedTuple):
    """A rectangle in pixels of the original (upright) picture."""

    top: int
    left: int
    height: int
    width: int


def decode(data: bytes) -> Image.Image:
    """The bytes of an image file -> an upright picture of mode RGB.

    Raises:
      Rejected: "corrupt", "too_large", "unsupported" or "non_finite".
    """
    try:
        with Image.open(io.BytesIO(data)) as image:
            if image.width * image.height > MAX_PIXELS:
                raise Rejected("too_large", f"{image.width}x{image.height} pixels")
            image.load()
            # After this the size, and every crop box, is that of the picture as a person sees it.
            return _rgb(ImageOps.exif_transpose(image))
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


def _rgb(image: Image.Image) -> Image.Image:
    """Any mode Pillow opens -> RGB, transparency over white."""
    transparency = image.info.get("transparency")
    if image.mode.startswith("I;16") or image.mode == "I":
        # Pillow's own conversion to 8 bits clips at 255: every 16-bit picture would come out white.
        values_HW = np.asarray(image).astype(np.int64)
        if values_HW.min() < 0 or values_HW.max() > 65535:
            raise Rejected("unsupported", "integer pixels outside 0..65535")
        image = Image.fromarray(((values_HW * 255 + 32767) // 65535).astype(np.uint8))
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
    return image.convert("RGB")


def check_size(image: Image.Image, min_size: int) -> None:
    """Raises `Rejected` if the shorter side is below `min_size` pixels."""
    if min(image.size) < min_size:
        raise Rejected(
            "too_small", f"{image.width}x{image.height} pixels, --min_size is {min_size}"
        )


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


def resize(image: Image.Image, crop: Box, target: tuple[int, int]) -> np.ndarray:
    """The box `crop` of an RGB picture, resampled to `target` (h, w); uint8 (h, w, 3).

    Lanczos with its support scaled to the reduction (antialiased); a box that has the target's size
    already keeps its pixels untouched.
    """
    box = (crop.left, crop.top, crop.left + crop.width, crop.top + crop.height)
    if (crop.height, crop.width) == tuple(target):
        return np.asarray(image.crop(box))
    height, width = target
    return np.asarray(image.resize((width, height), Image.Resampling.LANCZOS, box=box))
