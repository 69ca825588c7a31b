"""Where captioned pictures come from, by the name that `--source` gives.

    shapes                the built-in captioned pictures (mmdit_jax/data/shapes.py), drawn
    folder:DIR            a folder of images with captions (data_pipelines/sources/folders.py)
    jsonl:FILE            lines that name a picture and caption it (data_pipelines/sources/jsonl.py)
    webdataset:GLOB       tar files (data_pipelines/sources/tars.py)
    parquet:GLOB          tables (data_pipelines/sources/parquet.py)
    tfds:NAME[@DATA_DIR]  what TensorFlow Datasets has prepared (data_pipelines/sources/tfds.py)

A source lists its samples in a fixed order and reads the bytes of one: everything after that is the
same for all of them.
"""

import io
import json
from collections import Counter

from PIL import Image

from data_pipelines.samples import Caption, Dropped, Options, Sample, Source, validation_size
from data_pipelines.sources.folders import Folder
from data_pipelines.sources.jsonl import Lines
from data_pipelines.sources.parquet import Parquet
from data_pipelines.sources.tars import Tars
from data_pipelines.sources.tfds import Tfds
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


SOURCES = {
    "shapes": _shapes,
    "folder": Folder,
    "jsonl": Lines,
    "webdataset": Tars,
    "parquet": Parquet,
    "tfds": Tfds,
}
ARGUMENTS = {
    "folder": "DIR",
    "jsonl": "FILE",
    "webdataset": "GLOB",
    "parquet": "GLOB",
    "tfds": "NAME@DATA_DIR",
}


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
    if name in ARGUMENTS and not argument:
        raise ValueError(
            f"--source={name} names no {ARGUMENTS[name]}; use --source={name}:{ARGUMENTS[name]}"
        )
    if name in ARGUMENTS and options.count is not None:
        raise ValueError(
            f"--count={options.count} has no effect: --source={spec} is used whole; leave it out"
        )
    return SOURCES[name](argument, options)
