"""Reading and decoding pictures, many at a time, in order."""

import hashlib
import itertools
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np

from data_pipelines.samples import Rejected, Sample, Source
from data_pipelines.stage_times import READ, RESIZE, StageTimes
from data_pipelines.stages import images
from data_pipelines.stages.filters import Rules
from mmdit_jax.data.buckets import nearest
from mmdit_jax.data.manifest import Bucket

TOGETHER = 8  # pictures per task: handing over a small one costs as much as decoding it


class Checked(NamedTuple):
    """A sample that can be used.

    Attributes:
      sample: the sample.
      sha256: of its file; "" if the source draws it and nobody looked before.
      bucket: index of the picture size whose aspect is nearest to its own.
    """

    sample: Sample
    sha256: str = ""
    bucket: int = 0


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
    """The pictures of a source, each at the one of some sizes that its aspect is nearest to.

    Pillow decodes outside Python's global lock, so threads are enough. A picture's own faults come
    back as a `Rejected` in its place; nothing else is swallowed.
    """

    def __init__(
        self,
        source: Source,
        pool: ThreadPoolExecutor,
        *,
        sizes: Sequence[Bucket],
        rules: Rules,
        window: int,
        times: StageTimes | None = None,
    ):
        """`window`: how many pictures are under way at once, which bounds the memory; `times`:
        counts what preparing them takes."""
        self._source, self._pool, self._window = source, pool, window
        self._sizes, self._rules = sizes, rules
        self._times = times or StageTimes()

    def at_size(self, size: Bucket) -> "Pictures":
        """The same pictures, all at one size."""
        return Pictures(
            self._source,
            self._pool,
            sizes=(size,),
            rules=self._rules,
            window=self._window,
            times=self._times,
        )

    def checked(self, samples: Iterable[Sample]) -> Iterator[Checked | Rejected]:
        """Looks at each file, in order; accepts pictures that decode and are wanted."""
        return self._in_order(self._check, samples)

    def prepared(self, items: Iterable[Checked]) -> Iterator[Picture | Rejected]:
        """Each picture cropped and resized, in order.

        Raises:
          ValueError: a file is not the one that was checked.
        """
        return self._in_order(self._prepare, items)

    def _check(self, sample: Sample) -> Checked | Rejected:
        try:
            self._rules.before(sample)
            data = self._source.read(sample)
            # However much a JPEG is reduced, all of its file is unpacked: damage shows.
            size = images.decode(data, (1, 1)).size
            self._rules.after(sample, size)
        except Rejected as rejected:
            return rejected
        return Checked(sample, hashlib.sha256(data).hexdigest(), nearest(self._sizes, *size))

    def _prepare(self, item: Checked) -> Picture | Rejected:
        # Of one size there is no choice, whatever the item was checked for.
        bucket = self._sizes[item.bucket if len(self._sizes) > 1 else 0]
        target = bucket.height, bucket.width
        try:
            with self._times.spent(READ):
                data = self._source.read(item.sample)
                sha256 = hashlib.sha256(data).hexdigest()
                if item.sha256 and sha256 != item.sha256:
                    raise ValueError(
                        f"{item.sample.name} changed while the data set was being built; "
                        "leave the source alone and start again with --overwrite"
                    )
                image, size, scale = images.decode(data, target)
                self._rules.check_size(size)
        except Rejected as rejected:
            return rejected
        with self._times.spent(RESIZE):
            crop = images.centre_crop(size, target)
            return Picture(images.resize(image, crop, target, scale), size, crop, sha256)

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
