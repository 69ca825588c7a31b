"""From the record of a sample to the arrays that it puts into a batch: which, and of which shape.

A batch has text of one caption per sample, in the storage of the data set. The arrays of a sample
are named as in its record: "latent", "text/<encoder>/sequence" and so on.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import numpy as np

from mmdit_jax.data.manifest import Bucket, Manifest

# Name of an array -> the shape that it takes for one sample of a batch, and its dtype.
Layout = Mapping[str, tuple[tuple[int, ...], np.dtype]]

_OF_TOKENS = ("/sequence", "/scale")


class BatchFields:
    """Takes the arrays of samples out of their records.

    Every method that reads a record, whose fields are of their kinds (`check_sample`), raises
    ValueError for one that is unlike the data set; the message begins with its file and index.
    """

    def __init__(self, manifest: Manifest, encoders: Iterable[str]):
        """`encoders`: the text encoders that are read, in the order of a batch."""
        self._encoders, self._texts = tuple(encoders), manifest.text_encoders
        self._factor = manifest.autoencoder.get("factor")
        self._trimmed = manifest.text_storage == "trimmed"
        self._parts = [
            "sequence",
            *(["length"] if self._trimmed else []),
            *(["scale"] if manifest.text_precision != "float16" else []),
        ]

    def take(
        self, record: Mapping[str, Any], where: str, choose: Callable[[list[str]], int]
    ) -> dict[str, np.ndarray]:
        """The arrays of one sample, text of the caption that `choose` picks by their kinds."""
        needed = [f"text/{name}/{part}" for name in self._encoders for part in self._parts]
        for field in ("latent", *needed, *(("caption_kinds",) if needed else ())):
            if field not in record:
                raise ValueError(
                    f"{where} has no field {field!r}, it has {', '.join(record)}: "
                    "rebuild the data set"
                )
        parts = [(name, part) for name in self._encoders for part in (*self._parts, "pooled")]
        texts = [field for field in (f"text/{n}/{p}" for n, p in parts) if field in record]
        fields = {"latent": record["latent"]}
        if not self._encoders:
            return fields
        kinds = record["caption_kinds"]
        ragged = [field for field in texts if self._trimmed and field.endswith(_OF_TOKENS)]
        for field in texts:
            if field not in ragged and not 0 < len(kinds) == len(record[field]):
                raise ValueError(
                    f"{where}, field {field!r} has {len(record[field])} captions, "
                    f"caption_kinds has {len(kinds)}, both are equal and at least 1: "
                    "rebuild the data set"
                )
        chosen = choose(kinds)
        for field in texts:
            fields[field] = record[field][
                self._tokens(record, field, where, chosen) if field in ragged else chosen
            ]
        return fields

    def layout(self, fields: Mapping[str, np.ndarray], where: str, bucket: Bucket) -> Layout:
        """What every sample of a bucket has to look like, by the arrays of one of them."""
        latent = fields["latent"]
        size = (bucket.height, bucket.width)
        if self._factor and latent.shape[:2] != tuple(side // self._factor for side in size):
            raise ValueError(
                f"{where} has a latent of {latent.shape[0]} x {latent.shape[1]}, its "
                f"bucket of {bucket.height} x {bucket.width} px has latents of "
                f"{bucket.height // self._factor} x {bucket.width // self._factor}: "
                "rebuild the data set"
            )
        return {field: (self._room(field, value), value.dtype) for field, value in fields.items()}

    def check(self, fields: Mapping[str, np.ndarray], layout: Layout, where: str) -> None:
        """Refuses the arrays of a sample that do not go into a batch of this layout."""
        for field in {**layout, **fields}:
            value, room = fields.get(field), layout.get(field)
            if value is None or (self._room(field, value), value.dtype) != room:
                held = "absent" if value is None else f"{value.dtype}{list(value.shape)}"
                wanted = "absent" if room is None else f"{room[1]}{list(room[0])}"
                raise ValueError(
                    f"{where}, field {field!r} is {held}, the others of its bucket are {wanted}: "
                    "rebuild the data set"
                )

    def allocate(self, layout: Layout, samples: int) -> dict[str, np.ndarray]:
        """New arrays for a batch. New, because JAX may alias the memory that it is given (it does
        on CPU)."""
        # Zeros for the tokens that trimmed text leaves out; elsewhere all is written.
        new = np.zeros if self._trimmed else np.empty
        return {field: new((samples, *shape), dtype) for field, (shape, dtype) in layout.items()}

    def _room(self, field: str, value: np.ndarray) -> tuple[int, ...]:
        """Shape that one sample takes in a batch: every caption has the tokens of the longest."""
        if not self._trimmed or not field.endswith(_OF_TOKENS):
            return value.shape
        return self._texts[field.split("/")[1]]["length"], *value.shape[1:]

    def _tokens(self, record: Mapping[str, Any], field: str, where: str, caption: int) -> slice:
        """Where in a field of trimmed text the tokens of a caption are."""
        name = field.split("/")[1]
        lengths, most = record[f"text/{name}/length"], self._texts[name]["length"]
        if lengths.sum() != len(record[field]) or lengths.min() < 0 or lengths.max() > most:
            raise ValueError(
                f"{where}, field {field!r} has {len(record[field])} tokens, its "
                f"captions have {lengths.tolist()} of at most {most}: rebuild the data set"
            )
        start = int(lengths[:caption].sum())
        return slice(start, start + int(lengths[caption]))


def nested(arrays: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """A batch as training takes it: {"latent": ..., "text": {encoder: {part: ...}}}."""
    text: dict[str, dict[str, np.ndarray]] = {}
    for field, value in arrays.items():
        if field != "latent":
            _, name, part = field.split("/")
            text.setdefault(name, {})[part] = value
    return {"latent": arrays["latent"], "text": text}


def abstract(arrays: Layout, samples: int) -> dict[str, Any]:
    """Shapes and dtypes of a global batch of samples that look like this."""
    shapes = {
        field: jax.ShapeDtypeStruct((samples, *shape), dtype)
        for field, (shape, dtype) in arrays.items()
    }
    return nested(shapes) | {"substituted": jax.ShapeDtypeStruct((samples,), np.uint8)}


def planned_layout(
    latent: tuple[int, int, int],
    kind: str,
    text_encoders: Mapping[str, Mapping[str, Any]],
    text_storage: str = "full",
) -> Layout:
    """What a sample of a data set with float16 text will look like, before there is one.

    Args:
        latent: height, width and channels that the model sees.
        kind: of the latents: moments | mean | pixels.
        text_encoders: name -> `length`, `width` and `pooled_width` (0: none), in their order.
        text_storage: full | trimmed.
    """
    half = np.dtype(np.float16)
    height, width, channels = latent
    stored = (height, width, 2 * channels if kind == "moments" else channels)
    # As the pipeline writes them: bytes of pictures, or what an autoencoder returns.
    layout = {"latent": (stored, np.dtype(np.uint8 if kind == "pixels" else np.float32))}
    for name, about in text_encoders.items():
        layout[f"text/{name}/sequence"] = ((about["length"], about["width"]), half)
        if text_storage == "trimmed":
            layout[f"text/{name}/length"] = ((), np.dtype(np.int32))
        if about["pooled_width"]:
            layout[f"text/{name}/pooled"] = ((about["pooled_width"],), np.dtype(np.float32))
    return layout
