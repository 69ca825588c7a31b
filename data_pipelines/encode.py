"""From pictures and captions to records.

Everything here is a pure function of the plan (which samples, in which order), never of what ran
before: a build that was killed and resumed writes the bytes that an uninterrupted one writes.
"""

import hashlib
import itertools
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from data_pipelines.captions import CaptionTable
from data_pipelines.latents import Autoencoder
from data_pipelines.pictures import Checked, Picture, Pictures
from data_pipelines.samples import Dropped, Rejected, Sample

CODE_VERSION = 2
"""Raise it with every change that alters what is written for the same input."""


def encoding_identity(
    autoencoder: Mapping[str, Any], text_encoders: Mapping[str, Mapping[str, Any]], text_dtype: str
) -> str:
    """What the networks contribute to a content key; arguments as the manifest describes them."""
    texts = {name: [entry["hash"], entry["length"]] for name, entry in text_encoders.items()}
    # Pixels are not computed in any dtype.
    latents = [autoencoder[name] for name in ("hash", "dtype") if name in autoencoder]
    return json.dumps([*latents, texts, text_dtype, CODE_VERSION])


def content_key(picture: Picture, sample: Sample, identity: str) -> str:
    """Hash of all that decides a record's arrays: change one of them and the key is another.

    Args:
      identity: of the networks, see `encoding_identity`.
    """
    content = [
        picture.sha256,
        picture.original_size,
        picture.crop,
        picture.pixels_HWC.shape,
        sample.captions,
        identity,
    ]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def make_record(
    sample: Sample,
    picture: Picture,
    latent_HWC: np.ndarray,
    captions: CaptionTable,
    identity: str,
) -> dict[str, Any]:
    """One sample in the shard format (mmdit_jax.data.records).

    Raises:
      Rejected: "non_finite".
    """
    if latent_HWC.dtype.kind == "f" and not np.isfinite(latent_HWC).all():
        raise Rejected("non_finite", "NaN or infinity in the latent")
    record: dict[str, Any] = {
        "latent": latent_HWC,
        **captions.fields([caption.text for caption in sample.captions]),
        "captions": [caption.text for caption in sample.captions],
        "caption_kinds": [caption.kind for caption in sample.captions],
        "original_size": np.array(picture.original_size, np.int32),
        "crop": np.array(picture.crop, np.int32),
        "key": content_key(picture, sample, identity),
    }
    if sample.objects:
        record["objects"] = sample.objects
    return record


class Encoded(NamedTuple):
    """One sample after the networks: its record, or why there is none."""

    record: dict[str, Any] | None
    dropped: Dropped | None = None
    enlarged: bool = False


def encode_samples(
    items: Sequence[Checked],
    pictures: Pictures,
    autoencoder: Autoencoder,
    captions: CaptionTable,
    *,
    identity: str,
    batch_size: int,
) -> Iterator[Encoded]:
    """Encodes samples in batches of `batch_size` pictures; one result per sample, in order."""
    together = zip(items, pictures.prepared(items), strict=True)
    while batch := list(itertools.islice(together, batch_size)):
        usable = [picture for _, picture in batch if isinstance(picture, Picture)]
        latents = iter(())
        if usable:
            stacked_BHWC = np.stack([picture.pixels_HWC for picture in usable])
            latents = iter(autoencoder.encode(stacked_BHWC))
        for item, picture in batch:
            try:
                if isinstance(picture, Rejected):
                    raise picture
                record = make_record(item.sample, picture, next(latents), captions, identity)
            except Rejected as rejected:
                case = Dropped(item.sample.name, rejected.reason, rejected.detail)
                yield Encoded(None, case)
            else:
                height, width = picture.pixels_HWC.shape[:2]
                smaller = picture.crop.height < height or picture.crop.width < width
                yield Encoded(record, enlarged=smaller)
