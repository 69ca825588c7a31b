"""The source `tfds:NAME[@DATA_DIR]`: a data set that TensorFlow Datasets has prepared.

NAME as TFDS knows it (`coco_captions/2014`); it has to be there in the ArrayRecord format, which
needs no tensorflow to read:

    tfds build NAME --file_format=array_record          (this needs tensorflow)
    tfds convert_format ... --out_file_format=array_record

The picture is the only Image feature, or the one that --image_field names. Captions are features of
text under the names of entries.py or of --caption_fields; a class label named there
is a caption too, its name with spaces for underscores. --tfds_split takes the notation of TFDS
(`train`, `train+test`, `train[:10%]`).
"""

import contextlib
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from etils import epath

from data_pipelines.samples import Dropped, Options, Rejected, Sample
from data_pipelines.sources import entries
from data_pipelines.sources.sharded import Index, list_shards, sample_name
from mmdit_jax import strict_json

FEATURES = ("features.json", "*/features.json", "*/*/features.json")  # NAME/CONFIG/VERSION


class Tfds:
    """The examples of one split."""

    def __init__(self, argument: str, options: Options):
        import tensorflow_datasets as tfds  # takes seconds
        from tensorflow_datasets.core.utils import file_utils

        self._options, self._spec = options, f"--source=tfds:{argument}"
        name, _, data_dir = argument.partition("@")
        _refuse_code(name, file_utils.list_data_dirs(data_dir or None), self._spec)
        try:
            builder = tfds.builder(name, data_dir=data_dir or None)
        except Exception as error:  # of many types, and most are not errors of ours
            raise ValueError(
                f"{self._spec} is not to be had ({type(error).__name__}: {error}); prepare it with "
                "tfds build --file_format=array_record, or give its folder as NAME@DATA_DIR"
            ) from error
        self._features: Mapping[str, Any] = builder.info.features or {}
        self._image = self._image_feature(tfds)
        self._captions = self._caption_features(tfds)
        try:
            self._data = builder.as_data_source(
                options.tfds_split, decoders={self._image: tfds.decode.SkipDecoding()}
            )
        except Exception as error:  # as above; the message of TFDS says what it misses
            raise ValueError(
                f"{self._spec} cannot be read as --tfds_split={options.tfds_split} of "
                f"{', '.join(builder.info.splits) or 'nothing'} ({error}); it has to be prepared "
                "with --file_format=array_record"
            ) from error
        self.samples, self.dropped, self.ignored = list_shards(
            [str(builder.data_path)], lambda path, name: self._read_index(), options
        )

    def _image_feature(self, tfds: Any) -> str:
        images = [n for n, f in self._features.items() if isinstance(f, tfds.features.Image)]
        wanted = self._options.image_field
        if wanted in images or (len(images) == 1 and not wanted):
            return wanted or images[0]
        raise ValueError(
            f"{self._spec} has the Image features {images} among {sorted(self._features)}; "
            f"{f'--image_field={wanted} is none of them' if wanted else 'one is needed'}: "
            "name one with --image_field"
        )

    def _caption_features(self, tfds: Any) -> dict[str, str]:
        keys = entries.caption_keys(self._options)
        found = {name: kind for name, kind in keys.items() if name in self._features}
        if not found:
            raise ValueError(
                f"{self._spec} has the features {sorted(self._features)} and none of the captions "
                f"{', '.join(keys)}; name one with --caption_fields"
            )
        return found

    def _entry(self, example: Mapping[str, Any]) -> dict[str, Any]:
        """An example without its picture, as Python values; labels by their names."""
        return {
            name: _plain(value, getattr(self._features[name], "int2str", None))
            for name, value in example.items()
            if name != self._image
        }

    def _example(self, row: int) -> Mapping[str, Any]:
        try:
            return self._data[row]
        except Exception as error:  # a damaged record, or one that is no example, raises anything
            raise Rejected("corrupt", f"{type(error).__name__}: {error}") from error

    def _read_index(self) -> Index:
        index = Index([], [], Counter())
        for row in range(len(self._data)):
            name = sample_name(self._options.tfds_split, f"{row:07d}")
            try:
                entry = self._entry(self._example(row))
                captions = tuple(dict.fromkeys(entries.captions_in(entry, self._captions)))
                if not captions:
                    raise Rejected("no_caption", f"nothing in {', '.join(self._captions)}")
            except Rejected as error:
                index.dropped.append(Dropped(name, error.reason, error.detail))
                continue
            fields = entries.fields_in(entry, self._options)
            index.samples.append(Sample(name, captions, location=(row,), fields=fields))
        return index

    def read(self, sample: Sample) -> bytes:
        """The bytes of the picture, as they were encoded; raises `Rejected`."""
        value = self._example(sample.location[1])[self._image]
        if not isinstance(value, bytes):
            raise Rejected("unsupported", f"a {type(value).__name__} instead of encoded bytes")
        return value


def _refuse_code(name: str, folders: Sequence[epath.PathLike], spec: str) -> None:
    """Refuses what would make TFDS run code that the data names.

    NAMESPACE:NAME fetches a program, and features.json of a prepared data set names Python classes,
    whose modules TFDS imports.
    """
    if re.match(r"[^/:]+:[^\d*]", name):
        raise ValueError(
            f"{spec} is the program of a namespace, which would be run; prepare the data set "
            "yourself and give NAME@DATA_DIR"
        )
    parts = [part for part in name.partition(":")[0].split("/") if part]
    roots = [epath.Path(folder, *parts) for folder in folders]
    for file in (f for root in roots for pattern in FEATURES for f in root.glob(pattern)):
        foreign = [n for n in _class_names(file) if not n.startswith("tensorflow_datasets.")]
        if foreign:
            raise ValueError(
                f"{file} names the class {foreign[0]!r}, whose code would be run; only features of "
                "tensorflow_datasets are read: convert the data set"
            )


def _class_names(file: epath.Path) -> Iterator[str]:
    """Every Python class that a features.json names, at any depth."""
    try:
        waiting = [strict_json.parse(file.read_text())]
    except ValueError as error:
        raise ValueError(f"{file} is not JSON ({error}); prepare the data set again") from error
    while waiting:
        value = waiting.pop()
        if isinstance(value, dict):
            for key in ("pythonClassName", "python_class_name", "type"):
                if isinstance(value.get(key), str) and "." in value[key]:
                    yield value[key]
            waiting += value.values()
        elif isinstance(value, list):
            waiting += value
        elif isinstance(value, str) and value.lstrip().startswith("{"):
            with contextlib.suppress(ValueError):
                waiting.append(strict_json.parse(value))  # older data sets keep JSON in a text


def _plain(value: Any, name_of: Any) -> Any:
    """A value of TFDS (bytes, numpy) as JSON has it."""
    value = value.tolist() if hasattr(value, "tolist") else value
    if isinstance(value, list | tuple):
        return [_plain(each, name_of) for each in value]
    if isinstance(value, bytes):
        return entries.text_of(value, "a text")
    if name_of is not None and isinstance(value, int):
        return name_of(value).replace("_", " ")
    return value
