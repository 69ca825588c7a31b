"""Where captioned pictures come from, by the name that `--source` gives.

    shapes        the built-in captioned pictures (mmdit_jax/data/shapes.py), drawn as PNG files
    folder:DIR    a folder of images with captions (data_pipelines/folders.py)

A source lists its samples in a fixed order and reads the bytes of one: everything after that is the
same for all of them.
"""

import io
import json
from collections import Counter

from PIL import Image

from data_pipelines.folders import Folder
from data_pipelines.samples import Caption, Dropped, Options, Sample, Source, validation_size
from mmdit_jax.data import shapes


class Shapes:
    """The built-in pictures; both splits are drawn from their own random numbers."""

    def __init__(self, options: Options):
        self._seed, self._resolution = options.seed, options.resolution
        count = 16_000 if options.count is None else options.count
        self.dropped: list[Dropped] = []
        self.ignored: Counter[str] = Counter()
        self.samples = [self._sample("train", index) for index in range(count)]
        for index in range(validation_size(count, options)):
            self.samples.append(self._sample("validation", index))

    def _sample(self, split: str, index: int) -> Sample:
        scene = self._scene(split, index)
        captions = tuple(Caption(text, kind) for kind, text in scene.captions.items())
        objects = json.dumps(scene.to_json())
        return Sample(f"{split}/{index:07d}", captions, split=split, objects=objects)

    def _scene(self, split: str, index: int) -> shapes.Scene:
        scene = shapes.train_scene if split == "train" else shapes.validation_scene
        return scene(self._seed, index)

    def read(self, sample: Sample) -> bytes:
        """The picture as a PNG file, so that it takes the way of every other picture."""
        split, index = sample.name.split("/")
        picture = shapes.draw(self._scene(split, int(index)), self._resolution)
        file = io.BytesIO()
        # Not compressed: these bytes are read right back and never stored.
        Image.fromarray(picture).save(file, "PNG", compress_level=0)
        return file.getvalue()


def _shapes(argument: str, options: Options) -> Source:
    if argument:
        raise ValueError(
            f"--source=shapes:{argument} has an argument, the built-in pictures take none; "
            "use --source=shapes with --count and --seed"
        )
    return Shapes(options)


def _folder(argument: str, options: Options) -> Source:
    if not argument:
        raise ValueError("--source=folder names no folder; use --source=folder:DIR")
    if options.count is not None:
        raise ValueError(
            f"--count={options.count} is for --source=shapes, a folder is used whole; leave it out"
        )
    return Folder(argument, options)


SOURCES = {"shapes": _shapes, "folder": _folder}


def open_source(spec: str, options: Options) -> Source:
    """`--source` -> its samples.

    Raises:
      ValueError: no such source, no such folder, or no image in it.
    """
    name, _, argument = spec.partition(":")
    if name not in SOURCES:
        raise ValueError(
            f"--source={spec} is unknown; use one of {', '.join(SOURCES)} (folder as folder:DIR)"
        )
    return SOURCES[name](argument, options)
