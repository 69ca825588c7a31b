"""A data set of random numbers, in the sizes that a config expects: to time what reads it."""

import os
from collections.abc import Mapping
from typing import Any

import numpy as np

from mmdit_jax.data.manifest import Bucket, Manifest
from mmdit_jax.data.records import ShardWriter

SCALE, SHIFT = 1.5305, 0.0609  # of SD3's autoencoder


def write(directory: str | os.PathLike, expected: Mapping[str, Any], records: int) -> None:
    """Writes a data set with `records` samples of the square bucket, each with one caption.

    Args:
        directory: of the data set.
        expected: what a config expects of a data set, as for `manifest.fits`.
        records: samples in the training split.
    """
    rng = np.random.default_rng(0)
    autoencoder, text_encoders = expected["autoencoder"], expected["text_encoders"]
    kind, resolution = autoencoder["kind"], expected["resolution"]
    side = resolution // autoencoder["factor"]
    shape = (side, side, autoencoder["channels"] * (2 if kind == "moments" else 1))

    def record(number: int) -> dict[str, Any]:
        latent = rng.standard_normal(shape, np.float32)
        if kind == "pixels":
            latent = rng.integers(0, 256, shape, np.uint8)
        fields = {
            "latent": latent,
            "captions": ["random numbers"],
            "caption_kinds": ["original"],
            "original_size": np.array([resolution, resolution], np.int32),
            "crop": np.array([0, 0, resolution, resolution], np.int32),
            "key": str(number),
        }
        for name, encoder in text_encoders.items():
            sequence = rng.standard_normal((1, encoder["length"], encoder["width"]), np.float32)
            fields[f"text/{name}/sequence"] = sequence.astype(np.float16)
            if pooled := encoder.get("pooled_width"):
                fields[f"text/{name}/pooled"] = sequence[:, 0, :pooled].astype(np.float32)
            if expected["text_storage"] == "trimmed":
                fields[f"text/{name}/sequence"] = fields[f"text/{name}/sequence"][0]
                fields[f"text/{name}/length"] = np.array([encoder["length"]], np.int32)
        return fields

    with ShardWriter(directory, "train-00000.arrayrecord") as writer:
        for number in range(records):
            writer.write(record(number))
    Manifest(
        splits={"train": (writer.shard,)},
        buckets=(Bucket(resolution, resolution),),
        autoencoder={"id": "random", "hash": "", "scale": SCALE, "shift": SHIFT, **autoencoder},
        text_encoders={name: {"hash": "", **encoder} for name, encoder in text_encoders.items()},
        resolution=resolution,
        source="random numbers",
        text_storage=expected["text_storage"],
    ).save(directory)
