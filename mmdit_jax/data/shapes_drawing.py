"""Drawing of the built-in pictures: flat coloured shapes on a dark plain background.

Coordinates lie in [0, 1] with x to the right and y down, so that one scene draws at every
resolution. Nothing here knows captions: `mmdit_jax.data.shapes` says what a scene shows, this file
says how it looks.
"""

import math
from typing import NamedTuple

import numpy as np

SHAPES = ("circle", "square", "triangle")

# The six saturated corners of the RGB cube, softened: each is more than 120 levels away from every
# other and from the background, so that a noisy or blurred sample still has one nearest colour.
COLORS = {
    "red": (236, 54, 56),
    "green": (62, 200, 84),
    "blue": (48, 92, 250),
    "yellow": (255, 212, 48),
    "purple": (198, 66, 232),
    "cyan": (60, 216, 236),
}
BACKGROUND = (18, 20, 28)

# Half the side of the square, half the base and half the height of the triangle, in units of the
# radius. Chosen so that the three shapes of one radius look equally large.
SQUARE_HALF_SIDE = 0.9
TRIANGLE_HALF_BASE = 1.12
TRIANGLE_HALF_HEIGHT = 0.975

AREA = {
    "circle": math.pi,
    "square": 4 * SQUARE_HALF_SIDE**2,
    "triangle": 2 * TRIANGLE_HALF_BASE * TRIANGLE_HALF_HEIGHT,
}
"""Area of each shape in units of the squared radius."""

HALF_EXTENT = {
    "circle": (1.0, 1.0),
    "square": (SQUARE_HALF_SIDE, SQUARE_HALF_SIDE),
    "triangle": (TRIANGLE_HALF_BASE, TRIANGLE_HALF_HEIGHT),
}
"""Half the width and half the height of each shape's box, in units of the radius."""

SUBPIXELS = 4


class Object(NamedTuple):
    """One shape: name, colour, the centre (x, y) of its box and its radius in picture units."""

    shape: str
    color: str
    center: tuple[float, float]
    radius: float

    @property
    def box(self) -> tuple[float, float, float, float]:
        """Left, top, right, bottom in picture units."""
        (x, y), (w, h) = self.center, HALF_EXTENT[self.shape]
        return x - w * self.radius, y - h * self.radius, x + w * self.radius, y + h * self.radius


def signed_distance(shape: str, x: np.ndarray, y: np.ndarray, radius: float) -> np.ndarray:
    """Distance of points to a shape's outline around the origin, negative inside.

    Outside of a corner it is the distance to the nearest edge's line, which is all that
    anti-aliasing needs.

    Args:
        shape: one of `SHAPES`.
        x: coordinates relative to the centre of the shape's box; broadcasts against y.
        y: the same, downwards.
        radius: in the unit of x and y.
    """
    if shape == "circle":
        return np.sqrt(x * x + y * y) - radius
    if shape == "square":
        return np.maximum(np.abs(x), np.abs(y)) - SQUARE_HALF_SIDE * radius
    width, height = TRIANGLE_HALF_BASE * radius, 2 * TRIANGLE_HALF_HEIGHT * radius
    side = (np.abs(x) * height - (y + height / 2) * width) / math.hypot(width, height)
    return np.maximum(side, y - height / 2)


def coverage(shape: str, center: tuple[float, float], radius: float, resolution: int) -> np.ndarray:
    """Share of every pixel that a shape covers, float32 (R, R) in [0, 1].

    Args:
        shape: one of `SHAPES`.
        center: (x, y) of the shape's box, picture units.
        radius: picture units.
        resolution: R, pixels on a side.
    """
    cover = np.zeros((resolution, resolution), np.float32)
    half = np.multiply(HALF_EXTENT[shape], radius)
    low = np.maximum(np.floor((np.asarray(center) - half) * resolution), 0).astype(int)
    high = np.minimum(np.ceil((np.asarray(center) + half) * resolution), resolution).astype(int)
    (columns, rows) = np.maximum(high - low, 0)
    if rows == 0 or columns == 0:
        return cover
    scale = resolution * SUBPIXELS
    x = (np.arange(columns * SUBPIXELS, dtype=np.float32) + 0.5) / scale
    y = (np.arange(rows * SUBPIXELS, dtype=np.float32) + 0.5) / scale
    x += np.float32(low[0] / resolution - center[0])
    y += np.float32(low[1] / resolution - center[1])
    distance = signed_distance(shape, x[None, :], y[:, None], radius)
    inside = np.clip(0.5 - distance * np.float32(scale), 0, 1)
    blocks = inside.reshape(rows, SUBPIXELS, columns, SUBPIXELS)
    cover[low[1] : high[1], low[0] : high[0]] = blocks.mean((1, 3))
    return cover


def draw_objects(objects: tuple[Object, ...], resolution: int) -> np.ndarray:
    """Objects on the background, uint8 (R, R, 3), the later over the earlier."""
    picture = np.empty((resolution, resolution, 3), np.float32)
    picture[:] = BACKGROUND
    for item in objects:
        cover = coverage(item.shape, item.center, item.radius, resolution)[..., None]
        picture += cover * (np.asarray(COLORS[item.color], np.float32) - picture)
    return np.round(picture).astype(np.uint8)
