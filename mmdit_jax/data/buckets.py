"""Picture sizes of equal area and different aspect: which there are, and which one fits a picture.

As in SDXL (Podell et al. 2023, App. I): all sides are multiples of a step, no size has more pixels
than the square, and a picture goes to the size whose aspect ratio is nearest, in the logarithm, so
that 2:1 is as far from the square as 1:2.
"""

import math
from collections.abc import Sequence

from mmdit_jax.data.manifest import Bucket


def aspect_buckets(resolution: int, step: int, max_aspect: float) -> tuple[Bucket, ...]:
    """The sizes, from the lowest and widest to the highest and narrowest.

    For every shorter side the longest other side that keeps the area.

    Args:
      resolution: Side of the square, in pixels; its area is the largest.
      step: Every side is a multiple of it.
      max_aspect: Longer side / shorter side is at most this.

    Raises:
      ValueError: The square is not among them, or there is no limit to the aspect.
    """
    if step < 1 or resolution < step or resolution % step:
        near = max(1, round(resolution / step)) * step if step > 0 else 0
        raise ValueError(
            f"resolution {resolution} is no multiple of the bucket step {step}, the square is one "
            f"of the buckets: use {f'resolution {near}' if near else 'a step of at least 1'} or a "
            "step that divides the resolution"
        )
    if not 1 <= max_aspect < math.inf:
        raise ValueError(
            f"max aspect {max_aspect:g} is no longer side / shorter side, which is at least 1: "
            "use for example 2"
        )
    buckets = set()
    for short in range(step, resolution + 1, step):
        long = resolution * resolution // short // step * step
        if long <= max_aspect * short:
            buckets |= {Bucket(short, long), Bucket(long, short)}
    return tuple(sorted(buckets, key=lambda bucket: (bucket.height / bucket.width, bucket.height)))


def nearest(buckets: Sequence[Bucket], height: int, width: int) -> int:
    """Index of the bucket whose aspect is nearest to a picture's; of equals the one with more area.

    Args:
      buckets: At least one.
      height: Of the picture, any unit.
      width: Likewise.
    """

    def distance(index: int) -> tuple[float, int]:
        bucket = buckets[index]
        ratio = abs(math.log(height * bucket.width / (width * bucket.height)))
        return ratio, -bucket.height * bucket.width

    return min(range(len(buckets)), key=distance)


def parse_size(text: str) -> Bucket:
    """Reads a picture size as people write it in commands: HEIGHTxWIDTH, in pixels.

    Raises:
      ValueError: It is not written so.
    """
    height, _, width = text.strip().lower().partition("x")
    if not (height.isdigit() and width.isdigit()):
        raise ValueError(f"size {text!r} is not HEIGHTxWIDTH in pixels: write it as 768x1344")
    return Bucket(int(height), int(width))


def check_size(size: Bucket, *, unit: int, patch: int, grid: int) -> None:
    """Refuses a picture size that a model cannot take.

    Args:
      size: In pixels.
      unit: Pixels an axis that become one latent position.
      patch: Latent positions an axis of one patch.
      grid: Patches an axis that the position grid holds.

    Raises:
      ValueError: A side is no multiple of unit x patch, or needs more patches than the grid has.
    """
    pixels = unit * patch
    if min(size.height, size.width) < pixels or size.height % pixels or size.width % pixels:
        near = "x".join(str(max(1, round(s / pixels)) * pixels) for s in (size.height, size.width))
        raise ValueError(
            f"a picture of {size} px has a side that is no multiple of {pixels} (factor {unit} x "
            f"patch {patch}): use {near}"
        )
    patches = max(size.height, size.width) // pixels
    if patches > grid:
        raise ValueError(
            f"a picture of {size} px is {patches} patches long, the position grid holds {grid}: "
            f"set model.pos_embed_max_size={patches} or more, or leave out such pictures"
        )


def batch_size(tokens: int, budget: int, multiple: int) -> int:
    """Samples of `tokens` tokens each that fit into a budget of tokens.

    Args:
      tokens: Of one sample.
      budget: Of a batch.
      multiple: The result is a multiple of it.

    Raises:
      ValueError: Not even `multiple` samples fit.
    """
    size = budget // tokens // multiple * multiple
    if not size:
        raise ValueError(
            f"{multiple} samples of {tokens} tokens exceed the {budget} tokens of a batch "
            "(batch_size squares): set data.batch_multiple to a smaller divisor of batch_size"
        )
    return size
