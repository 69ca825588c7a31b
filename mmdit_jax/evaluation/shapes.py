"""Finds the shapes in a picture and judges them against its prompt, with GenEval's categories.

The built-in captioned pictures (`mmdit_jax.data.shapes`) have few colours and shapes, so that no
detector network is needed: pixels are unmixed into background and the nearest palette colour,
connected regions of one colour are objects, and an object's shape is the one whose drawing, fitted
to the region, comes nearest. The metrics follow GenEval (Ghosh et al. 2023, arXiv:2310.11513):

    single_color, single_shape   the largest object has the colour / the shape asked for
    count                        exactly n objects, all of the shape asked for
    two_object                   both shapes are present ("a C1 S1 and a C2 S2")
    attribute                    both shapes are present, each in its colour (the same prompts)
    position                     both objects are present and the relation holds between them
    overall                      mean of the six
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from mmdit_jax.data.shapes import CATEGORIES, Prompt, prompts
from mmdit_jax.data.shapes_drawing import (
    AREA,
    BACKGROUND,
    COLORS,
    HALF_EXTENT,
    SHAPES,
    signed_distance,
)

METRICS = {
    "single_color": "single",
    "single_shape": "single",
    "count": "count",
    "two_object": "two_object",
    "position": "position",
    "attribute": "two_object",
}
"""Metric -> the category of prompts it is measured on."""

UNKNOWN = "unknown"

# A region counts as an object from this share of the picture on (the smallest object drawn covers
# 0.043), and its shape as one of the three if the best drawing overlaps it by this much
# (intersection over union); blur and noise bring good drawings down to 0.65.
_LEAST_AREA = 0.012
_LEAST_OVERLAP = 0.6
# Centres must differ by more than this share of the summed sizes before a direction counts, and the
# rest must be more than half of the distance; both as in GenEval.
_POSITION_MARGIN = 0.1

_NAMES = tuple(COLORS)
_BACKGROUND = np.asarray(BACKGROUND, np.float32)
_DIRECTIONS_KC = np.asarray([COLORS[name] for name in _NAMES], np.float32) - _BACKGROUND
_LENGTHS_K = (_DIRECTIONS_KC**2).sum(1)


class Found(NamedTuple):
    """One object found in a picture; all lengths in picture units.

    Attributes:
        shape: one of circle, square, triangle, or "unknown" if no drawing of them fits.
        color: the nearest palette colour.
        center_xy: (x, y) of the middle of the fitted shape's box.
        area: share of the picture that it covers.
        confidence: intersection over union with the fitted shape, in [0, 1].
        size_xy: width and height of the fitted shape.
    """

    shape: str
    color: str
    center_xy: tuple[float, float]
    area: float
    confidence: float
    size_xy: tuple[float, float]


def connected_regions(labels_HW: np.ndarray) -> list[np.ndarray]:
    """Masks of the 4-connected regions of equal label; negative labels are background.

    Args:
        labels_HW: int (H, W).

    Returns:
        bool (H, W) per region, in the order of their first pixel.
    """
    height, width = labels_HW.shape
    names = np.arange(height * width).reshape(height, width)
    names[labels_HW < 0] = -1
    across = (labels_HW[:, 1:] == labels_HW[:, :-1]) & (labels_HW[:, 1:] >= 0)
    down = (labels_HW[1:] == labels_HW[:-1]) & (labels_HW[1:] >= 0)
    while True:  # the smallest pixel number floods every region
        before = names.copy()
        for same, a, b in (
            (across, names[:, 1:], names[:, :-1]),
            (down, names[1:], names[:-1]),
        ):
            low = np.minimum(a, b)
            a[same] = low[same]
            b[same] = np.minimum(low, b)[same]
        if np.array_equal(before, names):
            return [names == name for name in np.unique(names[names >= 0])]


def find_objects(image: np.ndarray) -> list[Found]:
    """The objects of a picture, largest first.

    Args:
        image: uint8 (R, R, 3).

    Raises:
        ValueError: not a square uint8 picture.
    """
    image = np.asarray(image)
    if image.dtype != np.uint8 or image.shape != (len(image), len(image), 3):
        raise ValueError(
            f"picture of {image.dtype} {image.shape} is not uint8 (R, R, 3): convert it first"
        )
    least = _LEAST_AREA * image.shape[0] ** 2
    offset_HWC = image.astype(np.float32) - _BACKGROUND
    # Unmix: pixel = background + alpha * (color - background), for each of the K colours.
    alpha_HWK = offset_HWC @ _DIRECTIONS_KC.T / _LENGTHS_K
    covered_HWK = np.clip(alpha_HWK, 0, 1)
    left_HWKC = offset_HWC[..., None, :] - covered_HWK[..., None] * _DIRECTIONS_KC
    nearest_HW = np.square(left_HWKC).sum(-1).argmin(-1)
    best_HW = np.take_along_axis(covered_HWK, nearest_HW[..., None], -1)[..., 0]
    regions = connected_regions(np.where(best_HW > 0.5, nearest_HW, -1))
    regions = [region for region in regions if best_HW[region].sum() > least]
    taken = np.any([np.zeros_like(nearest_HW, bool), *regions], axis=0)
    found = []
    for region in regions:
        # The faint rim belongs to the object too: two pixels around, but no other object's.
        near_HW = _dilate(_dilate(region)) & (region | ~taken)
        color = int(nearest_HW[region][0])
        found.append(_fit(alpha_HWK[..., color], near_HW, _NAMES[color]))
    return sorted(found, key=lambda item: -item.area)


def _dilate(mask_HW: np.ndarray) -> np.ndarray:
    wide = np.pad(mask_HW, 1)
    rows = wide[:-2] | wide[1:-1] | wide[2:]
    return rows[:, :-2] | rows[:, 1:-1] | rows[:, 2:]


# How far the centre of mass lies below the middle of the box, in radii.
_MASS_BELOW = {"circle": 0.0, "square": 0.0, "triangle": HALF_EXTENT["triangle"][1] / 3}
# What the fit tries around the size and place that follow from the mask's mass: factors, shifts in
# pixels, widths of the rim in pixels.
_SCALES = (0.92, 1.0, 1.08)
_SHIFT_X, _SHIFT_Y = (grid.ravel()[:, None, None] for grid in np.meshgrid(*[(-0.3, 0.0, 0.3)] * 2))
_SOFTNESS = (0.0, 1.5)


def _fit(alpha_HW: np.ndarray, near_HW: np.ndarray, color: str) -> Found:
    """The nearest drawing of a soft mask: shapes x sizes x subpixel places x sharpness."""
    resolution = len(alpha_HW)
    ends = [np.flatnonzero(near_HW.any(axis))[[0, -1]] for axis in (1, 0)]
    rows, columns = (np.arange(first, last + 1) for first, last in ends)
    mask_HW = np.where(near_HW, alpha_HW, 0)[np.ix_(rows, columns)]
    # Faint pixels stay out of the moments: with many of them around, noise would move the size.
    solid_HW = np.where(mask_HW > 0.1, np.minimum(mask_HW, 1), 0)
    mass = float(solid_HW.sum())
    mass_x = float(solid_HW.sum(0) @ (columns + 0.5)) / mass
    mass_y = float(solid_HW.sum(1) @ (rows + 0.5)) / mass
    # Large objects need no subpixels: the slope of the rim is enough.
    subpixels = 4 if resolution <= 16 else 2 if resolution <= 32 else 1
    steps = (np.arange(subpixels) + 0.5) / subpixels
    x = (columns[:, None] + steps).astype(np.float32).reshape(1, 1, -1) - mass_x
    y = (rows[:, None] + steps).astype(np.float32).reshape(1, -1, 1) - mass_y
    best_error, best = np.inf, None
    for shape in SHAPES:
        for scale in _SCALES:
            radius = scale * np.sqrt(mass / AREA[shape])
            below = _MASS_BELOW[shape] * radius
            distance = signed_distance(shape, x - _SHIFT_X, y + below - _SHIFT_Y, radius)
            for softness in _SOFTNESS:
                cover = np.clip(0.5 - distance / max(softness, 1 / subpixels), 0, 1)
                cover = cover.reshape(-1, len(rows), subpixels, len(columns), subpixels)
                cover_PHW = cover.mean((2, 4))
                error = np.square(cover_PHW - mask_HW).sum((1, 2))
                at = int(error.argmin())
                if error[at] < best_error:
                    center = mass_x + _SHIFT_X[at].item(), mass_y - below + _SHIFT_Y[at].item()
                    best_error, best = error[at], (shape, center, radius, cover_PHW[at])
    shape, center, radius, cover_HW = best
    mask_HW = np.clip(mask_HW, 0, 1)
    overlap = np.minimum(cover_HW, mask_HW).sum() / np.maximum(cover_HW, mask_HW).sum()
    return Found(
        shape=shape if overlap >= _LEAST_OVERLAP else UNKNOWN,
        color=color,
        center_xy=(center[0] / resolution, center[1] / resolution),
        area=mass / resolution**2,
        confidence=float(overlap),
        size_xy=tuple(float(2 * half * radius / resolution) for half in HALF_EXTENT[shape]),
    )


def holds(relation: str, first: Found, second: Found) -> bool:
    """Whether the first object is `relation` the second, as GenEval decides it.

    The offset between the centres, less a tenth of the two objects' widths (heights), must make up
    more than half of the distance in the asked direction; a diagonal pair may therefore be both
    left of and above.
    """
    offset = np.subtract(first.center_xy, second.center_xy)
    margin = _POSITION_MARGIN * np.add(first.size_xy, second.size_xy)
    beyond = np.maximum(np.abs(offset) - margin, 0) * np.sign(offset)
    dx, dy = beyond / max(float(np.hypot(*offset)), 1e-6)
    return bool(
        {"left of": dx < -0.5, "right of": dx > 0.5, "above": dy < -0.5, "below": dy > 0.5}[
            relation
        ]
    )


def score(prompt: Prompt, found: Sequence[Found]) -> dict[str, bool]:
    """What a picture's objects get right of a prompt: the metrics of the prompt's category."""
    spec = prompt.spec
    shapes = [item.shape for item in found]
    if spec.category == "single":
        largest = max(found, key=lambda item: item.area, default=None)
        return {
            "single_color": largest is not None and largest.color == spec.colors[0],
            "single_shape": largest is not None and largest.shape == spec.shapes[0],
        }
    if spec.category == "count":
        return {"count": shapes == [spec.shapes[0]] * spec.count}
    first, second = (
        [item for item in found if (item.shape, item.color) == asked]
        for asked in zip(spec.shapes, spec.colors, strict=True)
    )
    if spec.category == "two_object":
        return {
            "two_object": all(shapes.count(s) >= spec.shapes.count(s) for s in spec.shapes),
            "attribute": bool(first and second),
        }
    return {"position": any(holds(spec.relation, a, b) for a in first for b in second)}


def summarize(results: Sequence[dict[str, bool]]) -> dict[str, float]:
    """Mean of every metric over the pictures judged by it, and "overall", the mean of the six.

    A metric that no picture was judged by is left out, and "overall" with it.
    """
    means = {}
    for metric in METRICS:
        values = [result[metric] for result in results if metric in result]
        if values:
            means[metric] = float(np.mean(values))
    if len(means) == len(METRICS):
        means["overall"] = float(np.mean(list(means.values())))
    return means


def judge(asked: Sequence[Prompt], images: np.ndarray) -> list[dict]:
    """Per picture: the prompt, what was found, and the scores; JSON-able.

    Args:
        asked: N prompts.
        images: uint8 (N, R, R, 3), one per prompt.

    Raises:
        ValueError: another number of pictures than prompts, or not uint8 (R, R, 3).
    """
    if len(images) != len(asked):
        raise ValueError(
            f"{len(images)} pictures for {len(asked)} prompts: give one picture per prompt"
        )
    records = []
    for prompt, image in zip(asked, images, strict=True):
        found = find_objects(image)
        records.append(
            {
                "prompt": prompt.text,
                "category": prompt.spec.category,
                "found": [item._asdict() for item in found],
                "scores": score(prompt, found),
            }
        )
    return records


def evaluate(
    sample_fn: Callable[[list[str]], np.ndarray],
    asked: Sequence[Prompt] | None = None,
    *,
    images_per_prompt: int = 4,
    records: list[dict] | None = None,
) -> dict[str, float]:
    """Samples pictures of prompts and scores them.

    Args:
        sample_fn: texts -> uint8 (len(texts), R, R, 3); called once, with the repetitions of a
            prompt next to each other.
        asked: the prompts; by default all that are held out from training.
        images_per_prompt: pictures of every prompt.
        records: if given, the record of every picture (`judge`) is appended.

    Returns:
        The metrics (`METRICS`), "overall", and "n_<category>", the pictures of each category.

    Raises:
        ValueError: sample_fn returned another number of pictures, or not uint8 (R, R, 3).
    """
    if asked is None:
        asked = [prompt for category in CATEGORIES for prompt in prompts(category)]
    asked = [prompt for prompt in asked for _ in range(images_per_prompt)]
    judged = judge(asked, np.asarray(sample_fn([prompt.text for prompt in asked])))
    if records is not None:
        records.extend(judged)
    counts = {
        f"n_{category}": sum(prompt.spec.category == category for prompt in asked)
        for category in CATEGORIES
    }
    return {**summarize([record["scores"] for record in judged]), **counts}
