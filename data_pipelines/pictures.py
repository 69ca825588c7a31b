"""Reading and decoding pictures, many at a time, in order."""

import hashlib
import itertools
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np

from data_pipelines import images
from data_pipelines.samples import Rejected, Sample, Source

TOGETHER = 8  # pictures per task: handing over a small one costs as much as decoding it


class Checked(NamedTuple):
    """A sample and the sha256 of its file; "" if the source draws it and nobody looked before."""

    sample: Sample
    sha256: str = ""


class Picture(NamedTuple):
    """A picture as the autoencoder gets it.

    Attributes:
      pixels_HWC: uint8 RGB of the target size.
      original_size: (h, w) of the upright original, pixels.
      crop: the part of the original that `pixels_HWC` shows.
      sha256: of the bytes of the file.
    """

    pixels_HWC: np.ndarray
    original_size: tuple[int, int]
    crop: images.Box
    sha256: str


class Pictures:
    """The pictures of a source, at the size `target` (h, w).

    Pillow decodes outside Python's global lock, so threads are enough. A picture's own faults come
    back as a `Rejected` in its place; nothing else is swallowed.
    """

    def __init__(
        self,
        source: Source,
        pool: ThreadPoolExecutor,
        *,
        target: tuple[int, int],
        min_size: int,
        window: int,
    ):
        """`window`: how many pictures are under way at once, which bounds the memory."""
        self._source, self._pool, self._window = source, pool, window
        self._target, self._min_size = target, min_size

    def checked(self, samples: Iterable[Sample]) -> Iterator[str | Rejected]:
        """The sha256 of each file, in order; only pictures that decode have one."""
        return self._in_order(self._check, samples)

    def prepared(self, items: Iterable[Checked]) -> Iterator[Picture | Rejected]:
        """Each picture cropped and resized, in order.

        Raises:
          ValueError: a file is not the one that was checked.
        """
        return self._in_order(self._prepare, items)

    def _check(self, sample: Sample) -> str | Rejected:
        try:
            data = self._source.read(sample)
            images.check_size(images.decode(data), self._min_size)
        except Rejected as rejected:
            return rejected
        return hashlib.sha256(data).hexdigest()

    def _prepare(self, item: Checked) -> Picture | Rejected:
        try:
            data = self._source.read(item.sample)
            sha256 = hashlib.sha256(data).hexdigest()
            if item.sha256 and sha256 != item.sha256:
                raise ValueError(
                    f"{item.sample.name} changed while the data set was being built; "
                    "leave the source alone and start again with --overwrite"
                )
            image = images.decode(data)
            images.check_size(image, self._min_size)
        except Rejected as rejected:
            return rejected
        size = (image.height, image.width)
        crop = images.centre_crop(size, self._target)
        return Picture(images.resize(image, crop, self._target), size, crop, sha256)

    def _in_order(self, function: Callable[[Any], Any], items: Iterable[Any]) -> Iterator[Any]:
        def several(some: list[Any]) -> list[Any]:
            return [function(item) for item in some]

        remaining = iter(items)
        waiting: deque[Future] = deque()
        try:
            while some := list(itertools.islice(remaining, TOGETHER)):
                waiting.append(self._pool.submit(several, some))
                if len(waiting) * TOGETHER >= self._window:
                    yield from waiting.popleft().result()
            while waiting:
                yield from waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()
